"""The adapter for the networks of Cellpose 3 and 4."""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from cellpose import dynamics, transforms
from cellpose.core import run_net
from cellpose.models import CellposeModel
from numpy.typing import NDArray
from torch import Tensor, nn

from selfadapt import (
    Adapter,
    Binary,
    ImageError,
    Input,
    LazyImage,
    OutputError,
    OutputSpec,
    Vector,
    as_channels_first,
    check_settled,
)
from selfadapt_cellpose._files import (
    check_free,
    open_network,
    opening_line,
    register_in_gui,
    shapes_of,
    write_weights,
)
from selfadapt_cellpose._networks import (
    bottleneck,
    check_kind,
    is_transformer,
    make_trainable,
    no_word_on_sparse_tensors,
)
from selfadapt_cellpose._normalize import check_size, for_cellpose, normalize, single
from selfadapt_cellpose._options import (
    check_normalization,
    check_options,
    check_tiles,
    evaluation,
)

logger = logging.getLogger(__name__)

STEPS = 200
"""Iterations of Cellpose's dynamics at the scale of the network."""


class CellposeAdapter(Adapter):
    """A Cellpose network: `CPnet` of version 3, `CPSAM` or `CPDINO` of version 4.

    Cellpose's own functions convert, normalise, rescale and tile the images and make the masks, so
    that an unadapted network gives the masks of `CellposeModel.eval`.

    Args:
        model: a name of the zoo (Cellpose downloads it), a weights file, or a `CellposeModel`,
            which stays as it is.
        diameter: of the cells in the target images, in pixels. "auto": as `selfadapt.calibrate`
            finds it in them. None: the same where a version 3 file has no `diam_labels`; else
            these, or version 4's 30 pixels, unless it is calibrated.
        channels: version 3 only: the channel to segment and that of the nuclei, as in Cellpose
            (0 gray or none, 1 red, 2 green, 3 blue).
        flow_threshold: largest flow error of an instance that is kept; 0 keeps all.
        cellprob_threshold: pixels whose logit is above it belong to cells.
        min_size: smaller instances, in pixels of the image, are dropped.
        normalize: whether percentiles 1 and 99 go to 0 and 1, or Cellpose's own dictionary.
        invert: whether dark cells are made bright, after normalisation; None: no, unless it is
            calibrated; "auto": as `selfadapt.calibrate` finds.
        resample: whether instances are found at the scale of the image, not of the network.
        niter: iterations of the dynamics; None: 200 at the scale of the network.
        augment: whether overlapping tiles are flipped, and averaged.
        tile_overlap: share of a tile that its neighbours overlap.
        bsize: side of a tile; None: 224, or what version 4 takes.
        max_size_fraction: larger instances, as a share of the image, are dropped.
        checkpoint: version 4 only: save memory by computing the encoder's blocks twice.

    Attributes:
        diameter: in pixels; None while it is to be found.
        diam_mean: the diameter to which cells are rescaled for the network, in pixels.

    Raises:
        ModelError: there is no such model, or it does not fit the installed Cellpose.
        ConfigError: an option is out of range.
    """

    size_multiple = 8
    adjustable = frozenset({"scale", "invert", "low", "high", "tta"})
    tta = False

    def __init__(
        self,
        model: str | Path | CellposeModel,
        *,
        diameter: float | Literal["auto"] | None = None,
        channels: Sequence[int] | None = None,
        flow_threshold: float = 0.4,
        cellprob_threshold: float = 0.0,
        min_size: int = 15,
        normalize: bool | dict[str, Any] = True,
        invert: bool | Literal["auto"] | None = None,
        resample: bool = True,
        niter: int | None = None,
        augment: bool = False,
        tile_overlap: float = 0.1,
        bsize: int | None = None,
        max_size_fraction: float = 0.4,
        checkpoint: bool = False,
    ) -> None:
        check_options(diameter, channels, flow_threshold, cellprob_threshold, min_size)
        net, template, has_diameter = open_network(model)
        self._template = copy.copy(template)  # all settings of the CellposeModel, and no network
        self._template.net = None
        self._shapes = shapes_of(net)
        transformer = is_transformer(net)
        check_kind(net, channels, checkpoint=checkpoint)
        make_trainable(net, checkpoint=checkpoint)
        self.model = net
        self.outputs = OutputSpec(flow=Vector(), cellprob=Binary())
        self.channels = None if transformer else int(net.nchan)
        self.channels_last = not transformer
        # SAM has a position embedding of one size; DINO has none
        self.fixed_size = 256 if hasattr(getattr(net, "encoder", None), "neck") else None
        self.channel_choice = None if channels is None else list(channels)
        self.flow_threshold, self.cellprob_threshold = flow_threshold, cellprob_threshold
        self.min_size = min_size
        # all keys that `eval` may have left changed in Cellpose's own defaults
        given = normalize if isinstance(normalize, dict) else {"normalize": normalize}
        self.normalization = {"normalize": True, "invert": invert is True, **given}
        check_normalization(self.normalization, self.channels or 3)
        self.resample = resample
        check_tiles(niter, tile_overlap, bsize, max_size_fraction, fixed=self.fixed_size)
        self.niter, self.max_size_fraction = niter, max_size_fraction
        self.tiles: dict[str, Any] = {
            "augment": augment,
            "tile_overlap": tile_overlap,
            "bsize": bsize or self._usual_tile,
        }
        self.diam_mean = 30.0 if transformer else float(template.diam_mean)
        if not transformer:  # of a zoo file without it, Cellpose knows it by the name alone
            net.get_parameter("diam_mean").data.fill_(self.diam_mean)
        self.diameter: float | None = None
        if isinstance(diameter, int | float):
            self.diameter = float(diameter)
        elif diameter is None and (transformer or has_diameter):
            self.diameter = self.diam_mean if transformer else float(template.diam_labels)
        asked = {"scale": self.diameter is None, "invert": invert == "auto"}
        self.auto = frozenset(name for name, is_auto in asked.items() if is_auto)
        said = {"scale": isinstance(diameter, int | float), "invert": isinstance(invert, bool)}
        said["invert"] |= "invert" in given
        said["low"] = said["high"] = "percentile" in given
        self.settled = frozenset(name for name, is_said in said.items() if is_said)

    def check(self, images: Sequence[LazyImage]) -> None:
        """Say which diameter is taken where nobody has said one, nor found it in images."""
        super().check(images)
        if "scale" not in self.settled | self.auto:
            logger.warning(
                "No diameter given: %.1f pixels are taken, %s. Give that of your cells, or "
                'diameter="auto" (shell: --diameter auto).',
                self.diameter,
                "the model's own diam_labels" if self.channels else "the images' own scale",
            )

    def forward(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        return self.outputs.split(model(images)[0][:, -3:])

    def forward_tiled(self, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
        """By Cellpose's tiler, which pads and blends in its own way."""
        raw, _ = run_net(model, image.permute(1, 2, 0).cpu().numpy()[None], **self.tiles)
        batch = self.outputs.split(torch.from_numpy(raw[..., -3:].transpose(0, 3, 1, 2)))
        return {name: output[0] for name, output in batch.items()}

    def embedding_module(self, model: nn.Module) -> nn.Module:
        return bottleneck(model)

    @property
    def input(self) -> Input:
        """In the core's words; Cellpose's own are `diameter`, `normalize` and `invert`."""
        low, high = self.normalization.get("percentile") or (1.0, 99.0)
        return Input(
            scale=self._scale,
            invert=bool(self.normalization["invert"]),
            low=low,
            high=high,
            tta=self.tta,
        )

    @input.setter
    def input(self, input: Input) -> None:
        self.tta = input.tta
        ours = self.input
        self.normalization = self.normalization | {"invert": input.invert}
        if (input.low, input.high) != (ours.low, ours.high):
            self.normalization["percentile"] = (input.low, input.high)
        if self.diameter is None or input.scale != ours.scale:
            self.diameter = self.diam_mean / input.scale

    def prepare(
        self, image: NDArray[Any], whole: NDArray[Any] | None = None
    ) -> NDArray[np.float32]:
        scale = self._scale
        check_size(image, scale, self.diameter)
        normalised = normalize(
            image, whole, self.normalization, choice=self.channel_choice, taken=self.channels
        )
        if scale != 1:
            rescaled = transforms.resize_image(normalised, rsz=scale)
            normalised = rescaled.reshape(*rescaled.shape[:2], -1)  # one channel loses its axis
        return np.asarray(normalised.transpose(2, 0, 1), np.float32)

    def decode(self, outputs: Mapping[str, Tensor], size: tuple[int, int]) -> NDArray[np.int32]:
        """Instances at the scale of the image, as `CellposeModel.eval` finds them."""
        scale = self._scale
        raw = torch.cat([outputs["flow"], outputs["cellprob"]])
        fields = raw.permute(1, 2, 0).numpy()
        if self.resample and fields.shape[:2] != size:
            fields = transforms.resize_image(fields, *size)
        with no_word_on_sparse_tensors():
            masks: NDArray[Any] = dynamics.resize_and_compute_masks(
                np.ascontiguousarray(fields[..., :2].transpose(2, 0, 1)),
                np.ascontiguousarray(fields[..., 2]),
                niter=self.niter or (int(STEPS / scale) if self.resample else STEPS),
                cellprob_threshold=self.cellprob_threshold,
                flow_threshold=self.flow_threshold,
                min_size=self.min_size,
                max_size_fraction=self.max_size_fraction,
                resize=None if self.resample else size,
                device=next(self.model.parameters()).device,
            )
        return masks.astype(np.int32)

    def segment(self, image: Any, *, channel_axis: int | None = None) -> NDArray[np.int32]:
        """By `CellposeModel.eval` with the adapter's options (without it under TTA)."""
        if self.tta:
            return super().segment(image, channel_axis=channel_axis)
        pixels = as_channels_first(image, channel_axis)
        check_settled(self)
        if not np.isfinite(pixels).all():
            raise ImageError("the image contains NaN or infinity: replace them first.")
        check_size(pixels, self._scale, self.diameter)
        size = pixels.shape[1:]
        pixels, _ = single(pixels, pixels, self.normalization)
        pixels, options = for_cellpose(pixels, self.channel_choice, self.channels)
        with no_word_on_sparse_tensors():
            masks, flows = self._around(self.model).eval(
                pixels,
                channels=options.get("channels"),
                channel_axis=options["channel_axis"],
                diameter=self.diameter,
                flow_threshold=self.flow_threshold,
                cellprob_threshold=self.cellprob_threshold,
                min_size=self.min_size,
                normalize=self.normalization,
                resample=self.resample,
                niter=self.niter,
                max_size_fraction=self.max_size_fraction,
                **self.tiles,
            )[:2]
        if not all(np.isfinite(flow).all() for flow in flows[1:3]):  # of which eval says nothing
            raise OutputError("the network gives NaN or infinity for the image: load it anew.")
        # of an image with one row or column Cellpose drops an axis
        return np.asarray(masks, np.int32).reshape(size)

    def cellpose_model(self) -> CellposeModel:
        """A `CellposeModel` of its own around a copy of the network, ready for `eval`.

        Without MKL-DNN, which changes the tensors in place: it can be saved after `eval`, too.
        """
        net = copy.deepcopy(self.model).eval()
        if self._known_diameter is not None:
            net.get_parameter("diam_labels").data.fill_(self._known_diameter)
        return self._around(net)

    def save(self, path: str | Path, *, register: bool = False) -> None:
        """Write the weights file that Cellpose itself opens; `usage(path)` is the line for it.

        Args:
            path: the file; any name will do. Every tensor is checked before it is written.
            register: also put it into the model list of Cellpose's GUI, under the file's name.

        Raises:
            ModelError: a tensor is missing or not finite, or the name is taken.
        """
        path = Path(path).expanduser()
        if register:
            check_free(path.name)
        write_weights(self.model, path, self._shapes, self._known_diameter)
        logger.info("Open it with %s", opening_line(path, self.model, self._template))
        if register:
            register_in_gui(path)

    def input_options(self) -> dict[str, Any]:
        diameter = self.diameter or self.diam_mean
        return {"diameter": round(diameter, 2), "invert": self.input.invert}

    def usage(self, path: Path) -> str:
        opening = opening_line(path, self.model, self._template)
        return opening + self.evaluation() if opening.startswith("CellposeModel(") else opening

    def evaluation(self) -> str:
        """What `eval` must be told, as `.eval(image, ...)`; empty where that is nothing."""
        diameter = self.diam_mean if self.channels else self.diameter  # version 3: in the file
        return evaluation(
            self.normalization,
            channels=(self.channel_choice, None),
            diameter=(diameter, self.diam_mean),
            flow_threshold=(self.flow_threshold, 0.4),
            cellprob_threshold=(self.cellprob_threshold, 0.0),
            min_size=(self.min_size, 15),
            resample=(self.resample, True),
            niter=(self.niter, None),
            max_size_fraction=(self.max_size_fraction, 0.4),
            augment=(self.tiles["augment"], False),
            tile_overlap=(self.tiles["tile_overlap"], 0.1),
            bsize=(self.tiles["bsize"], self._usual_tile),
        )

    @property
    def _known_diameter(self) -> float | None:
        """None where it is only version 4's word for the images' own scale."""
        return self.diameter if self.channels or "scale" in self.settled else None

    @property
    def _usual_tile(self) -> int:
        """Side of a tile in `eval`."""
        return 224 if self.channels else (self.fixed_size or 384)

    @property
    def _scale(self) -> float:
        """Factor from the image to the network's input."""
        return self.diam_mean / (self.diameter or self.diam_mean)

    def _around(self, net: nn.Module) -> CellposeModel:
        """The original `CellposeModel` with another network."""
        model = copy.copy(self._template)
        model.net = net
        model.device, model.mkldnn = next(net.parameters()).device, False
        model.gpu = model.device.type != "cpu"
        model.diam_mean, model.diam_labels = self.diam_mean, self.diameter
        return model

"""The adapter for the networks of Cellpose 3 and 4."""

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

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
    ConfigError,
    ImageError,
    ModelError,
    OutputSpec,
    Vector,
    as_channels_first,
    open_images,
)
from selfadapt_cellpose._files import (
    CPNET_WIDTHS,
    check_free,
    network_copy,
    open_cellpose,
    register_in_gui,
    shapes_of,
    write_weights,
)
from selfadapt_cellpose._networks import (
    bottleneck,
    check_network,
    checkpoint_blocks,
    is_transformer,
    make_trainable,
)
from selfadapt_cellpose._options import check_normalization, check_options

logger = logging.getLogger(__name__)

ESTIMATED_FROM = 8
"""A diameter is estimated from at most that many images."""
STEPS = 200
"""Iterations of Cellpose's dynamics at the scale of the network."""


class CellposeAdapter(Adapter):
    """A Cellpose network: `CPnet` of version 3, `CPSAM` or `CPDINO` of version 4.

    Cellpose's own functions convert, normalise, rescale and tile the images and make the masks, so
    that an unadapted network gives the masks of `CellposeModel.eval`.

    Args:
        model: a name of the zoo (Cellpose downloads it), a weights file, or a `CellposeModel`,
            which stays as it is.
        diameter: of the cells in the target images, in pixels. None: version 3 takes the file's
            `diam_labels` or, where the file has none, the median diameter of the instances that
            the network finds in the target images; version 4 takes images at their own scale.
            The log says which.
        channels: version 3 only: the channel to segment and that of the nuclei, as in Cellpose
            (0 gray or none, 1 red, 2 green, 3 blue).
        flow_threshold: largest flow error of an instance that is kept; 0 keeps all.
        cellprob_threshold: pixels whose logit is above it belong to cells.
        min_size: smaller instances, in pixels of the image, are dropped.
        normalize: whether percentiles 1 and 99 go to 0 and 1, or Cellpose's dictionary of
            normalisation parameters.
        invert: whether dark cells are made bright, after normalisation.
        resample: whether instances are found at the scale of the image. False is faster where
            cells are larger than the network's (30 or 17 pixels), with coarser outlines.
        checkpoint: version 4 only: save memory by computing the encoder's blocks twice.

    Attributes:
        diameter: in pixels; None while it is to be estimated.
        diam_mean: the diameter to which cells are rescaled for the network, in pixels.

    Raises:
        ModelError: there is no such model, or it does not fit the installed Cellpose.
        ConfigError: an option is out of range.
    """

    size_multiple = 8

    def __init__(
        self,
        model: str | Path | CellposeModel,
        *,
        diameter: float | None = None,
        channels: Sequence[int] | None = None,
        flow_threshold: float = 0.4,
        cellprob_threshold: float = 0.0,
        min_size: int = 15,
        normalize: bool | dict[str, Any] = True,
        invert: bool = False,
        resample: bool = True,
        checkpoint: bool = False,
    ) -> None:
        check_options(diameter, channels, flow_threshold, cellprob_threshold, min_size)
        if isinstance(model, str | Path):
            template, has_diameter = open_cellpose(str(model))
            net = template.net
        else:
            net, has_diameter = network_copy(model)
            template = model
        check_network(net)
        self._template = copy.copy(template)  # all settings of the CellposeModel, and no network
        self._template.net = None
        self._shapes = shapes_of(net)
        transformer = is_transformer(net)
        if channels is not None and transformer:
            raise ConfigError(
                f"channels={tuple(channels)} is an option of Cellpose 3; version 4 takes up to "
                "three channels in any order: leave it out."
            )
        if channels is not None and net.nchan != 2:
            raise ConfigError(
                f"channels={tuple(channels)} is for networks of two channels, and this one has "
                f"{net.nchan}: leave it out."
            )
        if checkpoint and not transformer:
            raise ConfigError("checkpoint=True is an option of Cellpose 4: leave it out.")
        make_trainable(net)
        if checkpoint:
            checkpoint_blocks(net)
        self.model = net
        self.outputs = OutputSpec(flow=Vector(), cellprob=Binary())
        self.channels = None if transformer else int(net.nchan)
        self.channels_last = not transformer
        # SAM has a position embedding of one size; DINO has none
        self.fixed_size = 256 if hasattr(getattr(net, "encoder", None), "neck") else None
        self.channel_choice = None if channels is None else list(channels)
        self.flow_threshold = flow_threshold
        self.cellprob_threshold = cellprob_threshold
        self.min_size = min_size
        # all keys that `eval` may have left changed in Cellpose's own defaults
        given = normalize if isinstance(normalize, dict) else {"normalize": normalize}
        self.normalization = {"normalize": True, "invert": invert, **given}
        check_normalization(self.normalization)
        self.resample = resample
        self._sizes: dict[tuple[int, ...], tuple[int, int]] = {}
        self.diam_mean = 30.0 if transformer else float(template.diam_mean)
        if not transformer:  # of a zoo file without it, Cellpose knows it by the name alone
            net.get_parameter("diam_mean").data.fill_(self.diam_mean)
        self.diameter: float | None = None
        if diameter is not None:
            self._set_diameter(diameter)
        elif transformer:
            self.diameter = self.diam_mean
            logger.warning(
                "No diameter given: Cellpose 4 takes the images at their own scale, as for cells "
                "of 30 pixels."
            )
        elif has_diameter:
            self._set_diameter(float(template.diam_labels))
            logger.warning(
                "No diameter given: %.1f pixels are taken, the model's own diam_labels. Give the "
                "diameter of your cells if it is another.",
                self.diameter,
            )

    def forward(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        return self.outputs.split(model(images)[0][:, -3:])

    def forward_tiled(self, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
        """By Cellpose's tiler, which pads and blends in its own way."""
        tile = (self.fixed_size or 384) if is_transformer(model) else 224  # as in eval
        raw, _ = run_net(model, image.permute(1, 2, 0).cpu().numpy()[None], bsize=tile)
        batch = self.outputs.split(torch.from_numpy(raw[..., -3:].transpose(0, 3, 1, 2)))
        return {name: output[0] for name, output in batch.items()}

    def embedding_module(self, model: nn.Module) -> nn.Module:
        return bottleneck(model)

    def prepare(self, image: NDArray[Any]) -> NDArray[np.float32]:
        scale = self._scale
        pixels, options = self._for_cellpose(image)
        converted = transforms.convert_image(pixels, **options)
        normalised = converted
        if self.normalization["normalize"]:  # as in eval
            normalised = transforms.normalize_img(converted, **self.normalization)
        if scale != 1:
            rescaled = transforms.resize_image(normalised, rsz=scale)
            normalised = rescaled.reshape(*rescaled.shape[:2], -1)  # one channel loses its axis
        self._sizes.setdefault(normalised.shape[:2], (image.shape[1], image.shape[2]))
        return np.asarray(normalised.transpose(2, 0, 1), np.float32)

    def decode(self, outputs: Mapping[str, Tensor]) -> NDArray[np.int32]:
        """Instances at the scale of the image, as `CellposeModel.eval` finds them."""
        scale = self._scale
        raw = torch.cat([outputs["flow"], outputs["cellprob"]]).nan_to_num()
        fields = raw.permute(1, 2, 0).numpy()
        sides = self._size_before(fields.shape[0], fields.shape[1])
        if self.resample and scale != 1:
            fields = transforms.resize_image(fields, *sides)
        with _no_word_on_sparse_tensors():
            masks: NDArray[Any] = dynamics.resize_and_compute_masks(
                np.ascontiguousarray(fields[..., :2].transpose(2, 0, 1)),
                np.ascontiguousarray(fields[..., 2]),
                niter=int(STEPS / scale) if self.resample else STEPS,
                cellprob_threshold=self.cellprob_threshold,
                flow_threshold=self.flow_threshold,
                min_size=self.min_size,
                resize=None if self.resample else sides,
                device=next(self.model.parameters()).device,
            )
        return masks.astype(np.int32)

    def segment(self, image: Any, *, channel_axis: int | None = None) -> NDArray[np.int32]:
        """By `CellposeModel.eval` with the adapter's options."""
        pixels = as_channels_first(image, channel_axis)
        if not np.isfinite(pixels).all():
            raise ImageError("the image contains NaN or infinity: replace them first.")
        pixels, options = self._for_cellpose(pixels)
        with _no_word_on_sparse_tensors():
            masks: NDArray[Any] = self._around(self.model).eval(
                pixels,
                channels=options.get("channels"),
                channel_axis=options["channel_axis"],
                diameter=self.diameter,
                flow_threshold=self.flow_threshold,
                cellprob_threshold=self.cellprob_threshold,
                min_size=self.min_size,
                normalize=self.normalization,
                resample=self.resample,
            )[0]
        return masks.astype(np.int32)

    def cellpose_model(self) -> CellposeModel:
        """A `CellposeModel` of its own around a copy of the network, ready for `eval`.

        It does without MKL-DNN, for which Cellpose 3 changes the network's tensors in place, so
        that it can be saved after `eval`, too.
        """
        return self._around(copy.deepcopy(self.model).eval())

    def save(self, path: str | Path, *, register: bool = False) -> None:
        """Write the weights file that Cellpose itself opens, and print the line that opens it.

        Args:
            path: the file; any name will do. Every tensor is checked before it is written.
            register: also put it into the model list of Cellpose's GUI, under the file's name.

        Raises:
            ModelError: a tensor is missing or not finite, or the name is taken.
        """
        path = Path(path).expanduser()
        if register:
            check_free(path.name)
        write_weights(self.model, path, self._shapes)
        print(f"Open it with {self._opening(path)}")
        if register:
            register_in_gui(path)

    def usage(self, path: Path) -> str:
        opening = self._opening(path)
        return opening + self._evaluation() if opening.startswith("CellposeModel(") else opening

    def _opening(self, path: Path) -> str:
        file = repr(str(path.absolute()))
        if is_transformer(self.model):
            return f"CellposeModel(pretrained_model={file}, use_bfloat16=False)"
        if self._template.nbase[1:] == CPNET_WIDTHS:
            channels = "" if self.channels == 2 else f", nchan={self.channels}"
            return f"CellposeModel(pretrained_model={file}{channels})"
        return f"CellposeAdapter({file}): Cellpose itself knows the widths {CPNET_WIDTHS} only"

    def _evaluation(self) -> str:
        """What `eval` must be told, where that is not its default."""
        usual: dict[str, Any] = {"normalize": True, "invert": False}
        changed = {k: v for k, v in self.normalization.items() if usual.get(k, ...) != v}
        by_dictionary = not changed.keys() <= usual.keys()  # then eval takes both from it
        told = {
            "channels": (self.channel_choice, None),
            # a file of version 3 knows its diameter
            "diameter": (self.diam_mean if self.channels else self.diameter, self.diam_mean),
            "normalize": (changed if by_dictionary else self.normalization["normalize"], True),
            "invert": (not by_dictionary and self.normalization["invert"], False),
            "flow_threshold": (self.flow_threshold, 0.4),
            "cellprob_threshold": (self.cellprob_threshold, 0.0),
            "min_size": (self.min_size, 15),
            "resample": (self.resample, True),
        }
        options = [f", {k}={value!r}" for k, (value, other) in told.items() if value != other]
        return f".eval(image{''.join(options)})" if options else ""

    def calibrated(self, images: Sequence[Any]) -> Self:
        """With the diameter estimated from the images, if none is known."""
        if self.diameter is not None:
            return self
        adapter = self.with_model(copy.deepcopy(self.model))
        adapter._sizes = {}
        adapter._set_diameter(self.estimate_diameter(images))
        logger.warning(
            "No diameter given, and the model has no diam_labels: %.1f pixels are taken, the "
            "median of what the model finds in the images.",
            adapter.diameter,
        )
        return adapter

    def estimate_diameter(self, images: Any, *, channel_axis: int | None = None) -> float:
        """Median diameter, in pixels, of the instances that the network itself finds.

        Like Cellpose's size model, in two passes: at the network's own diameter, then at the one
        found. Up to eight of the images serve, evenly spread.

        Args:
            images: any source that `selfadapt.open_images` takes.
            channel_axis: position of the channels, where the source does not say it.
        """
        listed = open_images(images, channel_axis=channel_axis)
        chosen = listed[:: -(-len(listed) // ESTIMATED_FROM)]
        trial = copy.copy(self)
        trial.diameter = self.diam_mean
        for _ in range(2):
            labels = [trial.segment(image.read(), channel_axis=0) for image in chosen]
            areas = np.concatenate(
                [np.unique(found[found > 0], return_counts=True)[1] for found in labels]
            )
            if not len(areas):
                raise ModelError(
                    "the diameter cannot be estimated: the network finds no instance in "
                    f"{chosen[0]} and {len(chosen) - 1} others. Give the diameter."
                )
            trial.diameter = 2 * math.sqrt(float(np.median(areas)) / math.pi)
        return trial.diameter

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: str,
        *,
        diameter: float | None = None,
        channels: list[int] | None = None,
        flow_threshold: float = 0.4,
        cellprob_threshold: float = 0.0,
        min_size: int = 15,
        normalize: bool | dict[str, Any] = True,
        invert: bool = False,
        resample: bool = True,
        checkpoint: bool = False,
    ) -> Self:
        """Open a zoo name or a weights file; the same as the class itself.

        Args:
            model: a name of Cellpose's zoo, or a weights file.
            diameter: of the cells, in pixels (default: the model's own).
            channels: Cellpose 3: channel to segment and channel of the nuclei, e.g. [2,3].
            flow_threshold: largest flow error of an instance that is kept.
            cellprob_threshold: pixels whose logit is above it belong to cells.
            min_size: smaller instances, in pixels, are dropped.
            normalize: true, false, or Cellpose's dictionary of normalisation parameters.
            invert: make dark cells bright.
            resample: find instances at the scale of the image.
            checkpoint: Cellpose 4: save memory by computing the encoder's blocks twice.
        """
        options = {name: value for name, value in locals().items() if name not in _NO_OPTIONS}
        return cls(model, **options)

    @property
    def _scale(self) -> float:
        """Factor from the image to the network's input."""
        if self.diameter is None:
            raise ModelError(
                "the diameter of the cells is not known, and the model has no diam_labels: give "
                "diameter=..., or let `adapter.calibrated(images)` estimate it."
            )
        return self.diam_mean / self.diameter

    def _set_diameter(self, diameter: float) -> None:
        """Here and in the network, whose file then tells Cellpose."""
        self.diameter = diameter
        self.model.get_parameter("diam_labels").data.fill_(diameter)

    def _size_before(self, height: int, width: int) -> tuple[int, int]:
        """The size of the image that was prepared to this size.

        As `prepare` cuts sides to whole numbers, several may be: the first that it has met is
        taken, and always that one, or (for crops) one in the middle.
        """
        if (known := self._sizes.get((height, width))) is not None:
            return known
        if self._scale == 1:
            return height, width
        return round((height + 0.5) / self._scale), round((width + 0.5) / self._scale)

    def _for_cellpose(self, image: NDArray[Any]) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """A copy of `[C, H, W]` as Cellpose takes it, and which channels of it to take."""
        count, choice = len(image), self.channel_choice
        most = self.channels or 3
        if min(image.shape[1:]) * self._scale < 1:
            raise ImageError(
                f"an image of {image.shape[1]} x {image.shape[2]} pixels is too small for cells of "
                f"{self.diameter} pixels: give their diameter in these images."
            )
        if choice is None and count > most:
            remedy = (
                "give channels, e.g. (0, 0) for gray or (2, 3) for green cells, blue nuclei "
                "(shell: --channels '[0,0]')"
            )
            if self.channels is None:
                remedy = "choose some of them"
            raise ImageError(
                f"the image has {count} channels, and the network takes {most}: {remedy}."
            )
        if choice is None and self.channels is not None and count not in (1, most):
            raise ImageError(
                f"the image has {count} channels, and the network takes {most}: give images of "
                "one or of that many channels."
            )
        if choice is not None and not max(choice) <= count <= 5:
            raise ImageError(
                f"channels={tuple(choice)} does not fit an image with {count} channel(s): gray "
                "images need no channels, and Cellpose takes up to 5."
            )
        flat = count == 1
        options: dict[str, Any] = {"channel_axis": None if flat else 0}
        if self.channels is not None:
            options |= {"channels": choice, "nchan": self.channels}
        # a copy: Cellpose normalises float32 in place
        return (image[0] if flat else image).astype(np.float32), options

    def _around(self, net: nn.Module) -> CellposeModel:
        """The original `CellposeModel` with another network."""
        model = copy.copy(self._template)
        model.net = net
        model.device, model.mkldnn = next(net.parameters()).device, False
        model.gpu = model.device.type != "cpu"
        model.diam_mean, model.diam_labels = self.diam_mean, self.diameter
        return model


@contextmanager
def _no_word_on_sparse_tensors() -> Iterator[None]:
    """Cellpose's dynamics build them, and torch asks the user whether to check them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)
        yield


_NO_OPTIONS = ("cls", "model", "__class__")

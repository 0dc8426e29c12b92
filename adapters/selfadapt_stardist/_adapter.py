"""The adapter for StarDist's 2-D networks."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from stardist.geometry import polygons_to_label
from stardist.nms import non_maximum_suppression
from torch import Tensor, nn

from selfadapt import (
    D4,
    Adapter,
    ConfigError,
    ImageError,
    Input,
    LazyImage,
    ModelError,
    predict,
    prepare,
)
from selfadapt_stardist._files import (
    DEFAULT_THRESHOLDS,
    StarDistModel,
    read_model,
    write_model,
    write_state,
)
from selfadapt_stardist._network import StarDist2D
from selfadapt_stardist._port import OUTPUTS, Port

logger = logging.getLogger(__name__)

CHECKED = 8
"""The conventions of a port are checked on that many images."""
BORDER = 2
"""StarDist takes no object whose centre is that near to the edge, in cells of the grid."""


class StardistAdapter(Adapter):
    """A StarDist network: an official one, or a PyTorch port.

    Args:
        model: a StarDist model folder, its zip, the name of one of StarDist's own models
            ("2D_versatile_fluo", ...), a `StarDist2D` of this package, or another `nn.Module`.
        port: the conventions of another `nn.Module`; official networks need none.
        prob_thresh: objects are where the probability exceeds this; default: the model's own.
        nms_thresh: of two objects that overlap by more, the less probable goes; default: the
            model's own.
        scale: images are rescaled by this for the network, as in `predict_instances`: 0.5 where
            objects are twice as large as those that the model knows. None: 1, unless
            `selfadapt.calibrate` finds another; "auto": it must.
        pmin: percentile of a channel that becomes 0.
        pmax: percentile of a channel that becomes 1.
        gray: whether colour becomes luminance.
        invert: whether dark objects are made bright. None and "auto" as for scale.

    >>> from selfadapt_stardist import Architecture
    >>> network = StarDist2D(Architecture(grid=(2, 2), unet_n_filter_base=4))
    >>> adapter = StardistAdapter(network, scale=0.5)
    >>> adapter.segment(np.random.default_rng(0).random((50, 70))).shape
    (50, 70)

    Raises:
        ModelError: there is no such model, or it is not a 2-D StarDist network.
        ConfigError: an option is out of range.
        OutputError: a port's outputs are named wrongly.
    """

    input = Input(low=1.0, high=99.8)
    tile = 1024
    padding = "reflect"  # as StarDist pads

    def __init__(
        self,
        model: str | Path | nn.Module,
        port: Port | None = None,
        *,
        prob_thresh: float | None = None,
        nms_thresh: float | None = None,
        scale: float | Literal["auto"] | None = None,
        pmin: float | None = None,
        pmax: float | None = None,
        gray: bool | None = None,
        invert: bool | Literal["auto"] | None = None,
    ) -> None:
        for name, value in (("prob_thresh", prob_thresh), ("nms_thresh", nms_thresh)):
            if value is not None and not 0 < value < 1:
                raise ConfigError(f"{name}={value} is not allowed: it must be between 0 and 1.")
        if port is None:
            opened = _official(model)
            a = opened.network.architecture
            self.model: nn.Module = opened.network
            self._config: Mapping[str, Any] | None = opened.config
            if opened.input is not None:
                self.input, self.settled = opened.input, frozenset({"scale", "invert", "gray"})
            self.size_multiple = a.divisor
            self.channels_last = True
            thresholds = opened.thresholds
            port = Port(
                n_rays=a.n_rays,
                outputs=OUTPUTS[: 2 if a.n_classes is None else 3],
                grid=a.grid,
                n_classes=a.n_classes,
                embedding="middle.0",
                channels=a.n_channel_in,
            )
        elif isinstance(model, nn.Module):
            self.model, self._config, thresholds = model, None, DEFAULT_THRESHOLDS
            self.size_multiple, self.fixed_size = port.size_multiple, port.fixed_size
        else:
            raise ModelError(f"port is for a network that is built already, not for {model!r}.")
        self.say(scale=scale, invert=invert, gray=gray, low=pmin, high=pmax)
        self.port = port
        self.outputs = port.spec()
        self.channels = port.channels
        self.prob_thresh = thresholds["prob"] if prob_thresh is None else prob_thresh
        self.nms_thresh = thresholds["nms"] if nms_thresh is None else nms_thresh
        self.embedding_module(self.model)
        if (exact := len(self.outputs.symmetries)) < len(D4):
            logger.warning(
                "With %d rays on a grid of %s, %d of the eight flips and turns of an image are "
                "exact: the teacher averages over these only.",
                port.n_rays, port.grid, exact,
            )  # fmt: skip

    def forward(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        return self.port.named(model(images), self.outputs)

    def embedding_module(self, model: nn.Module) -> nn.Module:
        try:
            return model.get_submodule(self.port.embedding)
        except AttributeError:
            names = ", ".join(name for name, _ in model.named_children())
            raise ModelError(
                f"the network has no layer {self.port.embedding!r} to take the embedding from; "
                f"give embedding=..., one of its layers: {names}."
            ) from None

    def rescale(self, image: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float32]:
        """As `predict_instances` does."""
        scale = self.input.scale
        if min(image.shape[1:]) * scale < 1:
            raise ImageError(
                f"an image of {image.shape[1]} x {image.shape[2]} pixels is too small for scale "
                f"{scale:g}: nothing would be left of it."
            )
        return np.asarray(ndimage.zoom(image, (1, scale, scale), order=1), np.float32)

    def decode(self, outputs: Mapping[str, Tensor], size: tuple[int, int]) -> NDArray[np.int32]:
        """Instances at the scale of the image, by StarDist's own suppression and polygons."""
        scale = self.input.scale
        prob = self.outputs["prob"].values(outputs["prob"])[0]
        dist = outputs["dist"].permute(1, 2, 0)
        grid, multiples = self.port.grid, self.multiples
        if self.port.row_first:  # these are StarDist's own rays in the transposed image
            prob, dist = prob.T, dist.transpose(0, 1)
            grid, multiples, size = grid[::-1], multiples[::-1], size[::-1]
        sides = [n * g for n, g in zip(prob.shape, grid, strict=True)]
        # the border is that of the padded image, whose padding has been cut off again
        far = [
            max(BORDER - -n % (m // g), 0)
            for n, m, g in zip(prob.shape, multiples, grid, strict=True)
        ]
        points, scores, distances = non_maximum_suppression(
            dist.clamp(1e-3, sum(sides)).numpy(),
            prob.numpy(),
            grid=grid,
            b=tuple((BORDER, b) for b in far),
            nms_thresh=self.nms_thresh,
            prob_thresh=self.prob_thresh,
        )
        labels: NDArray[np.int32] = polygons_to_label(
            distances, points / scale, shape=size, prob=scores, scale_dist=(1 / scale, 1 / scale)
        )
        return np.ascontiguousarray(labels.T if self.port.row_first else labels)

    def save(self, path: str | Path) -> None:
        """The folder that StarDist itself opens; of a port, its state dict.

        Raises:
            ModelError: the path is there already or in no folder, or a weight is not finite.
        """
        if self._config is None:
            write_state(self.model, Path(path).expanduser().absolute())
            return
        assert isinstance(self.model, StarDist2D)
        thresholds = {"prob": self.prob_thresh, "nms": self.nms_thresh}
        told = None if self.input == type(self).input else self.input
        model = StarDistModel(self.model, self._config, thresholds, told)
        write_model(model, Path(path).expanduser().absolute())

    def usage(self, path: Path) -> str | None:
        if self._config is None:
            return None
        path = path.absolute()
        opened = f"StarDist2D(None, name={path.name!r}, basedir={str(path.parent)!r})"
        how = self.input
        if how == Input(low=1.0, high=99.8):
            return opened
        normalized = f"normalize(image, {how.low:g}, {how.high:g}, axis=(0, 1))"
        scale = "" if how.scale == 1 else f", scale={how.scale:g}"
        kind = "inverted " * how.invert + "gray" * how.gray
        comment = f"  # image: {kind.strip()}" if kind else ""
        return f"{opened}.predict_instances({normalized}{scale}){comment}"

    def check(self, images: Sequence[LazyImage]) -> None:
        """Check the conventions of a port on a few images.

        Raises:
            ModelError: the network gives logits or rays in another way than its `Port` says.
        """
        if self._config is None:
            self.port.check(self._predictions(images[:CHECKED]))

    def _predictions(
        self, images: Sequence[LazyImage]
    ) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Name and outputs of each image that can be used, one at a time."""
        for image in images:
            with suppress(ImageError):  # named where it is used
                prepared = prepare(self, image.read(), str(image), image.whole())
                yield str(image), predict(self, self.model, prepared).outputs


def _official(model: str | Path | nn.Module) -> StarDistModel:
    if isinstance(model, str | Path):
        return read_model(str(model))
    if not isinstance(model, StarDist2D):
        raise ModelError(
            f"a {type(model).__name__} is no StarDist2D of this package: say how it gives its "
            "outputs, with port=Port(...)."
        )
    return StarDistModel(model, model.architecture.to_config(), DEFAULT_THRESHOLDS)

"""The adapter for segmentation_models_pytorch and for networks that work alike."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import segmentation_models_pytorch as smp
import torch
from numpy.typing import NDArray
from segmentation_models_pytorch.base.hub_mixin import SMPHubMixin
from torch import Tensor, nn

from selfadapt import (
    Adapter,
    ConfigError,
    Input,
    ModelError,
    NetworkSource,
    OutputSpec,
    SelfAdaptError,
    normalize_standard,
)
from selfadapt_smp._decode import Decode
from selfadapt_smp._files import SIDECAR, open_network, torchscript_warnings_off
from selfadapt_smp._names import head_names, parse_heads
from selfadapt_smp._source import source_of

logger = logging.getLogger(__name__)

DEMO_MODEL = Path(__file__).with_name("demo_model")
"""Folder of the bundled network, as SMP's `save_pretrained` lays it out."""
TRANSFORMS = "albumentations_config_eval.json"
"""What SMP's documentation saves beside a network: how images were transformed for it."""

TRIED = 64
"""Side of the image that a network from a file is tried on, in pixels."""
NORMALIZATIONS = ("percentile", "standard", "none")


class SmpAdapter(Adapter):
    """Any SMP model, or another network with one output `[B, channels, H, W]`.

    Args:
        model: an SMP model, any `nn.Module`, or a TorchScript module.
        outputs: the heads in the order of the network's channels: an `OutputSpec`, or names
            such as "foreground,distance" (`foreground`, `boundary`: one logit each; `distance`:
            one value; `classes:3`: softmax). With names, whether the network gives probabilities
            or logits is read off the activation at its end, where SMP has built it.
        normalize: "percentile" (1 and 99 to 0 and 1), "standard" (zero mean, unit variance) or
            "none".
        scale: pixels of the network per pixel of the image: 0.5 where objects are twice as large
            as those that the network knows. None: 1, unless `selfadapt.calibrate` finds another;
            "auto": it must.
        gray: whether colour becomes luminance.
        invert: whether dark objects are made bright. None and "auto" as for scale.
        embedding: dotted name of the bottleneck module; default `encoder`. TorchScript runs its
            submodules where no hook reaches, so such networks have no bottleneck.
        channels: number of channels that the network takes; default: read off its first layer.
        size_multiple: sides are padded to multiples of this; default 32, or the encoder's stride.
        fixed_size: set where the network takes square tiles of this side only, as many of those
            with transformers do.
        decode: recipe options, or a function `(outputs, heads) -> int32 [H, W]`.

    Raises:
        ModelError: the network has no such layer, or is no network.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: OutputSpec | str,
        *,
        normalize: Literal["percentile", "standard", "none"] = "percentile",
        scale: float | Literal["auto"] | None = None,
        gray: bool | None = None,
        invert: bool | Literal["auto"] | None = None,
        embedding: str = "encoder",
        channels: int | None = None,
        size_multiple: int | None = None,
        fixed_size: int | None = None,
        decode: Any = None,
    ) -> None:
        self.model = model
        if isinstance(outputs, str):
            outputs = parse_heads(outputs, activated=own_activation(model) or False)
        self.outputs = outputs
        if normalize not in NORMALIZATIONS:
            raise ConfigError(
                f"normalize={normalize!r} is not allowed: it must be "
                f"{' or '.join(map(repr, NORMALIZATIONS))}."
            )
        self.normalize = normalize
        if normalize != "percentile":
            self.adjustable = self.adjustable - {"low", "high"}
        self.say(scale=scale, invert=invert, gray=gray)
        self.scripted = isinstance(model, torch.jit.ScriptModule)
        self.channels_last = isinstance(model, smp.base.SegmentationModel)
        self.embedding = embedding
        if not self.scripted:
            self.embedding_module(model)
        self.channels = channels if channels is not None else _input_channels(model)
        for name, value in (("size_multiple", size_multiple), ("fixed_size", fixed_size)):
            if value is not None and not (isinstance(value, int) and value > 0):
                raise ConfigError(f"{name}={value!r} is not allowed: give pixels, 1 or more.")
        stride = 1 if fixed_size else getattr(getattr(model, "encoder", None), "output_stride", 32)
        self.size_multiple = size_multiple or int(stride)
        self.fixed_size = fixed_size
        self._decode = decode if decode is not None else Decode()

    def forward(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        raw = model(images)
        if isinstance(raw, tuple | list):  # SMP with aux_params: masks, labels
            raw = raw[0]
        return self.outputs.split(raw)

    def embedding_module(self, model: nn.Module) -> nn.Module | None:
        if self.scripted:
            return None
        try:
            return model.get_submodule(self.embedding)
        except AttributeError:
            names = ", ".join(name for name, _ in model.named_children())
            raise ModelError(
                f"the network has no layer {self.embedding!r} to take the embedding from; give "
                f"embedding=..., one of its layers: {names}."
            ) from None

    @property
    def can_decode(self) -> bool:
        return not isinstance(self._decode, Decode) or Decode.knows(list(self.outputs))

    def decode(self, outputs: Mapping[str, Tensor], size: tuple[int, int]) -> NDArray[np.int32]:
        if not self.can_decode:
            raise ModelError(
                f"there is no recipe from the heads {list(self.outputs)} to instances: give "
                "decode=..., a function (outputs, heads) -> int32 [H, W]."
            )
        instances: NDArray[np.int32] = self._decode(outputs, self.outputs)
        return instances

    def normalise(self, image: NDArray[Any], whole: NDArray[Any]) -> NDArray[Any]:
        if self.normalize == "percentile":
            return super().normalise(image, whole)
        return normalize_standard(image, whole) if self.normalize == "standard" else image

    def save(self, path: str | Path) -> None:
        """SMP: the folder of `save_pretrained`; TorchScript: its file; else a state dict."""
        if isinstance(self.model, SMPHubMixin):
            self.model.save_pretrained(path)
            (Path(path) / SIDECAR).write_text(json.dumps(self._options(), indent=2))
        elif self.scripted:
            with torchscript_warnings_off():
                torch.jit.save(self.model, str(path))
        else:
            torch.save(self.model.state_dict(), path)

    def source(self) -> NetworkSource | None:
        return source_of(self.model, [head.channels for head in self.outputs.values()])

    def _options(self) -> dict[str, Any]:
        """What `from_pretrained` must know to open the saved folder alike."""
        options: dict[str, Any] = {
            "normalize": self.normalize,
            "input": self.input.to_dict(),
            "embedding": self.embedding,
            "channels": self.channels,
            "size_multiple": self.size_multiple,
            "fixed_size": self.fixed_size,
        }
        if (heads := head_names(self.outputs)) is not None:
            options |= heads
        if isinstance(self._decode, Decode):
            options |= asdict(self._decode)
        return options

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: str,
        *,
        heads: str | None = None,
        activated: bool | None = None,
        normalize: Literal["percentile", "standard", "none"] | None = None,
        scale: float | Literal["auto"] | None = None,
        gray: bool | None = None,
        invert: bool | Literal["auto"] | None = None,
        embedding: str | None = None,
        channels: int | None = None,
        size_multiple: int | None = None,
        fixed_size: int | None = None,
        threshold: float | None = None,
        min_size: int | None = None,
        min_distance: int | None = None,
        smoothing: float | None = None,
        trust_torchscript: bool = False,
    ) -> Self:
        """Open "demo" (bundled), a folder of SMP's `save_pretrained`, or a TorchScript file.

        Options that are not given come from the folder's selfadapt.json, where there is one.

        Args:
            model: "demo", a folder or a file.
            heads: the network's channels in order, e.g. "foreground,distance".
            activated: the network gives probabilities, not logits; default: as its folder says.
            normalize: "percentile", "standard" or "none".
            scale: rescale the images by this for the network; "auto": as found in them.
            gray: turn colour into luminance.
            invert: make dark objects bright; "auto": as found in the images.
            embedding: dotted name of the bottleneck module.
            channels: number of channels that the network takes.
            size_multiple: sides that the network takes are multiples of this.
            fixed_size: the network takes square tiles of this side only.
            threshold: foreground is where its probability exceeds this.
            min_size: smaller instances, in pixels, are dropped.
            min_distance: least distance of two peaks, in pixels.
            smoothing: Gaussian smoothing of the distance, in pixels.
            trust_torchscript: needed to open a TorchScript file: it is a program, which may do
                whatever you may do on this machine. Say so of files whose makers you trust only.

        Raises:
            ModelError: the file is missing, none of these or not trusted, or heads are not said.
        """
        given = {
            name: value
            for name, value in locals().items()
            if name not in ("cls", "model", "trust_torchscript", "__class__") and value is not None
        }
        network, options = open_network(
            DEMO_MODEL if model == "demo" else Path(model), trusted=trust_torchscript
        )
        options |= given
        if "normalize" not in options and (Path(model) / TRANSFORMS).exists():
            logger.warning(
                "%s of %r says how images went into the network, and is not read: percentiles 1 "
                "and 99 become 0 and 1. Where that is not its way, give normalize "
                '("standard", "none").',
                TRANSFORMS,
                model,
            )
        if "heads" not in options:
            raise ModelError(
                f"{model!r} does not say which channel is which head: give heads, e.g. "
                "heads='foreground,distance' (shell: --heads foreground,distance)."
            )
        told = options.pop("activated", False)
        if activated is None:  # a folder of before may say that of a sigmoid it does not know of
            told = told or own_activation(network) or False
        outputs = parse_heads(options.pop("heads"), activated=told)
        saved = options.pop("input", None)
        recipe = {name: options.pop(name) for name in asdict(Decode()) if name in options}
        try:
            adapter = cls(network, outputs, decode=Decode(**recipe), **options)
        except TypeError as error:
            raise ModelError(f"{SIDECAR} of {model!r} is damaged: {error}.") from None
        if saved is not None:  # what is said now comes first
            adapter.input = replace(Input.from_dict(saved), **adapter.said)
            adapter.settled |= {"scale", "invert", "gray"} - adapter.auto
        adapter._run_once(model)
        return adapter

    def _run_once(self, source: str) -> None:
        """Raise ModelError where a network that was read from a file cannot be run."""
        if self.channels is None:
            return
        sides = [TRIED, self.tile]  # some need more than the least
        sides = [side + -side % self.side_multiple for side in sides]
        failed: Exception | None = None
        for side in [self.fixed_size] if self.fixed_size else sides:
            try:
                with torch.no_grad():
                    self.forward(self.model.eval(), torch.zeros(1, self.channels, side, side))
                return
            except SelfAdaptError:
                raise
            except Exception as error:
                failed = error
        assert failed is not None
        raise ModelError(
            f"the network of {source!r} cannot be run on an image of {self.channels} channel(s), "
            f"{side} x {side} ({_last_line(failed)}): channels, size_multiple and fixed_size say "
            "what it takes; it must take squares, since quarter turns exchange the sides."
        )


def _last_line(error: Exception) -> str:
    """Of an error of torch, whose TorchScript puts a traceback before it."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def own_activation(model: nn.Module) -> bool | None:
    """Whether a network of SMP gives probabilities; None of another one, which does not say it.

    Raises:
        ModelError: what it gives is neither probabilities nor logits.
    """
    last = getattr(model, "segmentation_head", None)
    last = last[-1] if isinstance(last, nn.Sequential) else last
    kind = getattr(last, "activation", None)
    kind = getattr(kind, "activation", kind)  # SMP's wrapper
    if kind is None or isinstance(kind, nn.Identity):
        return None if kind is None else False
    if not isinstance(kind, nn.Sigmoid | nn.Softmax):
        raise ModelError(
            f"the network ends in {type(kind).__name__}, which gives neither logits nor "
            "probabilities: load it with activation=None."
        )
    return True


def _input_channels(model: nn.Module) -> int | None:
    """Channels of the first layer that says so; None if none does.

    A position embedding has four axes, too, and comes before the layers.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4 and name.endswith("weight"):
            return parameter.shape[1]
    return None

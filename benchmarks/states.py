"""Images made worse and networks made other, on purpose: what `judge.py` is scored on."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.transform import resize
from torch import Tensor, nn

from selfadapt import Adapter, Binary, Categorical, Config, Crops, SelfAdaptation, adabn
from selfadapt._batch_norm import batch_norms, mixed

Array = NDArray[Any]


def _noise(image: Array, level: float, rng: np.random.Generator) -> Array:
    return image + rng.normal(0, level * _span(image), image.shape)


def _photons(image: Array, level: float, rng: np.random.Generator) -> Array:
    low = np.percentile(image, 1)
    mean = np.clip((image - low) / _span(image), 0, None) * level + 2
    return rng.poisson(mean).astype(np.float32)


def _span(image: Array) -> float:
    low, high = np.percentile(image, (1, 99.8))
    return max(float(high - low), 1e-6)


def _uneven(image: Array, level: float, _: Any) -> Array:
    ramp = (
        np.linspace(0, 1, image.shape[2])[None, None] * np.linspace(0.3, 1, image.shape[1])[:, None]
    )
    low = np.percentile(image, 1)
    return (image - low) * (1 - level * ramp) + level * 0.5 * _span(image) * ramp + low


def _jpeg(image: Array, level: float, _: Any) -> Array:
    low = np.percentile(image, 0.5)
    scaled = np.clip((image[0] - low) / _span(image) * 255, 0, 255).astype(np.uint8)
    packed = iio.imwrite("<bytes>", scaled, extension=".jpg", quality=int(level))
    return np.asarray(iio.imread(io.BytesIO(packed), extension=".jpg"), np.float32)[None]


def _stripes(image: Array, level: float, rng: np.random.Generator) -> Array:
    return image + level * _span(image) * rng.normal(0, 1, (1, image.shape[1], 1))


def _resampled(image: Array, level: float, _: Any) -> Array:
    small = resize(
        image[0], [max(round(n / level), 8) for n in image.shape[1:]], anti_aliasing=True
    )
    return resize(small, image.shape[1:], order=1)[None]


CORRUPTIONS: dict[str, tuple[Callable[..., Array], tuple[float, ...]]] = {
    "defocus": (lambda i, level, _: ndimage.gaussian_filter(i, (0, level, level)), (1.5, 3, 6)),
    "noise": (_noise, (0.05, 0.15, 0.4)),
    "photons": (_photons, (60, 20, 5)),
    "low contrast": (
        lambda i, level, rng: np.round((i - i.min()) / _span(i) * level), (32, 12, 5),
    ),
    "uneven light": (_uneven, (0.4, 0.7, 0.95)),
    "saturation": (
        lambda i, level, _: np.minimum(i, np.percentile(i, level)), (95, 85, 70),
    ),
    "jpeg": (_jpeg, (30, 12, 4)),
    "stripes": (_stripes, (0.03, 0.1, 0.3)),
    "resampled": (_resampled, (2, 3.5, 6)),
    "pure noise": (lambda i, level, rng: rng.normal(100, 10, i.shape), (1,)),
    "black": (lambda i, level, rng: np.zeros_like(i) + rng.poisson(0.2, i.shape), (1,)),
}  # fmt: skip
"""In the manner of ImageNet-C (Hendrycks and Dietterich 2019), levels from mild to severe."""


def shifted(adapter: Adapter, delta: float) -> Adapter:
    """The adapter with `delta` added to the first logit of its classification heads."""

    class Shifted(type(adapter)):  # type: ignore[misc]
        def forward(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
            return _shift(self, super().forward(model, images), delta)

        def forward_tiled(self, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
            if "forward_tiled" in vars(type(adapter)):  # it does not call `forward`
                return _shift(self, super().forward_tiled(model, image), delta)
            return super().forward_tiled(model, image)

    changed = adapter.with_model(adapter.model)
    changed.__class__ = Shifted
    return changed


def _shift(adapter: Adapter, outputs: dict[str, Tensor], delta: float) -> dict[str, Tensor]:
    moved = dict(outputs)
    for name, head in adapter.outputs.items():
        if isinstance(head, Binary):
            raw = outputs[name]
            moved[name] = raw + delta if head.logits else (raw.logit(1e-6) + delta).sigmoid()
        elif isinstance(head, Categorical):  # class 0 is background
            moved[name] = outputs[name].clone()
            moved[name].select(-3, 0).sub_(delta)
    return moved


@torch.no_grad()
def noisy(adapter: Adapter, share: float, seed: int) -> Adapter:
    """Gaussian noise in all weights, `share` of the spread of their tensor."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(adapter.model)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.add_(share * parameter.std() * drawn)
    return adapter.with_model(model)


@torch.no_grad()
def corrupted_statistics(adapter: Adapter, share: float, seed: int) -> Adapter:
    """Running means moved by `share` standard deviations at random, variances by as much."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(adapter.model)
    for name, buffer in model.named_buffers():
        drawn = torch.randn(buffer.shape, generator=generator)
        if name.endswith("running_var"):
            mean = model.get_buffer(name.replace("running_var", "running_mean"))
            mean.add_(share * buffer.sqrt() * torch.randn(buffer.shape, generator=generator))
            buffer.mul_((share * drawn).exp())
    return adapter.with_model(model)


def states(adapter: Adapter, images: Any, seed: int) -> Iterator[tuple[str, Adapter]]:
    """The network changed without training: logits, weights, batch-norm statistics."""
    for delta in (-3.0, -1.0, 1.0, 3.0):
        yield f"shift {delta:+g}", shifted(adapter, delta)
    scripted = isinstance(adapter.model, torch.jit.ScriptModule)
    for share in (0.02, 0.08, 0.2):
        if not scripted:
            yield f"noise {share:g}", noisy(adapter, share, seed)
    if batch_norms(adapter.model) and not scripted:
        yield "statistics corrupted 0.3", corrupted_statistics(adapter, 0.3, seed)
        measured = adabn(adapter, Crops(adapter, images, Config(seed=seed)).batches(0, 32))
        yield "statistics half", adapter.with_model(mixed(adapter.model, measured, 0.5))
        yield "statistics all", adapter.with_model(measured)


RUNS: dict[str, dict[str, Any]] = {
    "run": {"batch_norm": "source"},
    "bold": {"batch_norm": "batch"},
    "too far": {"batch_norm": "source", "learning_rate": 3e-3, "l2sp": 0.0},
}


def trained(adapter: Adapter, images: Any, kind: str, seed: int) -> Iterator[tuple[str, Adapter]]:
    """Looks of a run of the method, as it is, with statistics of each batch, or at a rate that is
    too high."""
    slow = type(adapter).__name__ == "DeepSea"
    small = {"iterations": 60, "batch_size": 2, "crop": 96} if slow else {"iterations": 120}
    marks = (30, 60) if slow else (60, 120)
    config = Config(seed=seed, **RUNS[kind], **small)
    run = SelfAdaptation(adapter, config)
    for _ in run.iterate(Crops(adapter, images, config).batches(0, config.iterations)):
        if run.iteration in marks:
            yield f"{kind} {run.iteration}", adapter.with_model(run.exported)

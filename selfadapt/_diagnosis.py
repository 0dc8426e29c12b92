"""Is the network what the adapter says? Asked of the trained network itself, before any training.

A trained network says much the same of an image and of its flipped and turned copies. So heads
whose channels mix under a flip (vectors, rays) can be tried as declared and otherwise; layers that
normalise remember what they have seen; and activations show in the range of what comes out.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfadapt._adapter import Adapter
from selfadapt._batch_norm import BatchNorm, batch_norms
from selfadapt._crops import evenly
from selfadapt._errors import ImageError
from selfadapt._heads import Head
from selfadapt._images import open_windows
from selfadapt._input import prepare
from selfadapt._masks import refuse_masks
from selfadapt._network import check_network
from selfadapt._predict import evaluating, predict
from selfadapt._spec import OutputSpec
from selfadapt._symmetry import D4, Symmetry
from selfadapt._tiles import pad_far_side

MOST, SIDE = 4, 256
"""Images that are looked at, and about how many pixels a side."""
UNLIKE = 0.5
"""Views of a head that disagree more than that do not find what they were trained to find."""
BETTER = 0.7
"""Another reading of the channels is the right one if views disagree by less than this share."""
FAR = 3.0
"""Mean of the first normalising layer, in its own trained standard deviations."""
WIDE = 10.0
"""Factor between its trained variance and the one it meets."""
NO_MEMORY = (
    "whether images were normalised like this in training: the network has no batch norm, which "
    "would remember it."
)


@dataclass(frozen=True)
class HeadDiagnosis:
    """What was found of one head.

    Attributes:
        low: least raw output.
        high: greatest one.
        disagreement: of flipped and turned views with the image itself: root mean square of the
            difference of values, as a share of their spread over the image. 0: none; about 1.4:
            as of unrelated maps.
        otherwise: the same, by what the channels might be instead.
    """

    low: float
    high: float
    disagreement: float
    otherwise: Mapping[str, float]


@dataclass(frozen=True)
class Diagnosis:
    """What `check_adapter` has found.

    Attributes:
        heads: by name.
        prepared: least and greatest value of what goes into the network.
        findings: what speaks against the adapter, a sentence each; empty if nothing does.
        unknown: what the network could not be asked, alike.
    """

    heads: Mapping[str, HeadDiagnosis]
    prepared: tuple[float, float]
    findings: Sequence[str]
    unknown: Sequence[str] = ()

    def __str__(self) -> str:
        lines = ["images go in with values from {:.3g} to {:.3g}".format(*self.prepared)]
        for name, head in self.heads.items():
            line = f"{name}: values from {head.low:.3g} to {head.high:.3g}"
            line += f"; views disagree by {head.disagreement:.2f} of their spread"
            for what, value in head.otherwise.items():
                line += f", {value:.2f} if {what}"
            lines.append(line)
        lines += [f"Not known: {what}" for what in self.unknown]
        return "\n".join([*lines, *(f"Finding: {finding}" for finding in self.findings)])


def check_adapter(adapter: Adapter, images: Any, *, channel_axis: int | None = None) -> Diagnosis:
    """Ask a trained network, without labels, whether it is what its adapter says.

    It finds channels that are declared in another order than the network's (flows with x first,
    rays the other way round), logits taken for probabilities, and images that are normalised
    otherwise than in training (where the network has batch norm); sides of multiples that the
    network does not take raise. Use images that it works on: on others nothing may be found at
    all, which says nothing about the adapter.

    Args:
        adapter: around the trained network.
        images: any source that `open_images` takes; up to four of them are looked at.
        channel_axis: see `open_images`.

    Raises:
        SelfAdaptError: the images cannot be used, or the network cannot be run on them.
    """
    check_network(getattr(adapter, "model", None))
    sources = open_windows(images, channel_axis=channel_axis)
    refuse_masks(sources)
    crops = []
    for source in evenly(sources, MOST, blank_images=False):
        pixels = prepare(adapter, source.read(), str(source), source.whole())
        crops.append(_square(adapter, pixels))
    if not crops:
        raise ImageError("all images are constant: there is nothing to see in them.")
    model, spec = adapter.model, adapter.outputs
    predict(adapter, model, crops[0])  # the bottleneck and `decode`, whose errors are sentences
    device, kind = next(model.parameters()).device, next(model.parameters()).dtype
    with torch.no_grad(), evaluating(model):

        def run(image: Tensor) -> Mapping[str, Tensor]:
            batch = image[None].to(device, kind, copy=True)
            outputs = adapter.forward(model, batch)
            spec.check(outputs, (image.shape[1], image.shape[2]))
            return {name: output[0].float().cpu() for name, output in outputs.items()}

        views = [
            {g: run(g.move(crop, spec.grid).contiguous()) for g in spec.symmetries}
            for crop in crops
        ]
        findings = list(_first_norm(model, crops, run))
    heads = {name: _diagnose(spec, name, views) for name in spec}
    for name, found in heads.items():
        findings += _findings(spec[name], name, found, views)
    low, high = min(float(crop.min()) for crop in crops), max(float(crop.max()) for crop in crops)
    unknown = () if batch_norms(model) else (NO_MEMORY,)
    return Diagnosis(heads, (low, high), findings, unknown)


def _square(adapter: Adapter, image: Tensor) -> Tensor:
    """The middle of a prepared image, in a size that the network takes.

    An odd number of multiples: a network that needs larger ones than the adapter says fails.
    """
    step = adapter.side_multiple
    side = adapter.fixed_size or (SIDE // step // 2 * 2 + 1) * step
    image = pad_far_side(image, (side, side), adapter.padding)
    top, left = ((n - side) // 2 for n in image.shape[-2:])
    return image[:, top : top + side, left : left + side].contiguous()


Views = Mapping[Symmetry, Mapping[str, Tensor]]
"""Raw outputs of each flipped or turned copy of one crop, by head."""


def _raw(name: str, views: Sequence[Views]) -> Tensor:
    """All raw outputs of a head for the crops as they are."""
    return torch.cat([each[D4[0]][name].flatten() for each in views])


def _diagnose(spec: OutputSpec, name: str, views: Sequence[Views]) -> HeadDiagnosis:
    head = spec[name]
    raw = _raw(name, views)
    return HeadDiagnosis(
        float(raw.min()),
        float(raw.max()),
        _disagreement(spec, name, head, views),
        {what: _disagreement(spec, name, other, views) for what, other in head.readings().items()},
    )


def _disagreement(spec: OutputSpec, name: str, reading: Head, views: Sequence[Views]) -> float:
    """Root mean square, as a share of the spread; NaN where a head gives one value everywhere."""
    head = spec[name]
    differs = spread = 0.0
    varies = False
    for each in views:
        own = head.values(each[D4[0]][name])
        varies |= bool(own.min() < own.max())  # a spread would be of rounding alone
        inside = torch.ones_like(own[:1])
        if head.within is not None:  # elsewhere it was not trained to give anything
            other = spec[head.within]
            inside = other.inside(other.values(each[D4[0]][head.within]))
        share = inside / inside.sum().clamp(min=1e-6)
        mean = (share * own).sum((-2, -1), keepdim=True)
        for g, outputs in each.items():
            if g != D4[0] and g in reading.symmetries:
                moved = g.inverse.move(head.values(outputs[name]), spec.step(name))
                back = reading.act(g.inverse, moved)
                differs += float((share * (back - own).square()).sum())
                spread += float((share * (own - mean).square()).sum())
    return math.sqrt(differs / spread) if varies and spread > 0 else math.nan


def _findings(head: Head, name: str, found: HeadDiagnosis, views: Sequence[Views]) -> Iterator[str]:
    if objection := head.objection(_raw(name, views)):
        yield f"head {name!r} {objection}"
    if math.isnan(found.disagreement):
        yield f"head {name!r} gives one value everywhere: nothing is found in these images."
        return
    if found.disagreement < UNLIKE:
        return
    what, least = min(found.otherwise.items(), key=lambda item: item[1], default=("", math.inf))
    if least < BETTER * found.disagreement:
        yield (
            f"head {name!r}: flipped and turned views disagree by {found.disagreement:.2f} of its "
            f"spread as it is declared, and by {least:.2f} if {what}."
        )
    else:
        yield (
            f"head {name!r}: flipped and turned views disagree by {found.disagreement:.2f} of its "
            "spread: its channels are others than declared, or nothing is found in these images."
        )


OTHERWISE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "255 times as large": lambda image: 255 * image,
    "255 times as small": lambda image: image / 255,
    "of mean 0 and variance 1": lambda image: (image - image.mean()) / (image.std() + 1e-6),
    "from 0 to 1": lambda image: (image - image.min()) / (image.max() - image.min() + 1e-6),
    "the negative": lambda image: image.max() + image.min() - image,
}
"""Ways in which images may have gone in in training."""


def _first_norm(
    model: nn.Module, crops: Sequence[Tensor], run: Callable[[Tensor], Any]
) -> Iterator[str]:
    """What the first layer that keeps statistics of its input says of the images."""
    layers = batch_norms(model)
    if not layers:
        return
    met: list[Tensor] = []
    handle = layers[0].register_forward_pre_hook(lambda _, inputs: met.append(inputs[0].detach()))

    def gap(change: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        met.clear()
        for crop in crops:
            run(change(crop))
        return _gap(layers[0], torch.cat([x.transpose(0, 1).flatten(1) for x in met], 1))

    try:
        shift, factor = gap(lambda image: image)
        if shift < FAR and 1 / WIDE < factor < WIDE:
            return
        gaps = {"": (shift, factor)} | {what: gap(change) for what, change in OTHERWISE.items()}
    finally:
        handle.remove()
    told = (
        f"the network's first batch norm meets other values than in training: their mean is "
        f"{shift:.1f} standard deviations off, their variance {factor:.3g} times as large"
    )
    best = min(gaps, key=lambda what: gaps[what][0] + abs(math.log(gaps[what][1])))
    yield f"{told}; it would fit better if they were {best}." if best else f"{told}."


def _gap(layer: BatchNorm, values: Tensor) -> tuple[float, float]:
    """Of the channels `[C, N]` at the upper quartile: shift of the mean, factor of the variance."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    variance = layer.running_var.float() + layer.eps
    values = values.float()
    shift = (values.mean(1) - layer.running_mean.float()).abs() / variance.sqrt()
    factor = (values.var(1) + layer.eps) / variance
    at = round(0.75 * (len(factor) - 1))
    return float(shift.sort().values[at]), float(factor[factor.log().abs().argsort()[at]])

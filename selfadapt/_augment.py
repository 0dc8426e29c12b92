"""Strong augmentation of the student's input: intensity, contrast, sharpness, noise. No geometry.

The usual libraries clamp to [0, 1], take one or three channels only, draw one set of parameters
per batch or take no generator; normalised microscopy images need none of that.
"""

import math
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from selfadapt import _ranks as ranks
from selfadapt._config import Config


def augment(images: Tensor, config: Config, generator: Generator) -> Tensor:
    """Strongly augmented copy of `images`, float `[B, C, H, W]`, C any number.

    Every sample draws its own parameters; all its channels share contrast and sharpness, and each
    has its own shift. As many copies are sharpened as are blurred: from blurred ones alone a
    student learns to see more in everything. As in a microscope, noise comes last: the copy has 1
    to 1 + `noise` times the noise that its sample has, blurred or not (or what sharpening gave it,
    if that is more, up to twice). One setting thus serves clean and noisy images.
    Shifts are measured in the standard deviation of the whole batch, per channel, so that one
    setting serves images of any scale; an empty channel stays empty. Values are not clamped.
    """
    batch, channels = images.shape[:2]
    joint, ours = batch * ranks.count(), ranks.slice_of(batch)
    like: Any = {"generator": generator, "device": images.device, "dtype": images.dtype}

    def uniform(*shape: int) -> Tensor:  # as for the joint batch of all ranks
        return torch.rand((joint, *shape), **like)[ours]

    unit = config.strength * _spread(images)
    out = _refocus(images, config.strength * config.blur, 2 * uniform() - 1)
    mean = out.mean((2, 3), keepdim=True)
    gain = 1 + config.strength * config.contrast * (2 * uniform(1, 1, 1) - 1)
    shift = unit * config.brightness * (2 * uniform(channels, 1, 1) - 1)
    out = out * gain + (mean * (1 - gain) + shift)
    wanted = noise_level(images) * (1 + config.strength * config.noise * uniform(1, 1, 1))
    missing = (wanted.square() - noise_level(out).square()).clamp(min=0).sqrt()
    noise = torch.randn((joint, *images.shape[1:]), **like)[ours]
    return out.addcmul_(noise, missing)


def _spread(images: Tensor) -> Tensor:
    """Standard deviation per channel, `[1, C, 1, 1]`, of the joint batch of all ranks."""
    if ranks.count() == 1:
        return images.std((0, 2, 3), keepdim=True)
    pixels = images.double()
    center = ranks.mean(pixels.mean((0, 2, 3), keepdim=True))
    square = ranks.mean((pixels - center).square().mean((0, 2, 3), keepdim=True))
    number = ranks.count() * images[:, 0].numel()
    return (square * number / (number - 1)).sqrt().to(images.dtype)


def noise_level(images: Tensor) -> Tensor:
    """Standard deviation of the noise in each channel, `[B, C, 1, 1]`, of images `[B, C, H, W]`.

    The mean response of a filter that plane and evenly curved surfaces do not answer to (Immerkaer
    1996, "Fast noise variance estimation"). Sharp structure counts as noise.
    """
    second = images.new_tensor([1.0, -2.0, 1.0])
    kernel = (second[:, None] * second)[None, None]
    response = functional.conv2d(images.flatten(0, 1)[:, None], kernel).abs().mean((1, 2, 3))
    return (response * math.sqrt(math.pi / 2) / 6).view(*images.shape[:2], 1, 1)


def _refocus(images: Tensor, largest: float, amount: Tensor) -> Tensor:
    """Blur (`amount[b]` > 0) or sharpen sample b, by a Gaussian of largest * |amount[b]| pixels.

    Sharpening adds what blurring would take away. Edges are replicated.
    """
    radius = math.ceil(2 * largest)
    if radius == 0:
        return images
    batch, channels, height, width = images.shape
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    sigma = (largest * amount.abs()).clamp(min=1e-3).view(-1, 1)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    folded = images.reshape(1, batch * channels, height, width)
    for shape, pad in (((-1, 1, 2 * radius + 1, 1), (0, 0, radius, radius)),
                       ((-1, 1, 1, 2 * radius + 1), (radius, radius, 0, 0))):  # fmt: skip
        folded = functional.pad(folded, pad, mode="replicate")
        folded = functional.conv2d(folded, kernel.view(shape), groups=batch * channels)
    blurred = folded.view_as(images)
    return images + amount.sign().view(-1, 1, 1, 1) * (blurred - images)

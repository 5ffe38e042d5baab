"""Families of inputs that no training set holds, made from one batch.

A table (B, features) has a mean, a deviation and a range for each feature, so that a family is the
same inputs whatever the units are. Images and sequences have one for the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["BASE_FAMILIES", "DATA_FAMILIES", "LATENT_FAMILIES", "InputFamily", "Scope"]

Make = Callable[[Tensor, torch.Generator], Tensor]

BLUR = 1.5  #: pixels, standard deviation


@dataclass(frozen=True)
class Scope:
    """Where a family lies.

    Attributes:
        in_range: whether within the range of the data, so that it decides.
        latent: whether it is made of latents.
    """

    in_range: bool
    latent: bool = False


@dataclass(frozen=True)
class InputFamily:
    """A family of inputs.

    Attributes:
        make: (finite data x, or draws of the base (B, *), generator) -> inputs of that shape.
        scope: where they lie. Only families within the data's range decide a verdict.
        images: whether it needs images (B, C, H, W) of at least 4 x 4 pixels.
    """

    make: Make
    scope: Scope = Scope(in_range=True)
    images: bool = False

    def fits(self, x: Tensor) -> bool:
        """Whether it means something for this data."""
        return not self.images or (x.dim() == 4 and min(x.shape[2:]) >= 4)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device="cpu", dtype=torch.float64).to(like)


def _unit(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device="cpu", dtype=torch.float64).to(like)


def _over_samples(x: Tensor) -> tuple[int, ...]:
    """The dimensions that share one mean, deviation and range."""
    return (0,) if x.dim() == 2 else tuple(range(x.dim()))


def _mean(x: Tensor) -> Tensor:
    return x.mean(_over_samples(x), keepdim=True)


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    dims = _over_samples(x)
    return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)


def gaussian(x: Tensor, generator: torch.Generator) -> Tensor:
    """White noise of the data's mean and deviation, cut at their range."""
    deviation = x.std(_over_samples(x), correction=0, keepdim=True)
    lowest, highest = _range(x)
    return (_mean(x) + deviation * _normal(x, generator)).clamp(lowest, highest)


def uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    """White noise, uniform over the data's range."""
    lowest, highest = _range(x)
    return lowest + (highest - lowest) * _unit(x, generator)


def rademacher(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every value at one of the two ends of its range."""
    lowest, highest = _range(x)
    return torch.where(_unit(x, generator) < 0.5, lowest, highest)


def constant(x: Tensor, generator: torch.Generator) -> Tensor:
    """One share of the range per sample for all its values, evenly spread over the batch."""
    shares = torch.linspace(0, 1, len(x), dtype=x.dtype, device=x.device)
    if len(x) == 1:
        shares = x.new_tensor([0.5])
    lowest, highest = _range(x)
    return (lowest + (highest - lowest) * shares.reshape(-1, *[1] * (x.dim() - 1))).expand_as(x)


def inverted(x: Tensor, generator: torch.Generator) -> Tensor:
    """The negative: lowest + highest - x."""
    lowest, highest = _range(x)
    return lowest + highest - x


def shuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    """The values of every feature in random order over the samples; of an image, over its pixels.

    Either way, what depends on each other is torn apart.
    """
    mixed = 0 if x.dim() == 2 else 1
    flat = x.flatten(1)
    order = torch.rand(flat.shape, generator=generator, device="cpu").argsort(mixed).to(x.device)
    return flat.gather(mixed, order).reshape(x.shape)


def blurred(x: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian blur of 1.5 pixels."""
    reach = min(math.ceil(3 * BLUR), min(x.shape[2:]) - 1)
    offsets = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = (-offsets.square() / (2 * BLUR**2)).exp()
    kernel = kernel / kernel.sum()
    channels = x.shape[1]
    padded = functional.pad(x, [reach] * 4, mode="reflect")
    rows = functional.conv2d(
        padded, kernel.expand(channels, 1, 1, -1).contiguous(), groups=channels
    )
    return functional.conv2d(
        rows, kernel.reshape(-1, 1).expand(channels, 1, -1, 1).contiguous(), groups=channels
    )


def contrast(factor: float) -> Make:
    """Distances from the data's mean multiplied by ``factor``."""
    return lambda x, generator: _mean(x) + factor * (x - _mean(x))


def scale(factor: float) -> Make:
    """x multiplied by ``factor``; of a table, whose zero means nothing, distances from the mean."""

    def make(x: Tensor, generator: torch.Generator) -> Tensor:
        return contrast(factor)(x, generator) if x.dim() == 2 else factor * x

    return make


def hot(temperature: float) -> Make:
    """Draws of the base with their distances from its mean multiplied by the temperature."""
    return lambda z, generator: z.mean(0) + temperature * (z - z.mean(0))


def encoded(z: Tensor, generator: torch.Generator) -> Tensor:
    """The latents of the data themselves."""
    return z


_BEYOND = Scope(in_range=False)

#: made from data
DATA_FAMILIES: dict[str, InputFamily] = {
    "gaussian noise": InputFamily(gaussian),
    "uniform noise": InputFamily(uniform),
    "rademacher noise": InputFamily(rademacher),
    "constant": InputFamily(constant),
    "blurred": InputFamily(blurred, images=True),
    "inverted": InputFamily(inverted),
    "shuffled": InputFamily(shuffled),
    "contrast x 2": InputFamily(contrast(2.0), _BEYOND),
    "contrast x 5": InputFamily(contrast(5.0), _BEYOND),
    "scale x 10": InputFamily(scale(10.0), _BEYOND),
    "scale x 100": InputFamily(scale(100.0), _BEYOND),
}

#: made from the latents of the data
LATENT_FAMILIES: dict[str, InputFamily] = {
    "encoded latents": InputFamily(encoded, Scope(in_range=True, latent=True)),
}

#: made from draws of the model's own base, and beyond it
BASE_FAMILIES: dict[str, InputFamily] = {
    "base, temperature 1.5": InputFamily(hot(1.5), Scope(in_range=False, latent=True)),
    "base, temperature 2": InputFamily(hot(2.0), Scope(in_range=False, latent=True)),
}

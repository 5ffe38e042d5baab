"""Families of inputs that no training set holds, made from one batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["DATA_FAMILIES", "LATENT_FAMILIES", "InputFamily", "Scope"]

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
        make: (finite data x or latents z (B, *), generator) -> inputs of that shape.
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


def gaussian(x: Tensor, generator: torch.Generator) -> Tensor:
    """White noise of the batch's mean and deviation, cut at its range."""
    return (x.mean() + x.std(correction=0) * _normal(x, generator)).clamp(x.min(), x.max())


def uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    """White noise, uniform over the batch's range."""
    return x.min() + (x.max() - x.min()) * _unit(x, generator)


def rademacher(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every value at one of the two ends of the batch's range."""
    return torch.where(_unit(x, generator) < 0.5, x.min(), x.max())


def constant(x: Tensor, generator: torch.Generator) -> Tensor:
    """One value per sample, evenly spread over the batch's range."""
    levels = (
        torch.linspace(0, 1, len(x), dtype=x.dtype, device=x.device)
        if len(x) > 1
        else x.new_tensor([0.5])
    )
    return (
        (x.min() + (x.max() - x.min()) * levels)
        .reshape(-1, *[1] * (x.dim() - 1))
        .expand_as(x)
        .clone()
    )


def inverted(x: Tensor, generator: torch.Generator) -> Tensor:
    """The negative: lowest + highest - x."""
    return x.min() + x.max() - x


def shuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    """The values of every sample in random order, another one for each."""
    order = (
        torch.rand(len(x), x[0].numel(), generator=generator, device="cpu").argsort(1).to(x.device)
    )
    return x.flatten(1).gather(1, order).reshape(x.shape)


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
    """Distances from the batch's mean multiplied by ``factor``."""
    return lambda x, generator: x.mean() + factor * (x - x.mean())


def scale(factor: float) -> Make:
    """x multiplied by ``factor``."""
    return lambda x, generator: factor * x


def normal(temperature: float) -> Make:
    """z ~ N(0, temperature^2 I)."""
    return lambda z, generator: temperature * _normal(z, generator)


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

#: made from latents; hotter than N(0, I) is beyond it
LATENT_FAMILIES: dict[str, InputFamily] = {
    "encoded latents": InputFamily(encoded, Scope(in_range=True, latent=True)),
    "N(0, I), temperature 1.5": InputFamily(normal(1.5), Scope(in_range=False, latent=True)),
    "N(0, I), temperature 2": InputFamily(normal(2.0), Scope(in_range=False, latent=True)),
}

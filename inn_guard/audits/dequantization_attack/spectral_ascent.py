"""Spectral ascent: move to where the inverse amplifies most, whatever the rounding errors are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.dequantization_attack.search import ErrorGradient, Search
from inn_guard.audits.dequantization_attack.sign_ascent import SignAscent, Uphill, unit

__all__ = ["SpectralAscent"]

EVERY = 5  #: steps between two measurements of the true error


@dataclass(frozen=True)
class SpectralAscent(SignAscent):
    """Ascends sigma_max(J^-1) by the growth of one latent nudge w, jointly in x and w.

        |F^-1(F(x) + a w) - x| / a

    One backward pass gives both: its gradient with respect to the nudge is J^-T J^-1 w, the next
    step of a power iteration, and its gradient with respect to x is that of the gain. The nudge is
    long enough to stand out above rounding and short enough to stay within the cube's
    neighbourhood, and vanishes where the errors themselves are that long; then this is the ascent
    on the error. Every fifth step the true error is measured. The steps follow a running mean of
    the gradients' directions, since the nudge lags behind while the steps are long.

    Attributes:
        momentum: weight of the mean so far.
        reach: length of the nudge's image in units of |x|.
    """

    momentum: float | int = 0.8
    reach: float | int = 0.01

    def uphill(self, search: Search, start: Tensor) -> Uphill:
        """The gradient of the growth of a nudge that turns towards what grows most."""
        noise = torch.randn(search.latent.shape, generator=search.generator, device="cpu")
        direction = unit(noise.to(search.latent))
        wanted = self.reach * start.flatten(1).double().norm(dim=1)
        length = 1e-4 * search.latent.flatten(1).double().norm(dim=1)
        step, true, mean = 0, search.error, torch.zeros_like(start)

        def slope(x: Tensor) -> Tensor:
            nonlocal direction, length, step, true, mean
            if step % EVERY == 0:
                true = search.errors(x)
            step += 1
            usable = torch.where(true.to(length.device) < wanted, length, torch.zeros_like(length))
            pulled = search.gradient(x, _along(direction, usable))
            direction = _turned(direction, pulled)
            length = _adjusted(length, pulled.error.to(length.device), wanted)
            mean = self.momentum * mean + unit(pulled.to_x)
            return mean

        return slope


def _along(direction: Tensor, length: Tensor) -> Tensor:
    return direction * length.to(direction.dtype).reshape(-1, *[1] * (direction.dim() - 1))


def _turned(direction: Tensor, pulled: ErrorGradient) -> Tensor:
    """One step of the power iteration; where there is no gradient the direction stays."""
    turned = unit(pulled.to_latent)
    known = (turned != 0).flatten(1).any(1).reshape(-1, *[1] * (turned.dim() - 1))
    return torch.where(known, turned, direction)


def _adjusted(length: Tensor, image: Tensor, wanted: Tensor) -> Tensor:
    """A nudge whose image is nearer to the wanted length; a tenth where that was not finite."""
    factor = torch.where(
        image.isfinite() & (image > 0), wanted / image, torch.full_like(image, 0.1)
    )
    return length * factor.clamp(0.1, 3.0)

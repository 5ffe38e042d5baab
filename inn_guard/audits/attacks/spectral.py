"""Spectral ascent: move to where the inverse amplifies most, whatever this point's own rounding errors are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.attacks.ascent import draw_near, unit
from inn_guard.audits.attacks.search import Pulled, Search

__all__ = ["SpectralAscent"]


@dataclass(frozen=True)
class SpectralAscent:
    """Ascends sigma_max(J^-1) by the growth of one latent nudge w: |F^-1(F(x) + a w) - x| / a, jointly in x and w.

    One backward pass gives both: its gradient with respect to the nudge is J^-T J^-1 w, the next step of a power
    iteration, and its gradient with respect to x is that of the gain. The nudge is long enough to stand out above
    rounding and short enough to stay within the cube's neighbourhood, and vanishes where the errors themselves are
    that long; then this is the ascent on the error. Every fifth step the true error is measured. What is left of
    the budget is drawn around the end, as in Ascent.

    Attributes:
        budget: forward-equivalents per sample.
        share: of the budget for the climb.
        first_step: in half-widths; steps shrink linearly from it to ``last_step``.
        last_step: likewise.
        reach: length of the nudge's image in units of |x|.
        radius: of the draws, in half-widths.
    """

    budget: float | int = 800.0
    share: float | int = 0.5
    first_step: float | int = 0.25
    last_step: float | int = 0.005
    reach: float | int = 0.05
    radius: float | int = 0.02

    def hunt(self, search: Search) -> None:
        """Climb, then draw."""
        cubes, begin = search.cubes, search.spent
        x = cubes.uniform(search.generator)
        direction = unit(torch.randn(search.latent.shape, generator=search.generator, device="cpu").to(search.latent))
        wanted = self.reach * x.flatten(1).double().norm(dim=1)
        length = 1e-4 * search.latent.flatten(1).double().norm(dim=1)
        climb, step, true = self.share * (self.budget - begin), 0, search.error
        while search.spent - begin < climb and search.affords("gradient"):
            left = 1 - (search.spent - begin) / climb
            if step % 5 == 0:
                true = search.errors(x)
            usable = torch.where(true.to(length.device) < wanted, length, torch.zeros_like(length))
            pulled = search.gradient(x, _along(direction, usable))
            direction = _turned(direction, pulled)
            length = _adjusted(length, pulled.error.to(length.device), wanted)
            x = cubes.project(x + (self.first_step * left + self.last_step) * cubes.half * pulled.to_x.sign())
            step += 1
        draw_near(search, x, self.radius)


def _along(direction: Tensor, length: Tensor) -> Tensor:
    return direction * length.to(direction.dtype).reshape(-1, *[1] * (direction.dim() - 1))


def _turned(direction: Tensor, pulled: Pulled) -> Tensor:
    """One step of the power iteration; where there is no gradient the direction stays."""
    turned = unit(pulled.to_latent)
    known = (turned != 0).flatten(1).any(1).reshape(-1, *[1] * (turned.dim() - 1))
    return torch.where(known, turned, direction)


def _adjusted(length: Tensor, image: Tensor, wanted: Tensor) -> Tensor:
    """A nudge whose image is nearer to the wanted length; a tenth where the image was not finite."""
    factor = torch.where(image.isfinite() & (image > 0), wanted / image, torch.full_like(image, 0.1))
    return length * factor.clamp(0.1, 3.0)

"""Sign steps uphill that shrink, then draws around their end; subclasses say what is uphill."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inn_guard.audits.dequantization_attack.search import Search

__all__ = ["SignAscent", "Uphill", "unit"]

TRIAL = 0.1  #: share of the climb after which its gain is measured
SCOUTS = 0.02  #: share of the budget for draws that a gain is measured by
SIGMAS = 2.0  #: standard errors by which the mean logarithm of the errors must grow in the trial
TINY = 1e-300  #: an error of 0 has no logarithm

Uphill = Callable[[Tensor], Tensor]  #: points -> directions uphill, of which the signs count


@dataclass(frozen=True)
class SignAscent(abc.ABC):
    """From a random point of every cube uphill by steps that shrink, then draws around the end.

    Where errors are luck, the rounding of one point, a climb gains nothing and costs draws. So the
    first tenth of it is a trial: its end is compared with draws from anywhere in the cubes, and if
    draws around it are not worse, the rest of the budget is a random search.

    Attributes:
        budget: forward-equivalents per sample.
        share: of the budget for the climb; the rest is for the draws.
        first_step: in half-widths of the cube; steps shrink linearly from it to ``last_step``.
        last_step: likewise.
        radius: of the draws, in half-widths.
    """

    budget: float | int = 800.0
    share: float | int = 0.5
    first_step: float | int = 0.25
    last_step: float | int = 0.005
    radius: float | int = 0.02

    measures: ClassVar[str] = "gradient"  #: what a step costs

    @abc.abstractmethod
    def uphill(self, search: Search, start: Tensor) -> Uphill:
        """What gives the directions along the way that begins at ``start``."""

    def run(self, search: Search) -> None:
        """Climb as far as it pays, then draw where draws are worse: at the end, or anywhere."""
        cubes, begin = search.cubes, search.spent
        budget = self.budget - begin
        anywhere = self._log_errors(search, lambda: cubes.uniform(search.generator))
        x = cubes.uniform(search.generator)
        slope = self.uphill(search, x)
        x = self._climb(search, slope, x, TRIAL * self.share * budget)
        at_end = self._log_errors(search, lambda: cubes.near(x, self.radius, search.generator))
        if _gains(at_end, anywhere):
            # where a short climb has gained on average, a long one may gain more
            x = self._climb(search, slope, x, (1 - TRIAL) * self.share * budget)
            at_end = self._log_errors(search, lambda: cubes.near(x, self.radius, search.generator))
        better = at_end.mean(0) > anywhere.mean(0)
        better = better.to(x.device).reshape(-1, *[1] * (x.dim() - 1))

        def drawn() -> Tensor:
            near = cubes.near(x, self.radius, search.generator)
            return torch.where(better, near, cubes.uniform(search.generator))

        search.errors_of_draws(drawn)

    def _climb(self, search: Search, slope: Uphill, x: Tensor, budget: float) -> Tensor:
        cubes, begin = search.cubes, search.spent
        while search.spent - begin < budget and search.can_afford(self.measures):
            left = 1 - (search.spent - begin) / budget
            step = (self.first_step * left + self.last_step) * cubes.half
            x = cubes.project(x + step * slope(x).sign())
        return x

    def _log_errors(self, search: Search, draw: Callable[[], Tensor]) -> Tensor:
        """Logarithms of the errors at some draws, (draws, B); inf for broken samples."""
        before = search.error
        found = search.errors_of_draws(draw, budget=SCOUTS * self.budget)
        return torch.stack(found or [before]).clamp(min=TINY).log()


def _gains(at_end: Tensor, anywhere: Tensor) -> bool:
    """Whether errors at the end are larger on average, beyond what chance explains."""
    known = at_end.isfinite().all(0) & anywhere.isfinite().all(0)
    if not bool(known.any()):
        return False
    gain, variance = 0.0, 0.0
    for draws, sign in ((at_end[:, known], 1.0), (anywhere[:, known], -1.0)):
        gain += sign * draws.mean().item()
        if len(draws) > 1:
            variance += draws.var(0).mean().item() / draws.numel()
    return gain > SIGMAS * math.sqrt(variance)


def unit(t: Tensor) -> Tensor:
    """Every sample scaled to length 1; zeros stay."""
    length = t.flatten(1).double().norm(dim=1)
    scale = torch.where(length > 0, length, torch.ones_like(length)).reshape(
        -1, *[1] * (t.dim() - 1)
    )
    return (t.double() / scale).to(t.dtype)

"""Sign steps uphill that shrink, then draws around their end; subclasses say what is uphill."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from inn_guard.audits.dequantization_attack.search import Search

__all__ = ["SignAscent", "Uphill", "unit"]

STAGE = 0.1  #: share of the budget after which a climb is judged ...
SHORTEST = 40.0  #: ... but no less than these forward-equivalents, ten gradients
SCOUTS = 0.02  #: share of the budget for the draws by which it is judged ...
FEWEST = 8.0  #: ... but no less than these forward-equivalents, four draws
SIGMAS = 2.0  #: standard errors by which the mean logarithm of the errors must have grown
TINY = 1e-300  #: an error of 0 has no logarithm

Uphill = Callable[[Tensor], Tensor]  #: points -> directions uphill, of which the signs count


@dataclass(frozen=True)
class SignAscent(abc.ABC):
    """From a random point of every cube uphill for as long as it pays, then draws around the end.

    The climb goes in stages. In each the steps shrink, the first one of all from the centre to a
    face of the cube. After a stage a few draws around its end tell whether it has gained more than
    chance explains; without a gain the climb is over. Rounding is luck, which no climb finds, so
    the rest of the budget is draws: around the end where the errors have grown, else anywhere in
    the cube.

    Attributes:
        budget: forward-equivalents per sample.
        share: of the budget for the climb, at most; the rest is for the draws.
        first_step: of the first stage, in half-widths of the cube; half of it in every later one.
        last_step: of every stage, likewise; in between they shrink linearly.
        radius: of the draws, in half-widths.
    """

    budget: float | int = 800.0
    share: float | int = 0.5
    first_step: float | int = 1.0
    last_step: float | int = 0.02
    radius: float | int = 0.02

    measures: ClassVar[str] = "gradient"  #: what a step costs

    @abc.abstractmethod
    def uphill(self, search: Search, start: Tensor) -> Uphill:
        """What gives the directions along the way that begins at ``start``."""

    def run(self, search: Search) -> None:
        """Climb while it pays, then draw where errors are larger: at the end, or anywhere."""
        cubes, begin = search.cubes, search.spent
        budget = self.budget - begin
        x, first_step = cubes.uniform(search.generator), self.first_step
        slope = self.uphill(search, x)
        best = self._log_errors(search, lambda: cubes.uniform(search.generator))
        climbed = torch.zeros(len(x), dtype=torch.bool)
        stage = max(STAGE * budget, SHORTEST)
        while search.spent - begin < self.share * budget and search.can_afford(self.measures):
            end = self._climb(search, slope, x, first_step, stage)
            at_end = self._log_errors(search, functools.partial(self._near, search, end))
            better = at_end[0] > best[0]
            gained = _gains(at_end, best)
            x = torch.where(_like(better, x), end, x)
            best = torch.where(better, at_end, best)
            climbed |= better
            if not gained:
                break
            first_step /= 2

        def drawn() -> Tensor:
            anywhere = cubes.uniform(search.generator)
            return torch.where(_like(climbed, x), self._near(search, x), anywhere)

        search.errors_of_draws(drawn)

    def _near(self, search: Search, x: Tensor) -> Tensor:
        return search.cubes.near(x, self.radius, search.generator)

    def _climb(
        self, search: Search, slope: Uphill, x: Tensor, first_step: float, budget: float
    ) -> Tensor:
        cubes, begin = search.cubes, search.spent
        while search.spent - begin < budget and search.can_afford(self.measures):
            left = 1 - (search.spent - begin) / budget
            step = (first_step * left + self.last_step) * cubes.half
            x = cubes.project(x + step * slope(x).sign())
        return x

    def _log_errors(self, search: Search, draw: Callable[[], Tensor]) -> Tensor:
        """Mean logarithm of the errors at some draws, and the variance of that mean: (2, B)."""
        before = search.error
        found = search.errors_of_draws(draw, budget=max(SCOUTS * self.budget, FEWEST))
        logs = torch.stack(found or [before]).clamp(min=TINY).log()
        if len(logs) == 1:
            return torch.stack([logs[0], torch.zeros_like(logs[0])])
        return torch.stack([logs.mean(0), logs.var(0) / len(logs)])


def _gains(at_end: Tensor, before: Tensor) -> bool:
    """Whether errors at the end are larger on average, beyond what chance explains."""
    known = (at_end[0] - before[0]).isfinite()
    if not bool(known.any()):
        return False
    (end, its_variance), (start, start_variance) = at_end[:, known], before[:, known]
    variance = (its_variance + start_variance).mean().item() / len(end)
    return (end - start).mean().item() > SIGMAS * math.sqrt(variance)


def unit(t: Tensor) -> Tensor:
    """Every sample scaled to length 1; zeros stay."""
    length = t.flatten(1).double().norm(dim=1)
    scale = torch.where(length > 0, length, torch.ones_like(length))
    return (t.double() / _like(scale, t)).to(t.dtype)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """One value per sample, (B,), on the device of x and broadcastable to it."""
    return values.to(x.device).reshape(-1, *[1] * (x.dim() - 1))

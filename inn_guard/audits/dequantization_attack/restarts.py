"""Restarts: the same search from several starts, which processes share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from inn_guard.audits.dequantization_attack.search import Attack, AttackResult, Search
from inn_guard.audits.dequantization_attack.spectral_ascent import SpectralAscent

__all__ = ["Restarts"]


@dataclass(frozen=True)
class Restarts:
    """The same search several times with new random numbers; every sample's worst point is kept.

    No search knows of another one, so that processes which run the attack together each take some
    of them and find what one process finds.

    Attributes:
        count: how many.
        strategy: what is done every time, with its whole budget.

    >>> Restarts(3, SpectralAscent(budget=200.0)).budget
    600.0
    """

    count: int
    strategy: Attack = field(default_factory=SpectralAscent)

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"expected a whole number of starts, at least one; got {self.count!r}")

    @property
    def budget(self) -> float | int:
        """Forward-equivalents per sample of all searches."""
        return self.count * self.strategy.budget

    def run(self, search: Search) -> None:
        """Search from every start."""
        seeds = torch.randint(
            2**62, (self.count,), generator=search.generator, device="cpu"
        ).tolist()

        def one(seed: int) -> AttackResult:
            again = search.fork(
                budget=self.strategy.budget, generator=torch.Generator().manual_seed(seed)
            )
            self.strategy.run(again)
            return again.found

        for found in search.parallel.map_items(seeds, one):
            search.merge(found)

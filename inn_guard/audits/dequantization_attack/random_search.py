"""Random search: the baseline that any attack has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from inn_guard.audits.dequantization_attack.search import Search

__all__ = ["RandomSearch"]


@dataclass(frozen=True)
class RandomSearch:
    """Points drawn uniformly from the cube, each at the cost of one round trip.

    Attributes:
        budget: forward-equivalents per sample.
    """

    budget: float | int = 800.0

    def run(self, search: Search) -> None:
        """Draw until the budget is spent."""
        search.errors_of_draws(lambda: search.cubes.uniform(search.generator))

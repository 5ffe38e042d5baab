"""Factors: bounds of runs of layers, whose product bounds a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from inn_guard.lipschitz.conditioners import Proof
from inn_guard.lipschitz.rounding import up

__all__ = ["Factor", "cheapest", "product"]


@dataclass(frozen=True)
class Factor:
    """A bound of consecutive layers, first to last; the product of all factors bounds the network.

    Attributes:
        first: index of the first layer.
        last: index after the last layer.
        bound: certified.
        proof: the chain and its multipliers, where a chain gave the bound.
        compared: whether it is the norm of a product of comparison matrices.
    """

    first: int
    last: int
    bound: float
    proof: Proof | None = None
    compared: bool = False


def product(bounds: Sequence[float]) -> float:
    """The product, rounded up; inf if one is."""
    total = 1.0
    for bound in bounds:
        total = up(total * bound)
    return math.inf if math.isnan(total) else total


def cheapest(count: int, factors: Sequence[Factor]) -> list[Factor]:
    """The factors, one after the other from layer 0 to ``count``, whose product is least: a shortest path.

    Raises:
        ValueError: if no factors lead there.
    """
    costs, paths = {0: 0.0}, dict[int, list[Factor]]({0: []})
    for factor in sorted(factors, key=lambda f: (f.last, f.first)):
        if factor.first not in costs:
            continue
        cost = costs[factor.first] + math.log(max(factor.bound, 1e-300))
        if factor.last not in costs or cost < costs[factor.last]:
            costs[factor.last], paths[factor.last] = cost, [*paths[factor.first], factor]
    if count not in paths:
        raise ValueError(f"expected factors that lead from layer 0 to layer {count}")
    return paths[count]

"""Transformers: what a coupling does to one entry, z = h(x; theta), and enclosures that h needs."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from inn_guard.numerics.intervals import Interval

SWITCH = 20.0  #: from which on torch's softplus is the identity, unless told otherwise
JUMP = 2.07e-9  #: more than softplus(20) - 20

__all__ = [
    "ScaleBounds",
    "Transformer",
    "clamped",
    "constant",
    "hull_of",
    "ones",
    "product_with_complement",
    "softplus",
    "softplus_curvature",
    "softplus_slope",
    "weighted_sum",
    "where",
]


@runtime_checkable
class Transformer(Protocol):
    """z = h(x; theta), increasing in x, entry by entry.

    Every interval has the shape of the transformed entries; theta lists the parameters of h.
    """

    @property
    def count(self) -> int:
        """Parameters per entry."""
        ...

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        """An enclosure of h."""
        ...

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        """An enclosure of dh/dx."""
        ...

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """Enclosures of dh/dtheta_k."""
        ...

    def log_sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """Enclosures of (dh/dtheta_k) / (dh/dx), factors of the inverse Jacobian up to the sign."""
        ...


@runtime_checkable
class ScaleBounds(Protocol):
    """Enclosures of a positive scale g(s) over intervals of s."""

    def value(self, s: Interval) -> Interval:
        """An enclosure of g."""
        ...

    def slope(self, s: Interval) -> Interval:
        """An enclosure of g'."""
        ...

    def log_slope(self, s: Interval) -> Interval:
        """An enclosure of g'/g."""
        ...

    def second_derivative(self, s: Interval) -> Interval:
        """An enclosure of g''."""
        ...


def constant(value: float, like: Tensor) -> Interval:
    """One exact number in every entry of a tensor's shape."""
    point = torch.full_like(like, value)
    return Interval(point, point)


def ones(like: Interval) -> Interval:
    """Exactly one in every entry."""
    return constant(1.0, like.lo)


def where(condition: Tensor, x: Interval, y: Interval) -> Interval:
    """x where the condition holds, y elsewhere."""
    return Interval(torch.where(condition, x.lo, y.lo), torch.where(condition, x.hi, y.hi))


def clamped(x: Interval, least: float, most: float) -> Interval:
    """Both ends moved into [least, most], where the true value is known to be."""
    return Interval(x.lo.clamp(least, most), x.hi.clamp(least, most))


def product_with_complement(p: Interval) -> Interval:
    """p (1 - p) for p in [0, 1]: it rises to 1/4 at p = 1/2 and falls again."""
    left, right = Interval(p.lo, p.lo), Interval(p.hi, p.hi)
    ends = (left * (1.0 - left)).hull(right * (1.0 - right))
    holds_half = (p.lo <= 0.5) & (p.hi >= 0.5)
    return Interval(ends.lo.clamp_min(0), torch.where(holds_half, ends.hi.clamp_min(0.25), ends.hi))


def softplus(x: Interval) -> Interval:
    """log(1 + e^x) as torch computes it, with a step down to the identity at ``SWITCH``."""
    smooth, switches = x.increasing(functional.softplus), _holds_switch(x)
    lo = torch.where(switches, smooth.lo.clamp_max(SWITCH), smooth.lo)
    hi = torch.where(switches, smooth.hi.clamp_min(SWITCH + JUMP), smooth.hi)
    return Interval(lo.clamp_min(0), hi)


def softplus_slope(x: Interval) -> Interval:
    """The derivative of ``softplus``: a sigmoid, and one behind the step."""
    smooth = x.increasing(torch.sigmoid)
    return Interval(smooth.lo, torch.where(x.hi >= SWITCH, smooth.hi.clamp_min(1), smooth.hi))


def softplus_curvature(x: Interval) -> Interval:
    """The second derivative of ``softplus``: unknown where the first one jumps."""
    p = x.increasing(torch.sigmoid)
    smooth, switches = p * (1.0 - p), _holds_switch(x)
    lo = torch.where(switches, -math.inf, smooth.lo)
    return Interval(lo, torch.where(switches, math.inf, smooth.hi))


def _holds_switch(x: Interval) -> Tensor:
    return (x.lo <= SWITCH) & (x.hi >= SWITCH)


def weighted_sum(weights: list[Interval], parts: list[Interval]) -> Interval:
    """The sum of weight times part, from the first to the last."""
    total = weights[0] * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total = total + weight * part
    return total


def hull_of(parts: list[Interval]) -> Interval:
    """The smallest interval that holds all parts, entry by entry."""
    total = parts[0]
    for part in parts[1:]:
        total = total.hull(part)
    return total

"""How boxes go through each kind of map: image, interval Jacobian and interval inverse Jacobian, rounded outwards."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from inn_guard.lipschitz.compositions import Composition
from inn_guard.lipschitz.couplings import Coupling
from inn_guard.lipschitz.intervals import Interval
from inn_guard.lipschitz.jets import Direct, Table
from inn_guard.lipschitz.maps import BoundedMap, Diagonal, Elementwise, LinearMap, Rearrangement, Shaped
from inn_guard.lipschitz.semantics import _nearly
from inn_guard.lipschitz.spectral import exact, inverse_with_error
from inn_guard.lipschitz.spline_boxes import KnotJets, Local, spline_local, spline_value
from inn_guard.lipschitz.spline_transformers import RationalQuadraticSpline
from inn_guard.lipschitz.subnetworks import Unbounded
from inn_guard.lipschitz.transformers import Transformer

__all__ = ["State", "Step", "step_of"]

CELLS = 1024  #: cells of a table of a network of one input
KNOT_CELLS = 1024  #: the same for the knots of a spline


@dataclass(frozen=True)
class State:
    """Boxes on their way through the layers.

    Attributes:
        centre: image of the boxes' centres, (B, d), thin.
        box: image of the boxes, (B, d).
        J: from the first input, (B, d, d).
        K: the inverse Jacobian back to the first input, (B, d, d), or None if it is not asked for.
    """

    centre: Interval
    box: Interval
    J: Interval
    K: Interval | None


Step = Callable[[State], State]


@functools.singledispatch
def step_of(described: BoundedMap, reach: Interval) -> Step:
    """How boxes go through a map, tables made for inputs within ``reach``.

    Raises:
        Unbounded: if it is not known.
    """
    raise Unbounded(f"{type(described).__name__} has no interval Jacobian")


@step_of.register
def _(described: Shaped, reach: Interval) -> Step:
    return step_of(described.make(reach), reach)


@step_of.register
def _(described: Composition, reach: Interval) -> Step:
    raise Unbounded("a composition is opened before its steps are made")


@step_of.register
def _(described: Rearrangement, reach: Interval) -> Step:
    order = described._order(reach)

    def step(s: State) -> State:
        K = None if s.K is None else s.K[:, :, order]
        return State(s.centre[:, order], s.box[:, order], s.J[:, order], K)

    return step


@step_of.register
def _(described: Diagonal, reach: Interval) -> Step:
    scale, shift = (
        _nearly(exact(t) * torch.ones(reach.shape[0], dtype=torch.float64)) for t in (described.scale, described.shift)
    )

    def step(s: State) -> State:
        K = None if s.K is None else s.K / scale
        return State(s.centre * scale + shift, s.box * scale + shift, s.J * scale[:, None], K)

    return step


@step_of.register
def _(described: Elementwise, reach: Interval) -> Step:
    def step(s: State) -> State:
        slope = described._slope(s.box)
        K = None if s.K is None else s.K / slope.map(lambda t: t[:, None])
        return State(described.image(s.centre), described.image(s.box), s.J * slope.map(lambda t: t[:, :, None]), K)

    return step


@step_of.register
def _(described: LinearMap, reach: Interval) -> Step:
    back, error = inverse_with_error(described.weight)
    size = float(torch.linalg.matrix_norm(back)) + error
    if not math.isfinite(error) or size * described.error > 0.5:
        raise Unbounded("a matrix is singular")
    W, W_inverse = (
        _around(exact(described.weight), described.error),
        _around(back, error + 4 * size * size * described.error),
    )
    shift = Interval.of(torch.zeros(()) if described.shift is None else exact(described.shift))

    def step(s: State) -> State:
        K = None if s.K is None else _matmul(s.K, W_inverse[None])
        return State(_apply(W, s.centre) + shift, _apply(W, s.box) + shift, _matmul(W[None], s.J), K)

    return step


@step_of.register
def _(described: Coupling, reach: Interval) -> Step:
    K_matrix, S = described.split.matrices()
    keep, change = K_matrix.any(0).nonzero().flatten(), S.any(0).nonzero().flatten()
    rows = [index[S[:, change].argmax(0)] for index in described.rows]
    direct = Direct(described.network, K_matrix[:, keep], described.context)
    local = _local(described.transformer, direct, rows, reach[keep])

    def step(s: State) -> State:
        found = local.everything(s.box[:, keep], s.box[:, change])
        old = s.J[:, change]
        J = _replaced(s.J, change, _matmul(found.moves, s.J[:, keep]) + old * found.slope.map(lambda t: t[:, :, None]))
        K = None if s.K is None else _pulled(s.K, keep, change, found.slope, found.relative)
        moved = local.value(s.centre[:, keep], s.centre[:, change])
        return State(_replaced(s.centre, change, moved), _replaced(s.box, change, found.value), J, K)

    return step


@runtime_checkable
class _Coupled(Protocol):
    """A coupling on boxes of its kept (B, k) and of its changed entries (B, e)."""

    def everything(self, kept: Interval, x: Interval) -> Local:
        """Value and derivatives."""
        ...

    def value(self, kept: Interval, x: Interval) -> Interval:
        """The value alone."""
        ...


def _local(h: Transformer, direct: Direct, rows: Sequence[Tensor], reach: Interval) -> _Coupled:
    if len(reach.lo) == 1:
        low, high = float(reach.lo[0]), float(reach.hi[0])
        if isinstance(h, RationalQuadraticSpline):
            return _ByKnots(h, Table(KnotJets(direct, h, rows), low, high, KNOT_CELLS))
        return _ByParameters(h, Table(direct, low, high, CELLS), rows)
    return _ByParameters(h, direct, rows)


@dataclass(frozen=True)
class _ByKnots:
    spline: RationalQuadraticSpline
    table: Table

    def everything(self, kept: Interval, x: Interval) -> Local:
        knots, rates = self.table(kept)
        return spline_local(self.spline, knots, rates[:, 0], x)

    def value(self, kept: Interval, x: Interval) -> Interval:
        return spline_value(self.spline, self.table(kept)[0], x)


@dataclass(frozen=True)
class _ByParameters:
    h: Transformer
    network: Callable[[Interval], tuple[Interval, Interval]]
    rows: Sequence[Tensor]

    def everything(self, kept: Interval, x: Interval) -> Local:
        output, rates = self.network(kept)
        theta = [output[:, index] for index in self.rows]
        parts = self.h.sensitivities(x, theta), self.h.relative(x, theta)
        moves, relative = (_weighted(factors, rates, self.rows) for factors in parts)
        return Local(self.h.value(x, theta), self.h.slope(x, theta), moves, relative)

    def value(self, kept: Interval, x: Interval) -> Interval:
        output, _ = self.network(kept)
        return self.h.value(x, [output[:, index] for index in self.rows])


def _weighted(factors: Sequence[Interval], rates: Interval, rows: Sequence[Tensor]) -> Interval:
    """sum_k diag(factor_k) J_theta_k, (B, changed, kept)."""
    terms = [
        rates[:, :, index].map(lambda t: t.mT) * factor.map(lambda t: t[:, :, None])
        for factor, index in zip(factors, rows, strict=True)
    ]
    return functools.reduce(operator.add, terms)


def _pulled(K: Interval, keep: Tensor, change: Tensor, slope: Interval, relative: Interval) -> Interval:
    """K times [[I, 0], [-D^-1 M, D^-1]]."""
    moved = K[:, :, change]
    kept = K[:, :, keep] - _matmul(moved, relative)
    scaled = moved / slope.map(lambda t: t[:, None])
    lo, hi = K.lo.clone(), K.hi.clone()
    lo[:, :, keep], hi[:, :, keep] = kept.lo, kept.hi
    lo[:, :, change], hi[:, :, change] = scaled.lo, scaled.hi
    return Interval(lo, hi)


def _replaced(whole: Interval, index: Tensor, part: Interval) -> Interval:
    return Interval(whole.lo.index_copy(1, index, part.lo), whole.hi.index_copy(1, index, part.hi))


def _matmul(A: Interval, B: Interval) -> Interval:
    return (A.map(lambda t: t[:, :, :, None]) * B.map(lambda t: t[:, None])).sum(2)


def _apply(W: Interval, x: Interval) -> Interval:
    return (W * x.map(lambda t: t[:, None])).sum(2)


def _around(W: Tensor, error: float) -> Interval:
    return Interval.of(W) + Interval(torch.full_like(W, -error), torch.full_like(W, error))

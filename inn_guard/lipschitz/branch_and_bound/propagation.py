"""How boxes go through each kind of map: image, Jacobian and inverse Jacobian as affine forms of the first input."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.lipschitz.branch_and_bound.affine_forms import AffineForm
from inn_guard.lipschitz.branch_and_bound.coupling import (
    ByParameters,
    Coupled,
    evaluated,
    looked_up,
)
from inn_guard.lipschitz.branch_and_bound.lookup_table import Table
from inn_guard.lipschitz.branch_and_bound.splines import KnotJets, SplineOnBoxes
from inn_guard.lipschitz.branch_and_bound.taylor import Direct
from inn_guard.lipschitz.maps.base import BoundedMap
from inn_guard.lipschitz.maps.composition import Composition
from inn_guard.lipschitz.maps.coupling import Coupling
from inn_guard.lipschitz.maps.elementary import (
    Diagonal,
    Elementwise,
    LinearMap,
    Rearrangement,
    ShapeDependent,
)
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.transformers.affine import Transformer
from inn_guard.lipschitz.transformers.rational_quadratic import RationalQuadraticSpline
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.spectral_norm import exact, inverse_with_error

__all__ = ["State", "Step", "step_of"]

CELLS = 1024  #: cells of a table of a network of one input


@dataclass(frozen=True)
class State:
    """Boxes on their way through the layers.

    Attributes:
        x: their image, (B, d).
        J: the Jacobian from the first input, (B, d, d), or None if it is not asked for.
        K: the inverse Jacobian back to the first input, (B, d, d), or None if it is not asked for.
    """

    x: AffineForm
    J: AffineForm | None
    K: AffineForm | None

    @classmethod
    def of(cls, boxes: Interval) -> State:
        """Before the first layer."""
        eye = torch.eye(boxes.shape[1], dtype=torch.float64).expand(len(boxes.lo), -1, -1)
        unit = AffineForm.of(Interval.of(eye), boxes.shape[1])
        return cls(AffineForm.coordinates(boxes), unit, unit)


Step = Callable[[State], State]


@functools.singledispatch
def step_of(described: BoundedMap, reach: Interval) -> Step:
    """How boxes go through a map, tables made for inputs within ``reach``.

    Raises:
        Unbounded: if it is not known.
    """
    raise Unbounded(f"{type(described).__name__} has no interval Jacobian")


@step_of.register
def _(described: ShapeDependent, reach: Interval) -> Step:
    return step_of(described.make(reach), reach)


@step_of.register
def _(described: Composition, reach: Interval) -> Step:
    raise Unbounded("a composition is opened before its steps are made")


@step_of.register
def _(described: Rearrangement, reach: Interval) -> Step:
    order = described._order(reach)

    def step(s: State) -> State:
        J = None if s.J is None else s.J[:, order]
        return State(s.x[:, order], J, None if s.K is None else s.K[:, :, order])

    return step


@step_of.register
def _(described: Diagonal, reach: Interval) -> Step:
    scale, shift = (
        Interval.around(exact(t) * torch.ones(reach.shape[0], dtype=torch.float64))
        for t in (described.scale, described.shift)
    )

    def step(s: State) -> State:
        a, b = (_constant(part, s)[None] for part in (scale, shift))
        J = None if s.J is None else s.J * a[:, :, None]
        return State(s.x * a + b, J, None if s.K is None else s.K * a.reciprocal()[:, None])

    return step


@step_of.register
def _(described: Elementwise, reach: Interval) -> Step:
    def step(s: State) -> State:
        point, box = Interval.of(s.x.middle), s.x.range
        over = described._slope(box)
        x = s.x.weighted(over, described.image(point))
        bend = described.function.second_derivative(box) * described.scale
        slope = s.x.weighted(bend, described._slope(point)).better(over)
        flat = slope.reciprocal()
        J = None if s.J is None else s.J * slope[:, :, None]
        return State(x, J, None if s.K is None else s.K * flat[:, None])

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
    shift = Interval.of(
        torch.zeros(W.shape[0]) if described.shift is None else exact(described.shift)
    )

    def step(s: State) -> State:
        A, B, b = (_constant(part, s)[None] for part in (W, W_inverse, shift))
        J = None if s.J is None else _matmul(A, s.J)
        return State((A * s.x[:, None]).sum(2) + b, J, None if s.K is None else _matmul(s.K, B))

    return step


@step_of.register
def _(described: Coupling, reach: Interval) -> Step:
    K_matrix, S = described.split.matrices()
    keep, change = K_matrix.any(0).nonzero().flatten(), S.any(0).nonzero().flatten()
    order, rows = (
        torch.cat([keep, change]),
        [index[S[:, change].argmax(0)] for index in described.rows],
    )
    direct = Direct(described.network, K_matrix[:, keep], described.context)
    coupled = _coupled(described.transformer, direct, rows, reach[keep])

    def step(s: State) -> State:
        inner = s.x[:, order]
        box = inner.range
        found = coupled(box[:, : len(keep)], box[:, len(keep) :])
        value, slope, flat, moves, relative = (
            functools.partial(part.within, inner, box) for part in found
        )
        J = K = None
        if s.J is not None:
            J = s.J.replaced(
                change, _matmul(moves(), s.J[:, keep]) + s.J[:, change] * slope()[:, :, None]
            )
        if s.K is not None:
            # times [[I, 0], [-D^-1 M, D^-1]]
            last = s.K[:, :, change]
            K = s.K.replaced(keep, s.K[:, :, keep] - _matmul(last, relative()), 2)
            K = K.replaced(change, last * flat()[:, None], 2)
        return State(s.x.replaced(change, value()), J, K)

    return step


def _coupled(h: Transformer, direct: Direct, rows: Sequence[Tensor], reach: Interval) -> Coupled:
    if len(reach.lo) > 1:
        return ByParameters(h, evaluated(direct), rows)
    low, high = float(reach.lo[0]), float(reach.hi[0])
    if type(h) is RationalQuadraticSpline:  # a subclass may have other knots
        groups = h.bins * len(rows[0])
        return SplineOnBoxes(
            h, Table(KnotJets(direct, h, rows), low, high, cells=CELLS, groups=groups)
        )
    return ByParameters(h, looked_up(Table(direct, low, high, cells=CELLS)), rows)


def _constant(x: Interval, s: State) -> AffineForm:
    return AffineForm.of(x, len(s.x.slopes))


def _matmul(A: AffineForm, B: AffineForm) -> AffineForm:
    """Batches of matrices, (B, m, k) times (B, k, n)."""
    return (A[:, :, :, None] * B[:, None]).sum(2)


def _around(W: Tensor, error: float) -> Interval:
    return Interval.of(W) + Interval(torch.full_like(W, -error), torch.full_like(W, error))

"""How boxes go through each kind of map: image, J and J^-1 as affine forms of the first input."""

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
    CouplingOnBoxes,
    evaluated,
    looked_up,
)
from inn_guard.lipschitz.branch_and_bound.lookup_table import Table
from inn_guard.lipschitz.branch_and_bound.splines import SplineKnots, SplineOnBoxes
from inn_guard.lipschitz.branch_and_bound.taylor import NetworkOnBoxes
from inn_guard.lipschitz.maps.base import BoundedMap
from inn_guard.lipschitz.maps.coupling import Coupling
from inn_guard.lipschitz.maps.elementary import (
    Diagonal,
    Elementwise,
    LinearMap,
    Rearrangement,
    ShapeDependent,
)
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.transformers.base import Transformer
from inn_guard.lipschitz.transformers.rational_quadratic import RationalQuadraticSpline
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import Upper, frobenius_norm
from inn_guard.numerics.spectral_norm import exact, inverse_with_error

__all__ = ["State", "Step", "step_of"]

CELLS = 1024  #: cells of a table of a network of one input


@dataclass(frozen=True)
class State:
    """Boxes between layers.

    Attributes:
        x: their image, (B, d).
        J: the Jacobian from the first input, (B, d, d), or None if it is not needed.
        K: the inverse Jacobian back to the first input, (B, d, d), or None if it is not needed.
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

    def enclose(self, x: Interval) -> AffineForm:
        """Constants of the map as a form, with a dimension for the boxes."""
        return AffineForm.of(x, len(self.x.slopes))[None]

    def after(
        self,
        x: AffineForm,
        jacobian: Callable[[AffineForm], AffineForm],
        inverse: Callable[[AffineForm], AffineForm],
    ) -> State:
        """Behind a map: x its image, J -> jacobian(J) and K -> inverse(K) where they are needed."""
        J, K = self.J, self.K
        if J is not None:
            J = jacobian(J)
        if K is not None:
            K = inverse(K)
        return State(x, J, K)


Step = Callable[[State], State]


@functools.singledispatch
def step_of(bounded: BoundedMap, domain: Interval) -> Step:
    """How boxes go through a map, tables made for inputs in ``domain``.

    Raises:
        Unbounded: if there is no rule.
    """
    raise Unbounded(f"{type(bounded).__name__} has no interval Jacobian")


@step_of.register
def step_of_shape_dependent(bounded: ShapeDependent, domain: Interval) -> Step:
    """That of the map for this shape."""
    return step_of(bounded.at(domain), domain)


@step_of.register
def step_of_rearrangement(bounded: Rearrangement, domain: Interval) -> Step:
    """Rows of J and columns of K in another order."""
    order = bounded.order(domain)
    return lambda s: s.after(s.x[:, order], lambda J: J[:, order], lambda K: K[:, :, order])


@step_of.register
def step_of_diagonal(bounded: Diagonal, domain: Interval) -> Step:
    """D J and K D^-1."""
    ones = torch.ones(domain.shape[0], dtype=torch.float64)
    scale = Interval.around(exact(bounded.scale) * ones)
    shift = Interval.around(exact(bounded.shift) * ones)

    def step(s: State) -> State:
        a, b = s.enclose(scale), s.enclose(shift)
        return s.after(
            s.x * a + b, lambda J: J * a[:, :, None], lambda K: K * a.reciprocal()[:, None]
        )

    return step


@step_of.register
def step_of_elementwise(bounded: Elementwise, domain: Interval) -> Step:
    """The same with slopes to first order in x."""

    def step(s: State) -> State:
        point, box = Interval.of(s.x.middle), s.x.range
        over = bounded.slope(box)
        curvature = bounded.function.second_derivative(box) * bounded.scale
        slope = s.x.weighted(curvature, bounded.slope(point)).better(over)
        x = s.x.weighted(over, bounded.image(point))
        return s.after(
            x, lambda J: J * slope[:, :, None], lambda K: K * slope.reciprocal()[:, None]
        )

    return step


@step_of.register
def step_of_linear(bounded: LinearMap, domain: Interval) -> Step:
    """W J and K W^-1."""
    inverse, error = inverse_with_error(bounded.weight)
    size = frobenius_norm(inverse) + error
    if not math.isfinite(error) or size * bounded.error > 0.5:
        raise Unbounded("a matrix is singular")
    W = _around(exact(bounded.weight), Upper(bounded.error))
    W_inverse = _around(inverse, error + 4 * size * size * bounded.error)
    shift = Interval.of(torch.zeros(W.shape[0]))
    if bounded.shift is not None:
        shift = Interval.of(exact(bounded.shift))

    def step(s: State) -> State:
        A, B = s.enclose(W), s.enclose(W_inverse)
        x = (A * s.x[:, None]).sum(2) + s.enclose(shift)
        return s.after(x, lambda J: _matmul(A, J), lambda K: _matmul(K, B))

    return step


@step_of.register
def step_of_coupling(bounded: Coupling, domain: Interval) -> Step:
    """[[I, 0], [M, D]] J and K [[I, 0], [-D^-1 M, D^-1]]."""
    K_matrix, S = bounded.split.matrices()
    keep, change = K_matrix.any(0).nonzero().flatten(), S.any(0).nonzero().flatten()
    order, count = torch.cat([keep, change]), len(keep)
    if not len(keep) or not len(change):
        raise Unbounded("the coupling keeps no entry, or changes none")
    rows = [index[S[:, change].argmax(0)] for index in bounded.rows]
    network = NetworkOnBoxes(bounded.network, K_matrix[:, keep], bounded.context)
    coupled = _on_boxes(bounded.transformer, network, rows, domain[keep])

    def step(s: State) -> State:
        inner = s.x[:, order]
        box = inner.range
        found = coupled(box[:, :count], box[:, count:])

        def jacobian(J: AffineForm) -> AffineForm:
            M, D = found.partials.within(inner, box), found.slope.within(inner, box)
            return J.replaced(change, _matmul(M, J[:, keep]) + J[:, change] * D[:, :, None])

        def inverse(K: AffineForm) -> AffineForm:
            log_partials = found.log_partials.within(inner, box)
            D_inverse = found.inverse_slope.within(inner, box)
            last = K[:, :, change]
            K = K.replaced(keep, K[:, :, keep] - _matmul(last, log_partials), 2)
            return K.replaced(change, last * D_inverse[:, None], 2)

        return s.after(s.x.replaced(change, found.value.within(inner, box)), jacobian, inverse)

    return step


def _on_boxes(
    h: Transformer, network: NetworkOnBoxes, rows: Sequence[Tensor], domain: Interval
) -> CouplingOnBoxes:
    if len(domain.lo) > 1:
        return ByParameters(h, evaluated(network), rows)
    low, high = float(domain.lo[0]), float(domain.hi[0])
    # a subclass may have other knots
    if type(h) is RationalQuadraticSpline:
        knots, groups = SplineKnots(network, h, rows), h.bins * len(rows[0])
        return SplineOnBoxes(h, Table(knots.jet, low, high, cells=CELLS, groups=groups))
    return ByParameters(h, looked_up(Table(network.jet, low, high, cells=CELLS)), rows)


def _matmul(A: AffineForm, B: AffineForm) -> AffineForm:
    """Batches of matrices, (B, m, k) times (B, k, n)."""
    return (A[:, :, :, None] * B[:, None]).sum(2)


def _around(W: Tensor, error: Upper) -> Interval:
    """Every matrix no farther from W than that, in any norm that bounds the entries."""
    return Interval.of(W) + Interval(torch.full_like(W, -error), torch.full_like(W, error))

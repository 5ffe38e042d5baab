"""Branch and bound on boxes of a few dimensions with mean-value interval Jacobians, rounded outwards.

Every box carries an enclosure of its image, of J and of J^-1 through all layers. States are enclosed by the one-step
interval image and by the mean-value form F(c) + J (X - c); the norm of an interval matrix is at most that of its centre
plus that of its radii. The box with the largest bound is split until the bound meets the witnessed lower bound.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inn_guard.lipschitz.blocks import Pair
from inn_guard.lipschitz.compositions import Composition
from inn_guard.lipschitz.couplings import Coupling
from inn_guard.lipschitz.deadline import Deadline
from inn_guard.lipschitz.intervals import Interval
from inn_guard.lipschitz.jets import Direct, Table
from inn_guard.lipschitz.maps import BoundedMap, Diagonal, Elementwise, LinearMap, Rearrangement, Shaped
from inn_guard.lipschitz.rounding import UNIT
from inn_guard.lipschitz.semantics import _nearly
from inn_guard.lipschitz.spectral import exact, inverse_with_error
from inn_guard.lipschitz.subnetworks import Unbounded

__all__ = ["Branched", "Step", "branch_and_bound", "interval_norm", "step_of"]

BATCH = 8192  #: boxes evaluated at once
FIRST = 256  #: boxes evaluated at first, to see how long they take
PROBED = 32  #: middles of the worst boxes at which the lower bound is measured
CELLS = 1024  #: cells of a table of a network of one input
SPREAD = 0.5  #: margin of a table beyond the values seen, in units of their range


@dataclass(frozen=True)
class Branched:
    """What the search proved.

    Attributes:
        pair: bounds of sup ||J|| and sup ||J^-1|| over the box.
        boxes: how many boxes were evaluated, per direction.
        leaves: the same bounds by name, for a certificate.
    """

    pair: Pair
    boxes: Pair
    leaves: Mapping[str, float] = field(default_factory=dict)


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
    network: Callable[[Interval], tuple[Interval, Interval]] = direct
    if len(keep) == 1:
        low, high = float(reach.lo[keep[0]]), float(reach.hi[keep[0]])
        network = Table(direct, low, high, CELLS)
    h = described.transformer

    def step(s: State) -> State:
        output, rates = network(s.box[:, keep])
        theta, x = [output[:, index] for index in rows], s.box[:, change]
        slope = h.slope(x, theta)
        M = _weighted(h.sensitivities(x, theta), rates, rows)
        old = s.J[:, change]
        J = _replaced(s.J, change, _matmul(M, s.J[:, keep]) + old * slope.map(lambda t: t[:, :, None]))
        K = None if s.K is None else _pulled(s.K, keep, change, slope, _weighted(h.relative(x, theta), rates, rows))
        at_centre, _ = network(s.centre[:, keep])
        moved = h.value(s.centre[:, change], [at_centre[:, index] for index in rows])
        box = _replaced(s.box, change, h.value(x, theta))
        return State(_replaced(s.centre, change, moved), box, J, K)

    return step


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


def interval_norm(J: Interval) -> Tensor:
    """An upper bound of the spectral norm of every matrix in J (B, m, n), small m and n: ||centre|| + ||radius||, (B,).

    Both are singular values enlarged by 1e-10, and checked by a Cholesky factorisation of s^2 I - A^T A: for up to a
    few dozen rows its rounding is far below that margin.
    """
    centre, radius = J.centre, J.radius
    known = centre.flatten(1).isfinite().all(1) & radius.flatten(1).isfinite().all(1)
    norm = torch.full((len(centre),), math.inf, dtype=torch.float64)
    if bool(known.any()):
        norm[known] = (_norms(centre[known]) + _norms(radius[known])) * (1 + 4 * UNIT)
    return norm


def _norms(A: Tensor) -> Tensor:
    scale = A.abs().amax((1, 2)).clamp_min(1e-300)
    A = A / scale[:, None, None]
    if A.shape[1:] == (2, 2):
        square, det = A.square().sum((1, 2)), (A[:, 0, 0] * A[:, 1, 1] - A[:, 0, 1] * A[:, 1, 0]).abs()
        s = ((square + 2 * det).sqrt() + (square - 2 * det).clamp_min(0).sqrt()) / 2 * (1 + 1e-10)
    else:
        s = torch.linalg.matrix_norm(A, 2) * (1 + 1e-10)
    gram = -(A.mT @ A)
    gram.diagonal(dim1=1, dim2=2).add_((s.square() * (1 - 1e-11))[:, None])
    proved = torch.linalg.cholesky_ex(gram)[1] == 0
    return torch.where(proved, s * scale * (1 + 4 * UNIT), math.inf)


Probe = Callable[[Tensor], Pair]


def branch_and_bound(
    layers: Sequence[BoundedMap],
    box: Interval,
    *,
    lower: Pair,
    probe: Probe | None = None,
    deadline: Deadline | None = None,
    tolerance: float = 1.005,
) -> Branched:
    """Bounds of sup ||J|| and sup ||J^-1|| over a bounded box.

    Args:
        layers: the maps in order.
        box: (d,), bounded.
        lower: witnessed lower bounds; the search of a direction ends where its bound is ``tolerance`` times as large.
        probe: measures both lower bounds at points (B, d): called with the middles of the worst boxes.
        deadline: of both directions together; a minute from now unless given.
        tolerance: see ``lower``.

    Returns:
        The bounds; infinite where time ran out before every box had a finite one.

    Raises:
        Unbounded: if a layer has no interval Jacobian, or if time runs out before the search begins.
    """
    deadline = deadline or Deadline.after(60.0)
    steps = _steps(_opened(layers), box, deadline)
    found, boxes = [], []
    for k, low in enumerate(lower):

        def measured(points: Tensor, k: int = k) -> float:
            return 0.0 if probe is None else probe(points)[k]

        goal = _Goal(low, tolerance, measured, deadline.part(1 / (2 - k)))
        bound, count = _searched(steps, box, goal, _Side(k == 1))
        found.append(bound)
        boxes.append(float(count))
    pair = Pair(*found)
    return Branched(pair, Pair(*boxes), {"forward": pair.forward, "inverse": pair.inverse})


@dataclass
class _Goal:
    """When a search ends: at ``tolerance`` times the best lower bound, or out of time."""

    lower: float
    tolerance: float
    probe: Callable[[Tensor], float]
    deadline: Deadline

    def raised(self, points: Tensor) -> None:
        """Look for a better lower bound at some points, while there is time."""
        if not self.deadline.passed:
            self.lower = max(self.lower, self.probe(points))

    @property
    def bound(self) -> float:
        """What an upper bound must come down to."""
        return self.lower * self.tolerance


@dataclass(frozen=True)
class _Side:
    """Which Jacobian is bounded."""

    of_inverse: bool

    def bound(self, steps: Sequence[Step], lo: Tensor, hi: Tensor) -> Tensor:
        """Per box, (B,)."""
        end = _through(steps, Interval(lo, hi), self)
        J = end.K if end.K is not None else end.J
        return interval_norm(J).nan_to_num(math.inf)


def _through(steps: Sequence[Step], boxes: Interval, side: _Side) -> State:
    count, d = boxes.shape
    eye = Interval.of(torch.eye(d, dtype=torch.float64).expand(count, d, d))
    centre = boxes.centre
    offset = (boxes - centre).map(lambda t: t[:, None])
    state = State(Interval.of(centre), boxes, eye, eye if side.of_inverse else None)
    for step in steps:
        state = step(state)
        reached = state.box.meet(state.centre + (state.J * offset).sum(2))
        state = State(state.centre, reached, state.J, state.K)
    return state


class _Pace:
    """Boxes in batches that are foreseen to end in time; those that are not reached stay unknown."""

    def __init__(self, steps: Sequence[Step], side: _Side, deadline: Deadline) -> None:
        self.steps, self.side, self.deadline = steps, side, deadline
        self.batch = FIRST

    def bounds(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Per box, (B,); infinite where time ran out."""
        found: list[Tensor] = []
        done = 0
        while done < len(lo) and not self.deadline.passed:
            left = self.deadline.left
            found.append(self.side.bound(self.steps, lo[done : done + self.batch], hi[done : done + self.batch]))
            done += len(found[-1])
            pace = max(left - self.deadline.left, 1e-9) / len(found[-1])
            self.batch = int(min(BATCH, 4 * self.batch, max(0.3 * self.deadline.left / pace, 1)))
        return torch.cat([*found, torch.full((len(lo) - done,), math.inf, dtype=torch.float64)])


def _searched(steps: Sequence[Step], box: Interval, goal: _Goal, side: _Side) -> tuple[float, int]:
    pace, count, settled = _Pace(steps, side, goal.deadline), 0, 0.0
    new_lo, new_hi = _grid(box)
    parent = torch.full((len(new_lo),), math.inf, dtype=torch.float64)
    lo, hi, bound = new_lo[:0], new_hi[:0], parent[:0]
    while True:
        count += len(new_lo)
        lo, hi = torch.cat([lo, new_lo]), torch.cat([hi, new_hi])
        bound = torch.cat([bound, torch.minimum(pace.bounds(new_lo, new_hi), parent)])
        worst = bound.topk(min(PROBED, len(bound))).indices
        goal.raised(lo[worst] / 2 + hi[worst] / 2)
        open_ = bound > goal.bound
        settled = max(settled, float(bound[~open_].max()) if bool((~open_).any()) else 0.0)
        lo, hi, bound = lo[open_], hi[open_], bound[open_]
        if not len(bound) or goal.deadline.passed:
            return max(settled, float(bound.max()) if len(bound) else 0.0), count
        worst = bound.topk(min(max(pace.batch // 2, 1), len(bound))).indices
        rest = torch.ones(len(bound), dtype=torch.bool)
        rest[worst] = False
        new_lo, new_hi = _halved(lo[worst], hi[worst])
        parent = bound[worst].repeat(2)
        lo, hi, bound = lo[rest], hi[rest], bound[rest]


def _halved(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Every box cut in two across its longest side."""
    rows, axis = torch.arange(len(lo)), (hi - lo).argmax(1)
    middle = (lo / 2 + hi / 2)[rows, axis]
    left, right = hi.clone(), lo.clone()
    left[rows, axis], right[rows, axis] = middle, middle
    return torch.cat([lo, right]), torch.cat([left, hi])


def _grid(box: Interval) -> tuple[Tensor, Tensor]:
    """About a thousand equal boxes that cover the box."""
    d = box.shape[0]
    side = max(round(1024 ** (1 / d)), 1)
    edges = [
        torch.linspace(float(a), float(b), side + 1, dtype=torch.float64) for a, b in zip(box.lo, box.hi, strict=True)
    ]
    for edge, a, b in zip(edges, box.lo, box.hi, strict=True):
        edge[0], edge[-1] = a, b
    corners = torch.cartesian_prod(*[torch.arange(side) for _ in range(d)]).reshape(-1, d)
    lo = torch.stack([edge[corners[:, k]] for k, edge in enumerate(edges)], 1)
    hi = torch.stack([edge[corners[:, k] + 1] for k, edge in enumerate(edges)], 1)
    return lo, hi


def _opened(layers: Sequence[BoundedMap]) -> list[BoundedMap]:
    return [part for m in layers for part in (_opened(m.parts) if isinstance(m, Composition) else [m])]


def _steps(layers: Sequence[BoundedMap], box: Interval, deadline: Deadline) -> list[Step]:
    """The steps, tables made for what points of the box reach, widened; what leaves them gets infinite bounds."""
    points, _ = _grid(box)
    far = torch.stack([box.lo, box.hi, box.centre])
    points = torch.cat([points, far])
    reach, steps = box, []
    state = Interval.of(points)
    eye = torch.eye(points.shape[1], dtype=torch.float64).expand(len(points), -1, -1)
    for layer in layers:
        if deadline.passed:
            raise Unbounded("time ran out")
        step = step_of(layer, reach)
        steps.append(step)
        state = step(State(state, state, Interval.of(eye), None)).box
        seen = Interval(state.lo.amin(0), state.hi.amax(0))
        margin = SPREAD * (seen.hi - seen.lo) + 1e-3
        reach = Interval(seen.lo - margin, seen.hi + margin)
        if not reach.bounded:
            raise Unbounded("values leave the range of floats")
    return steps

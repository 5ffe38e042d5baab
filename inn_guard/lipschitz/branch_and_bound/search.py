"""Branch and bound on boxes of a few dimensions with Jacobians as affine forms, rounded outwards.

Every box carries its image and J, or J^-1, through all layers: linear in the box's coordinates up
to a rest of second order in its width. The norm of such a matrix is at most its norm at the worst
corner plus that of its rest. The boxes with the largest bounds are split until the bound meets the
witnessed lower bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inn_guard.core.tensors import finite_rows
from inn_guard.execution.deadline import Deadline, spend
from inn_guard.lipschitz.branch_and_bound.affine_forms import ROUNDED, AffineForm
from inn_guard.lipschitz.branch_and_bound.propagation import State, Step, step_of
from inn_guard.lipschitz.maps.base import BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.composition import Composition
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import UNIT

__all__ = ["BranchAndBoundResult", "branch_and_bound", "form_norm"]

CORNERS = 6  #: coordinates up to which all corners are looked at
GRID = 1024  #: boxes to begin with
BATCH = 8192  #: boxes evaluated at once
FIRST = 256  #: boxes evaluated at first, to measure how long they take
PROBED = 32  #: middles of the worst boxes at which the lower bound is measured
STEP, BOX = 4e6, 2e4  #: operations in the time of one layer, for all boxes and for each in 2-D
SPREAD = 0.5  #: margin of a table beyond the values seen, in units of their range
ENLARGED = 1e-10  #: by which a singular value is enlarged before it is checked


@dataclass(frozen=True)
class BranchAndBoundResult:
    """What the search proved.

    Attributes:
        pair: bounds of sup ||J|| and sup ||J^-1|| over the box.
        boxes: number of boxes evaluated, per direction.
        leaves: the same bounds by name, for a certificate.
    """

    pair: Pair
    boxes: Pair
    leaves: Mapping[str, float] = field(default_factory=dict)


Probe = Callable[[Tensor], Pair]


def branch_and_bound(
    layers: Sequence[BoundedMap],
    box: Interval,
    *,
    lower: Pair,
    probe: Probe | None = None,
    deadline: Deadline | None = None,
    tolerance: float = 1.005,
) -> BranchAndBoundResult:
    """Bounds of sup ||J|| and sup ||J^-1|| over a bounded box.

    Args:
        layers: the maps in order.
        box: (d,), bounded.
        lower: witnessed lower bounds; a direction ends at a bound ``tolerance`` times as large.
        probe: measures both lower bounds at points (B, d), the middles of the worst boxes.
        deadline: of both directions together; default: a minute from now.
        tolerance: see ``lower``.

    Returns:
        The bounds; infinite where time ran out before every box had a finite one.

    Raises:
        Unbounded: if a layer has no interval Jacobian, or time runs out before the search begins.
    """
    deadline = deadline or Deadline.after(60.0)
    steps = _steps(_flattened(layers), box, deadline)
    direction = _Direction(steps, probe, of_inverse=False)
    goal = _Goal(lower.forward, tolerance, deadline.fraction(0.5))
    forward, first_count = _searched(direction, box, goal)
    direction = _Direction(steps, probe, of_inverse=True)
    inverse, last_count = _searched(direction, box, _Goal(lower.inverse, tolerance, deadline))
    return BranchAndBoundResult(
        Pair(forward, inverse),
        Pair(float(first_count), float(last_count)),
        leaves={"forward": forward, "inverse": inverse},
    )


def form_norm(J: AffineForm) -> Tensor:
    """An upper bound of the spectral norm of every matrix in J (B, m, n), small m and n, (B,).

    The norm is convex: the linear part is largest at a corner of the box, and the rest adds at most
    its own norm. Of many coordinates the linear part counts as rest.
    """
    if len(J.slopes) > CORNERS:
        rest = J.rest + J.linear + ROUNDED * (J.middle.abs() + J.linear)
        norm = matrix_norms(J.middle) + matrix_norms(rest)
        return (norm * (1 + 4 * UNIT)).nan_to_num(math.inf, math.inf)
    largest = torch.zeros(len(J.middle), dtype=torch.float64)
    for signs in itertools.product((-1.0, 1.0), repeat=len(J.slopes)):
        corner = torch.tensor(signs, dtype=torch.float64)[:, None, None, None]
        largest = torch.maximum(largest, matrix_norms(J.middle + (corner * J.slopes).sum(0)))
    rest = J.rest + ROUNDED * (J.middle.abs() + J.linear)
    norm = largest + matrix_norms(rest)
    return (norm * (1 + 4 * UNIT)).nan_to_num(math.inf, math.inf)


def matrix_norms(A: Tensor) -> Tensor:
    """Upper bounds of the spectral norms of matrices (B, m, n) of up to a few dozen rows, (B,)."""
    scale = A.abs().amax((1, 2)).clamp(1e-300, 1e300)
    A = A / scale[:, None, None]
    if A.shape[1:] != (2, 2):
        return _by_singular_values(A) * scale * (1 + 16 * UNIT)
    # sigma_1 +- sigma_2 squared are |A|_F^2 +- 2 |det A|, each known up to a few units of |A|_F^2
    square = A.square().sum((1, 2))
    slack = 16 * UNIT * square
    twice = 2 * (A[:, 0, 0] * A[:, 1, 1] - A[:, 0, 1] * A[:, 1, 0]).abs()
    total = (square + twice + slack).sqrt()
    difference = ((square - twice).clamp_min(0) + slack).sqrt()
    return (total + difference) / 2 * scale * (1 + 16 * UNIT)


def _by_singular_values(A: Tensor) -> Tensor:
    """Singular values, enlarged and checked by a Cholesky factorisation of s^2 I - A^T A.

    For up to a few dozen rows the rounding of the check is far below its margin, a tenth of what
    the singular values are enlarged by.
    """
    known = finite_rows(A)
    finite = torch.where(known[:, None, None], A, 0.0)
    s = torch.linalg.matrix_norm(finite, 2) * (1 + ENLARGED)
    gram = -(finite.mT @ finite)
    gram.diagonal(dim1=1, dim2=2).add_((s.square() * (1 - 0.1 * ENLARGED))[:, None])
    proved = known & (torch.linalg.cholesky_ex(gram)[1] == 0)
    zero = (A == 0).all(2).all(1)
    return torch.where(proved | zero, s, math.inf)


@dataclass(frozen=True)
class _Direction:
    """Which Jacobian is bounded, and how."""

    steps: Sequence[Step]
    probe: Probe | None
    of_inverse: bool

    def bounds(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Upper bounds, per box, (B,)."""
        start = State.of(Interval(lo, hi))
        if self.of_inverse:
            jacobian = self._after(State(start.x, None, start.K)).K
        else:
            jacobian = self._after(State(start.x, start.J, None)).J
        if jacobian is None:
            return torch.full((len(lo),), math.inf, dtype=torch.float64)
        return form_norm(jacobian)

    def lower_bound(self, points: Tensor) -> float:
        """The lower bound after a measurement at some points."""
        if self.probe is None:
            return 0.0
        found = self.probe(points)
        if self.of_inverse:
            return found.inverse
        return found.forward

    def _after(self, state: State) -> State:
        for step in self.steps:
            boxes, size = state.x.middle.shape[:2]
            spend(STEP + BOX * boxes * (size / 2) ** 4)
            state = step(state)
        return state


@dataclass
class _Goal:
    """When a search ends: at ``tolerance`` times the best lower bound, or out of time."""

    lower: float
    tolerance: float
    deadline: Deadline

    def raise_lower_bound(self, direction: _Direction, points: Tensor) -> None:
        """Measure the lower bound at some points, while there is time."""
        if not self.deadline.passed:
            self.lower = max(self.lower, direction.lower_bound(points))

    @property
    def bound(self) -> float:
        """What an upper bound must come down to."""
        return self.lower * self.tolerance


class _BatchScheduler:
    """Boxes in batches that are expected to end in time."""

    def __init__(self, direction: _Direction, deadline: Deadline) -> None:
        self.direction, self.deadline = direction, deadline
        self.batch = FIRST

    def bounds(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Per box, (B,); infinite where time ran out."""
        found = torch.full((len(lo),), math.inf, dtype=torch.float64)
        done = 0
        while done < len(lo) and not self.deadline.passed:
            before, batch = self.deadline.left, slice(done, done + self.batch)
            found[batch] = self.direction.bounds(lo[batch], hi[batch])
            count = len(lo[batch])
            done += count
            seconds = max(before - self.deadline.left, 1e-9) / count
            affordable = max(0.3 * self.deadline.left / seconds, 1)
            self.batch = int(min(BATCH, 4 * self.batch, affordable))
        return found


def _searched(direction: _Direction, box: Interval, goal: _Goal) -> tuple[float, int]:
    """The bound over the box, with the number of boxes evaluated."""
    scheduler, count, closed_bound = _BatchScheduler(direction, goal.deadline), 0, 0.0
    new_lo, new_hi = _grid(box)
    parent = torch.full((len(new_lo),), math.inf, dtype=torch.float64)
    lo, hi, bound = new_lo[:0], new_hi[:0], parent[:0]
    while True:
        count += len(new_lo)
        lo, hi = torch.cat([lo, new_lo]), torch.cat([hi, new_hi])
        bound = torch.cat([bound, torch.minimum(scheduler.bounds(new_lo, new_hi), parent)])
        worst = bound.topk(min(PROBED, len(bound))).indices
        goal.raise_lower_bound(direction, lo[worst] / 2 + hi[worst] / 2)
        is_open = bound > goal.bound
        closed_bound = max(closed_bound, _largest(bound[~is_open]))
        lo, hi, bound = lo[is_open], hi[is_open], bound[is_open]
        if not len(bound) or goal.deadline.passed:
            return max(closed_bound, _largest(bound)), count
        worst = bound.topk(min(max(scheduler.batch // 2, 1), len(bound))).indices
        rest = torch.ones(len(bound), dtype=torch.bool)
        rest[worst] = False
        new_lo, new_hi = _halved(lo[worst], hi[worst])
        parent = bound[worst].repeat(2)
        lo, hi, bound = lo[rest], hi[rest], bound[rest]


def _largest(bounds: Tensor) -> float:
    """The largest of some bounds; 0 if there are none."""
    if not len(bounds):
        return 0.0
    return float(bounds.max())


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
    side = max(round(GRID ** (1 / d)), 1)
    corners = torch.cartesian_prod(*[torch.arange(side)] * d).reshape(-1, d)
    lo, hi = [], []
    for k, (start, end) in enumerate(zip(box.lo, box.hi, strict=True)):
        edges = torch.linspace(float(start), float(end), side + 1, dtype=torch.float64)
        edges[0], edges[-1] = start, end
        lo.append(edges[corners[:, k]])
        hi.append(edges[corners[:, k] + 1])
    return torch.stack(lo, 1), torch.stack(hi, 1)


def _flattened(layers: Sequence[BoundedMap]) -> list[BoundedMap]:
    """Layers with the parts of compositions in their place."""
    parts: list[BoundedMap] = []
    for layer in layers:
        if isinstance(layer, Composition):
            parts += _flattened(layer.parts)
        else:
            parts.append(layer)
    return parts


def _steps(layers: Sequence[BoundedMap], box: Interval, deadline: Deadline) -> list[Step]:
    """The steps, with tables for the values that points of the box reach, and some more.

    A box that leaves a table gets an infinite bound.
    """
    points, _ = _grid(box)
    points = torch.cat([points, torch.stack([box.lo, box.hi, box.centre])])
    state = State(AffineForm.coordinates(Interval(points, points)), None, None)
    domain, steps = box, []
    for layer in layers:
        if deadline.passed:
            raise Unbounded("time ran out")
        step = step_of(layer, domain)
        steps.append(step)
        state = step(state)
        image = state.x.range
        lo, hi = image.lo.amin(0), image.hi.amax(0)
        margin = SPREAD * (hi - lo) + 1e-3
        domain = Interval(lo - margin, hi + margin)
        if not domain.bounded:
            raise Unbounded("values leave the range of floats")
    return steps

"""Branch and bound on boxes of a few dimensions with Jacobians as affine forms, rounded outwards.

Every box carries its image and J, or J^-1, through all layers: linear in the box's coordinates up to a rest of second
order in its width. The norm of such a matrix is at most its norm at the worst corner plus that of its rest. The boxes
with the largest bounds are split until the bound meets the witnessed lower bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inn_guard.execution.deadline import Deadline
from inn_guard.lipschitz.branch_and_bound.affine_forms import ROUNDED, AffineForm
from inn_guard.lipschitz.branch_and_bound.propagation import State, Step, step_of
from inn_guard.lipschitz.maps.base import BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.composition import Composition
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import UNIT

__all__ = ["BranchAndBoundResult", "branch_and_bound", "form_norm"]

BATCH = 8192  #: boxes evaluated at once
FIRST = 256  #: boxes evaluated at first, to see how long they take
PROBED = 32  #: middles of the worst boxes at which the lower bound is measured
SPREAD = 0.5  #: margin of a table beyond the values seen, in units of their range


@dataclass(frozen=True)
class BranchAndBoundResult:
    """What the search proved.

    Attributes:
        pair: bounds of sup ||J|| and sup ||J^-1|| over the box.
        boxes: how many boxes were evaluated, per direction.
        leaves: the same bounds by name, for a certificate.
    """

    pair: Pair
    boxes: Pair
    leaves: Mapping[str, float] = field(default_factory=dict)


def form_norm(J: AffineForm) -> Tensor:
    """An upper bound of the spectral norm of every matrix in J (B, m, n), small m and n, (B,).

    The norm is convex: the linear part is largest at a corner of the box, and the rest adds at most its own norm.
    """
    signs = torch.tensor(
        list(itertools.product((-1.0, 1.0), repeat=len(J.slopes))), dtype=torch.float64
    )
    corners = [J.middle + (corner[:, None, None, None] * J.slopes).sum(0) for corner in signs]
    rest = J.rest + ROUNDED * (J.middle.abs() + J.linear)
    norm = torch.stack([matrix_norms(A) for A in corners]).amax(0) + matrix_norms(rest)
    return (norm * (1 + 4 * UNIT)).nan_to_num(math.inf, math.inf)


def matrix_norms(A: Tensor) -> Tensor:
    """An upper bound of the spectral norms of matrices (B, m, n) with two columns, or of a few dozen, (B,)."""
    scale = A.abs().amax((1, 2)).clamp(1e-300, 1e300)
    A = A / scale[:, None, None]
    if A.shape[1:] == (2, 2):
        # sigma_1 +- sigma_2 squared are |A|_F^2 +- 2 |det A|, each known up to a few units of |A|_F^2
        square = A.square().sum((1, 2))
        twice, slack = (
            2 * (A[:, 0, 0] * A[:, 1, 1] - A[:, 0, 1] * A[:, 1, 0]).abs(),
            16 * UNIT * square,
        )
        s = ((square + twice + slack).sqrt() + ((square - twice).clamp_min(0) + slack).sqrt()) / 2
    else:
        s = _by_singular_values(A)
    return s * scale * (1 + 16 * UNIT)


def _by_singular_values(A: Tensor) -> Tensor:
    """Singular values enlarged by 1e-10 and checked by a Cholesky factorisation of s^2 I - A^T A.

    For up to a few dozen rows its rounding is far below that margin.
    """
    known = A.flatten(1).isfinite().all(1)
    s = torch.linalg.matrix_norm(torch.where(known[:, None, None], A, 0.0), 2) * (1 + 1e-10)
    gram = -(A.mT @ A)
    gram.diagonal(dim1=1, dim2=2).add_((s.square() * (1 - 1e-11))[:, None])
    proved = known & (
        torch.linalg.cholesky_ex(torch.where(known[:, None, None], gram, 0.0))[1] == 0
    )
    return torch.where(proved | (A == 0).all(2).all(1), s, math.inf)


InputFamily = Callable[[Tensor], Pair]


def branch_and_bound(
    layers: Sequence[BoundedMap],
    box: Interval,
    *,
    lower: Pair,
    probe: InputFamily | None = None,
    deadline: Deadline | None = None,
    tolerance: float = 1.005,
) -> BranchAndBoundResult:
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

        goal = _Goal(low, tolerance, measured, deadline.fraction(1 / (2 - k)))
        bound, count = _searched(steps, box, goal, _Side(k == 1))
        found.append(bound)
        boxes.append(float(count))
    pair = Pair(*found)
    return BranchAndBoundResult(
        pair, Pair(*boxes), {"forward": pair.forward, "inverse": pair.inverse}
    )


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
        first = State.of(Interval(lo, hi))
        state = State(first.x, None, first.K) if self.of_inverse else State(first.x, first.J, None)
        for step in steps:
            state = step(state)
        J = state.K if self.of_inverse else state.J
        return torch.full((len(lo),), math.inf, dtype=torch.float64) if J is None else form_norm(J)


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
            found.append(
                self.side.bound(
                    self.steps, lo[done : done + self.batch], hi[done : done + self.batch]
                )
            )
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
        torch.linspace(float(a), float(b), side + 1, dtype=torch.float64)
        for a, b in zip(box.lo, box.hi, strict=True)
    ]
    for edge, a, b in zip(edges, box.lo, box.hi, strict=True):
        edge[0], edge[-1] = a, b
    corners = torch.cartesian_prod(*[torch.arange(side) for _ in range(d)]).reshape(-1, d)
    lo = torch.stack([edge[corners[:, k]] for k, edge in enumerate(edges)], 1)
    hi = torch.stack([edge[corners[:, k] + 1] for k, edge in enumerate(edges)], 1)
    return lo, hi


def _opened(layers: Sequence[BoundedMap]) -> list[BoundedMap]:
    return [
        part for m in layers for part in (_opened(m.parts) if isinstance(m, Composition) else [m])
    ]


def _steps(layers: Sequence[BoundedMap], box: Interval, deadline: Deadline) -> list[Step]:
    """The steps, tables made for what points of the box reach, widened; what leaves them gets infinite bounds."""
    points, _ = _grid(box)
    far = torch.stack([box.lo, box.hi, box.centre])
    points = torch.cat([points, far])
    reach, steps = box, []
    state = State(AffineForm.coordinates(Interval(points, points)), None, None)
    for layer in layers:
        if deadline.passed:
            raise Unbounded("time ran out")
        step = step_of(layer, reach)
        steps.append(step)
        state = step(state)
        image = state.x.range
        seen = Interval(image.lo.amin(0), image.hi.amax(0))
        margin = SPREAD * (seen.hi - seen.lo) + 1e-3
        reach = Interval(seen.lo - margin, seen.hi + margin)
        if not reach.bounded:
            raise Unbounded("values leave the range of floats")
    return steps

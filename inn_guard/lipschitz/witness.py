"""Lower bounds that can be replayed: a point and a direction that the map stretches, or shrinks, so much."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.execution.deadline import Deadline
from inn_guard.jacobian.chain import Linearization, LogScaledVector
from inn_guard.jacobian.checks import dense_jacobian
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import UNIT

__all__ = ["Witness", "better", "measure", "search", "starting_points"]

DENSE = 64  #: dimensions up to which whole Jacobians are taken
FEW = 4  #: points that are measured however little time there is
POWERS = 20  #: power iterations
EDGE = 1e-9  #: of the box's width that points keep from its faces
EVALUATION = 1e-9  #: relative error allowed to the evaluation of a ratio in float64


@dataclass(frozen=True)
class Witness:
    """||J(x) v|| / ||v|| = forward, hence Lip(F) >= forward and Lip(F^-1) >= 1 / forward.

    Attributes:
        x: the point, of the shape of one sample, float64.
        v: the direction, of the same shape, of length one.
        ratio: ||J(x) v|| as it was found. Where whole Jacobians are taken, less what rounding in their product may have
            added where v is stretched most, and more by what it may have hidden where v is shrunk most.
    """

    x: Tensor
    v: Tensor
    ratio: float

    def replay(self, model: Invertible) -> float:
        """||J(x) v|| / ||v||, computed again in float64."""
        stretched = Linearization(model.to_dtype(torch.float64), self.x[None]).jvp(
            LogScaledVector.from_vector(self.v[None])
        )
        return float(stretched.log_norm().exp())


def search(
    model: Invertible, points: Tensor, box: Interval, *, deadline: Deadline | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Witness | None, Witness | None]:  # fmt: skip
    """The points and directions that stretch most and shrink most: data first, then a local random search in the box.

    Args:
        model: the map, in float64.
        points: where to begin, (B, *data); those outside the box are moved onto it.
        box: where to search, of the shape of one sample.
        deadline: after which no round is begun; 5 seconds unless given.
        generator: of the random steps.

    Returns:
        (most stretched, most shrunk), each None where nothing finite was found.
    """
    generator = generator or torch.Generator().manual_seed(0)
    deadline, points = deadline or Deadline.after(5.0), _inside(points.double(), box)
    stretch = shrink = None
    left = deadline.left
    first, last = measure(model, points, deadline.fraction(0.5))
    radius = 0.1 * _extent(points, box)
    while True:
        stretch, shrink = better(stretch, first, largest=True), better(shrink, last, largest=False)
        took, left = left - deadline.left, deadline.left
        if stretch is None or shrink is None or left < min(took, 1e9) or float(radius.max()) < 1e-9:
            return stretch, shrink
        near = [
            w.x + radius * torch.randn(32, *w.x.shape, generator=generator, dtype=torch.float64)
            for w in (stretch, shrink)
        ]
        first, last = measure(model, _inside(torch.cat(near), box), deadline)
        radius = radius * 0.8


def starting_points(box: Interval, count: int, generator: torch.Generator) -> Tensor:
    """Points (count, *shape): uniform in a bounded box, standard normal in unbounded directions."""
    lo, hi = box.lo, box.hi
    unit = torch.rand(count, *lo.shape, generator=generator, device="cpu", dtype=torch.float64)
    normal = torch.randn(count, *lo.shape, generator=generator, device="cpu", dtype=torch.float64)
    finite = lo.isfinite() & hi.isfinite()
    points = torch.where(
        finite,
        lo.nan_to_num(0, 0, 0) + (hi.nan_to_num(0, 0, 0) - lo.nan_to_num(0, 0, 0)) * unit,
        normal,
    )
    return _inside(points, box)


def _inside(points: Tensor, box: Interval) -> Tensor:
    # not onto its faces: where a spline ends with the box, libraries clamp, and the derivative there is that of a clamp
    edge = EDGE * (box.hi - box.lo).nan_to_num(0, 0, 0)
    return torch.minimum(torch.maximum(points, box.lo + edge), box.hi - edge)


def _extent(points: Tensor, box: Interval) -> Tensor:
    width = box.hi - box.lo
    return torch.where(width.isfinite(), width, points.std(0, unbiased=False) + 0.1)


def measure(
    model: Invertible, points: Tensor, deadline: Deadline | None = None
) -> tuple[Witness | None, Witness | None]:
    """The most stretched and the most shrunk direction at some points: singular vectors, or power iterations.

    The first few points are measured in any case, the others while there is time.
    """
    deadline = deadline or Deadline()
    if points[0].numel() > DENSE:
        return _iterated(model, points[:FEW], deadline)
    stretch = shrink = None
    done, count = 0, FEW
    while done < len(points):
        left = deadline.left
        first, last = _dense(model, points[done : done + count])
        stretch, shrink = better(stretch, first, largest=True), better(shrink, last, largest=False)
        done, count = done + count, 4 * count
        if deadline.left < 4 * min(left - deadline.left, 1e9):
            break
    return stretch, shrink


def better(best: Witness | None, found: Witness | None, **goal: bool) -> Witness | None:
    """The one with the larger ratio, or with the smaller one unless ``largest``."""
    if best is None or found is None:
        return best or found
    return max((best, found), key=lambda w: w.ratio if goal["largest"] else -w.ratio)


def _dense(model: Invertible, points: Tensor) -> tuple[Witness | None, Witness | None]:
    """The best of all singular vectors."""
    J = largest = torch.eye(points[0].numel(), dtype=torch.float64).expand(len(points), -1, -1)
    line = Linearization(model, points)
    for tangent, state in zip(line.jacobians, line.states, strict=False):
        factor = dense_jacobian(tangent, state)
        J, largest = factor @ J, factor.abs() @ largest
    finite = J.flatten(1).isfinite().all(1)
    if not bool(finite.any()):
        return None, None
    points, J, largest = points[finite], J[finite], largest[finite]
    values, V = torch.linalg.svd(J, full_matrices=False)[1:]
    top, bottom = int(values[:, 0].argmax()), int(values[:, -1].argmin())
    shape = points.shape[1:]
    # of entries that nearly cancel in the product of the factors nothing but rounding may be left
    rounding = len(line.jacobians) * J.shape[2] * 2 * UNIT * largest.flatten(1).norm(dim=1)
    stretched = float(values[top, 0] - rounding[top])
    shrunk = float((J[bottom] @ V[bottom, -1]).norm() + rounding[bottom])
    stretch = Witness(points[top], V[top, 0].reshape(shape), stretched) if stretched > 0 else None
    return stretch, Witness(
        points[bottom], V[bottom, -1].reshape(shape), shrunk
    ) if shrunk > 0 else None


def _iterated(
    model: Invertible, points: Tensor, deadline: Deadline
) -> tuple[Witness | None, Witness | None]:
    """Power iteration with J and, where the model has it, with J^-1: unconverged directions are witnesses as well."""
    line = Linearization(model, points)
    start = torch.randn(
        points.shape, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float64
    )
    v = w = LogScaledVector.from_vector(start)
    inverse = True
    for _ in range(POWERS):
        if deadline.passed:
            break
        v = LogScaledVector.from_vector(
            line.vjp(
                LogScaledVector.from_vector(line.jvp(LogScaledVector.from_vector(v.vector)).vector)
            ).vector
        )
        if inverse:
            try:
                w = LogScaledVector.from_vector(
                    line.inverse_jvp(
                        LogScaledVector.from_vector(
                            line.inverse_vjp(LogScaledVector.from_vector(w.vector)).vector
                        )
                    ).vector
                )
            except (NotImplementedError, RuntimeError, ValueError):
                inverse = False
    return _pick(line, v, points, largest=True), _pick(line, w, points, largest=False)


def _pick(line: Linearization, v: LogScaledVector, points: Tensor, **goal: bool) -> Witness | None:
    ratios = line.jvp(LogScaledVector.from_vector(v.vector)).log_norm().exp()
    finite = (ratios.isfinite() & (ratios > 0)).nonzero().flatten()
    if not len(finite):
        return None
    k = int(finite[ratios[finite].argmax() if goal["largest"] else ratios[finite].argmin()])
    return Witness(points[k], v.vector[k], float(ratios[k]))

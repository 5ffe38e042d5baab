"""Lower bounds that can be replayed: a point, a direction and how much the map stretches it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.tensors import finite_rows
from inn_guard.execution.deadline import Deadline, spend
from inn_guard.jacobian.chain import Linearization, LogScaledVector
from inn_guard.jacobian.checks import dense_jacobian
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import UNIT

__all__ = ["Witness", "Witnesses", "measure", "search", "starting_points"]

DENSE = 64  #: dimensions up to which whole Jacobians are taken
FEW = 4  #: points that are measured even if there is no time
POWERS = 20  #: power iterations
CALL = 1e6  #: operations in the time that a product with one layer's Jacobian takes at least
EDGE = 1e-9  #: distance of points from the faces of the box, in widths of the box


@dataclass(frozen=True)
class Witness:
    """||J(x) v|| / ||v|| = ratio, hence Lip(F) >= ratio and Lip(F^-1) >= 1 / ratio.

    Attributes:
        x: the point, of the shape of one sample, float64.
        v: the direction, of the same shape, of length one.
        ratio: ||J(x) v||. From whole Jacobians it includes the rounding error of their product:
            subtracted for the most stretched direction, added for the most shrunk one.
    """

    x: Tensor
    v: Tensor
    ratio: float

    def replay(self, model: Invertible) -> float:
        """||J(x) v|| / ||v||, computed again in float64."""
        line = Linearization(model.to_dtype(torch.float64), self.x[None])
        return float(line.jvp(_unit(self.v[None])).log_norm().exp())


class Witnesses(NamedTuple):
    """The most stretched and the most shrunk direction, each None where there is none."""

    stretched: Witness | None = None
    shrunk: Witness | None = None

    def joined(self, other: Witnesses) -> Witnesses:
        """Of both, the larger and the smaller ratio."""
        stretched = [w for w in (self.stretched, other.stretched) if w is not None]
        shrunk = [w for w in (self.shrunk, other.shrunk) if w is not None]
        return Witnesses(
            max(stretched, key=_ratio, default=None), min(shrunk, key=_ratio, default=None)
        )

    @property
    def lower(self) -> Pair:
        """The lower bounds of sup ||J|| and sup ||J^-1|| that they prove."""
        forward = inverse = 0.0
        if self.stretched is not None:
            forward = self.stretched.ratio
        if self.shrunk is not None:
            inverse = 1 / self.shrunk.ratio
        return Pair(forward, inverse)


def _ratio(witness: Witness) -> float:
    return witness.ratio


def search(
    model: Invertible,
    points: Tensor,
    box: Interval,
    *,
    deadline: Deadline | None = None,
    generator: torch.Generator | None = None,
) -> Witnesses:
    """The directions that are stretched and shrunk most: at the points, then by a random search.

    Args:
        model: the map, in float64.
        points: where the search begins, (B, *data); points outside the box are moved onto it.
        box: where to search, of the shape of one sample.
        deadline: no round begins after it; default: in 5 seconds.
        generator: source of the random steps; default: seed 0.

    Returns:
        The best ones found.
    """
    generator = generator or torch.Generator().manual_seed(0)
    deadline, points = deadline or Deadline.after(5.0), _inside(points.double(), box)
    left = deadline.left
    found = measure(model, points, deadline.fraction(0.5))
    radius = 0.1 * _extent(points, box)
    while found.stretched is not None and found.shrunk is not None:
        took, left = left - deadline.left, deadline.left
        # an infinite deadline gives no duration; the radius ends the search then
        if left < min(took, 1e9) or float(radius.max()) < 1e-9:
            break
        near = []
        for witness in (found.stretched, found.shrunk):
            steps = torch.randn(32, *witness.x.shape, generator=generator, dtype=torch.float64)
            near.append(witness.x + radius * steps)
        found = found.joined(measure(model, _inside(torch.cat(near), box), deadline))
        radius = radius * 0.8
    return found


def starting_points(box: Interval, count: int, generator: torch.Generator) -> Tensor:
    """Points (count, *shape): uniform in a bounded box, standard normal in unbounded directions."""
    lo, hi = box.lo.nan_to_num(0, 0, 0), box.hi.nan_to_num(0, 0, 0)
    shape = (count, *lo.shape)
    unit = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float64)
    normal = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)
    is_bounded = box.lo.isfinite() & box.hi.isfinite()
    return _inside(torch.where(is_bounded, lo + (hi - lo) * unit, normal), box)


def _inside(points: Tensor, box: Interval) -> Tensor:
    # off the faces: where a spline ends with the box, libraries clamp, and the derivative there is
    # that of the clamp
    edge = EDGE * (box.hi - box.lo).nan_to_num(0, 0, 0)
    return torch.minimum(torch.maximum(points, box.lo + edge), box.hi - edge)


def _extent(points: Tensor, box: Interval) -> Tensor:
    width = box.hi - box.lo
    return torch.where(width.isfinite(), width, points.std(0, unbiased=False) + 0.1)


def measure(model: Invertible, points: Tensor, deadline: Deadline | None = None) -> Witnesses:
    """The most stretched and the most shrunk direction at some points.

    By singular vectors, or by power iterations where Jacobians are large. The first few points are
    always measured, the others while there is time.
    """
    deadline = deadline or Deadline()
    if points[0].numel() > DENSE:
        return _by_power_iteration(model, points[:FEW], deadline)
    found = Witnesses()
    done, count = 0, FEW
    while done < len(points):
        left = deadline.left
        found = found.joined(_by_singular_vectors(model, points[done : done + count]))
        done, count = done + count, 4 * count
        if deadline.left < 4 * min(left - deadline.left, 1e9):
            break
    return found


def _by_singular_vectors(model: Invertible, points: Tensor) -> Witnesses:
    eye = torch.eye(points[0].numel(), dtype=torch.float64)
    J = magnitude = eye.expand(len(points), -1, -1)
    line = Linearization(model, points)
    size = points[0].numel()
    spend(len(line.jacobians) * (CALL * size + len(points) * size * _operations(model, points)))
    for jacobian, state in zip(line.jacobians, line.states, strict=False):
        factor = dense_jacobian(jacobian, state)
        J, magnitude = factor @ J, factor.abs() @ magnitude
    finite = finite_rows(J)
    if not bool(finite.any()):
        return Witnesses()
    points, J, magnitude = points[finite], J[finite], magnitude[finite]
    values, V = torch.linalg.svd(J, full_matrices=False)[1:]
    top, bottom = int(values[:, 0].argmax()), int(values[:, -1].argmin())
    # entries that nearly cancel in the product of the factors may be nothing but rounding
    rounding = len(line.jacobians) * J.shape[2] * 2 * UNIT * magnitude.flatten(1).norm(dim=1)
    stretched = float(values[top, 0] - rounding[top])
    shrunk = float((J[bottom] @ V[bottom, -1]).norm() + rounding[bottom])
    shape = points.shape[1:]
    return Witnesses(
        _witness(points[top], V[top, 0].reshape(shape), stretched),
        _witness(points[bottom], V[bottom, -1].reshape(shape), shrunk),
    )


def _witness(x: Tensor, v: Tensor, ratio: float) -> Witness | None:
    if not ratio > 0:
        return None
    return Witness(x, v, ratio)


def _by_power_iteration(model: Invertible, points: Tensor, deadline: Deadline) -> Witnesses:
    """Power iteration with J and, if the model has it, J^-1; it need not have converged."""
    line = Linearization(model, points)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(points.shape, generator=generator, device="cpu", dtype=torch.float64)
    v = w = _unit(start)
    has_inverse = True
    for _ in range(POWERS):
        if deadline.passed:
            break
        spend(4 * (len(line.jacobians) * CALL + len(points) * _operations(model, points)))
        v = _unit(line.vjp(_unit(line.jvp(v).vector)).vector)
        if not has_inverse:
            continue
        try:
            w = _unit(line.inverse_jvp(_unit(line.inverse_vjp(w).vector)).vector)
        except (NotImplementedError, RuntimeError, ValueError):
            has_inverse = False
    stretched, shrunk = _measured(line, v, points), _measured(line, w, points)
    return Witnesses(
        max(stretched, key=_ratio, default=None), min(shrunk, key=_ratio, default=None)
    )


def _operations(model: Invertible, points: Tensor) -> float:
    """About how many operations one product with the Jacobian takes for one sample."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    positions = points.shape[2:].numel()
    return 4.0 * (parameters * positions + points[0].numel())


def _unit(vector: Tensor) -> LogScaledVector:
    return LogScaledVector.from_vector(vector)


def _measured(line: Linearization, v: LogScaledVector, points: Tensor) -> list[Witness]:
    """||J v|| at every point where it is finite and not zero."""
    v = _unit(v.vector)
    ratios = line.jvp(v).log_norm().exp().tolist()
    witnesses = []
    for x, direction, ratio in zip(points, v.vector, ratios, strict=True):
        if 0 < ratio < math.inf:
            witnesses.append(Witness(x, direction, ratio))
    return witnesses

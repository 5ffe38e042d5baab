"""What the experiments measure of stability: round trips and singular values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.common.runner import Row
from inn_guard.audits.round_trip import RoundTrip
from inn_guard.core.invertible import Invertible
from inn_guard.jacobian.chain import Linearization
from inn_guard.report.result import AuditResult

__all__ = [
    "condition_numbers",
    "euclidean_errors",
    "round_trip_error",
    "singular_values",
    "spectrum_row",
]


def euclidean_errors(trip: RoundTrip) -> Tensor:
    """||F^-1(F(x)) - x||, (B,); inf where it is not finite."""
    return torch.where(trip.finite, trip.l2, math.inf)


@torch.no_grad()
def round_trip_error(net: Invertible, x: Tensor) -> Tensor:
    """||F^-1(F(x)) - x||, (B,), in one batch; inf where it is not finite."""
    error = (net.inverse(net(x)) - x).flatten(1).norm(dim=1)
    return error.nan_to_num(math.inf, posinf=math.inf)


def spectrum_row(found: AuditResult) -> Row:
    """Condition number, sigma_min and sigma_max, each the worst of all samples; NaN if unknown."""
    names = ("condition_number", "sigma_min", "sigma_max")
    return {name: found.values.get(name, math.nan) for name in names}


def condition_numbers(found: AuditResult) -> Tensor:
    """The condition number of every sample; one NaN if they are unknown."""
    return found.per_sample.get("condition_number", torch.tensor([math.nan]))


@torch.no_grad()
def singular_values(net: Invertible, x: Tensor) -> tuple[Tensor, Tensor]:
    """(sigma_max, sigma_min) of J at every point x (B, 2).

    sigma_min is 1 / sigma_max(J^-1), which loses fewer digits.
    """
    linearization = Linearization(net, x)
    jacobian, inverse = [], []
    for unit in torch.eye(2, dtype=x.dtype):
        direction = unit.expand_as(x)
        jacobian.append(linearization.jvp(direction).value())
        inverse.append(linearization.inverse_jvp(direction).value())
    return _norms(torch.stack(jacobian, dim=2)), 1 / _norms(torch.stack(inverse, dim=2))


def _norms(matrices: Tensor) -> Tensor:
    finite = matrices.isfinite().all(dim=2).all(dim=1)
    norms = torch.linalg.matrix_norm(matrices.nan_to_num(0.0, 0.0, 0.0), ord=2)
    return torch.where(finite, norms, math.inf)

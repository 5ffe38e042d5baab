"""What the two-dimensional experiments look at: round trips and singular values of every point."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.jacobian.chain import Linearization

__all__ = ["round_trip_error", "singular_values"]


@torch.no_grad()
def round_trip_error(net: Invertible, x: Tensor) -> Tensor:
    """||F^-1(F(x)) - x||, (B,); inf where it is not finite."""
    return (net.inverse(net(x)) - x).norm(dim=1).nan_to_num(math.inf, posinf=math.inf)


@torch.no_grad()
def singular_values(net: Invertible, x: Tensor) -> tuple[Tensor, Tensor]:
    """(sigma_max, sigma_min) of J at every point x (B, 2): the latter as 1 / sigma_max(J^-1), which rounds less."""
    tangent = Linearization(net, x)
    units = [unit.expand_as(x) for unit in torch.eye(2, dtype=x.dtype)]
    ahead = torch.stack([tangent.jvp(unit).value() for unit in units], dim=2)
    back = torch.stack([tangent.inverse_jvp(unit).value() for unit in units], dim=2)
    return _norms(ahead), 1 / _norms(back)


def _norms(matrices: Tensor) -> Tensor:
    finite = matrices.isfinite().all(dim=2).all(dim=1)
    norms = torch.linalg.matrix_norm(matrices.nan_to_num(0.0, 0.0, 0.0), ord=2)
    return torch.where(finite, norms, math.inf)

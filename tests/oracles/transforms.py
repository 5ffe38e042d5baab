"""Slow twins: the plainest possible computation of what the library computes fast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(B, dim z, dim x), by rows: one backward pass for every entry of z of every sample.

    The whole batch is evaluated, so that batch-coupled layers and contexts see what they see
    otherwise.
    """
    x = x.detach().clone().requires_grad_()
    z = function(x).flatten(1)
    samples = []
    for b in range(len(z)):
        rows = [
            torch.autograd.grad(z[b, k], x, retain_graph=True)[0][b].flatten()
            for k in range(z.shape[1])
        ]
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def log_abs_det(jacobians: Tensor) -> Tensor:
    """log|det J| in nats, (B,), by dense LU of every sample's square J."""
    return torch.stack([torch.linalg.slogdet(J.double()).logabsdet for J in jacobians])


def round_trip(model: Invertible, x: Tensor) -> Tensor:
    """||F^-1(F(x)) - x|| per sample, (B,), as one would type it."""
    with torch.no_grad():
        back = model.inverse(model.forward(x))
    return torch.stack([(back[b] - x[b]).flatten().double().norm() for b in range(len(x))])


def singular_values(jacobians: Tensor) -> Tensor:
    """(B, min(dim z, dim x)), largest first, by dense SVD in float64 of every sample's J."""
    return torch.stack([torch.linalg.svdvals(J.double()) for J in jacobians])

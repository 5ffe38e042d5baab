"""log|det J| of a chain of layers: exact from dense Jacobians, or stochastic from products."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.jacobian.chain import Linearization, LogScaledVector, log_scaled
from inn_guard.jacobian.lanczos import Bidiagonalization
from inn_guard.jacobian.singular_values import full_jacobian

__all__ = ["composed_log_det", "stochastic_log_det"]


def composed_log_det(model: Invertible, x: Float[Tensor, "batch *data"]) -> Tensor:
    """log|det J| in nats, (B,) float64: the sum of slogdet of each layer's dense Jacobian.

    The decompositions are in float64. A sum over layers stays accurate where the determinant of
    the product does not: the condition number of a layer is far below that of the chain.

    Args:
        model: a bijective map; without layers() it counts as one layer.
        x: data, (B, *data).

    Raises:
        NotApplicable: if a layer's output does not depend on its input through autograd.
    """
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for layer in model.layers() or (model,):
        total = total + torch.linalg.slogdet(full_jacobian(layer.forward, x).double()).logabsdet
        with torch.no_grad():
            x = layer(x)
    return total


def stochastic_log_det(
    linearization: Linearization, *, probes: int = 8, steps: int = 16, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """An estimate of log|det J| = 1/2 tr log J^T J in nats and its standard error, (B,) float64.

    Stochastic Lanczos quadrature, layer by layer. Let v be a vector of random signs, of unit
    length, and B the bidiagonal projection of the layer's Jacobian started from v. Then
    v^T log(J^T J) v = sum_i q_i^2 log theta_i^2, with theta_i the singular values of B and q_i the
    first entries of its right singular vectors. Only products are needed. The error is statistical.

    Args:
        linearization: of the model at x.
        probes: number of independent estimates, whose scatter gives the standard error.
        steps: Lanczos steps per layer and probe.
        generator: of the probes, on the CPU.

    References:
        Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature (Ubaru, Chen, Saad, 2017),
        Algorithm 1.
    """
    output = linearization.output
    estimates = []
    for _ in range(probes):
        total = torch.zeros(len(output), dtype=torch.float64, device=output.device)
        for k in range(len(linearization.layers)):
            jacobian, like = linearization.forward_checked(k), linearization.states[k]
            signs = 2.0 * torch.randint(0, 2, like.shape, generator=generator, device="cpu") - 1.0
            product, adjoint = log_scaled(jacobian.jvp), log_scaled(jacobian.vjp)
            total = total + _quadrature(product, adjoint, signs.to(like), steps)
        estimates.append(total)
    stacked = torch.stack(estimates)
    return stacked.mean(0), stacked.std(0) / math.sqrt(probes)


def _quadrature(
    product: Callable[[Tensor], LogScaledVector],
    adjoint: Callable[[Tensor], LogScaledVector],
    start: Tensor,
    steps: int,
) -> Tensor:
    """D v^T log(J^T J) v / 2 of one layer, (B,), with v the direction of ``start``."""
    space = Bidiagonalization(product, adjoint, start, steps)
    while space.size < space.capacity and not bool(space.finished.all()):
        space.extend()
    _, theta, right = space.projection_svd()
    weights = right[:, :, 0].square()
    # without a weight, theta may be 0: B is padded where a sample's space was complete earlier
    used = weights > torch.finfo(weights.dtype).eps ** 2
    logs = torch.where(used, theta.log() + space.reference.unsqueeze(1), torch.zeros_like(theta))
    estimate = start[0].numel() * (weights * logs).sum(1)
    return torch.where(space.non_finite, torch.full_like(estimate, math.nan), estimate)

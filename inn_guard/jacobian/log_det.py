"""log|det J| of a chain of layers from its Jacobians: exactly where they can be formed, stochastically beyond."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.jacobian.chain import Linearization, LogScaledVector
from inn_guard.jacobian.lanczos import Bidiagonalization
from inn_guard.jacobian.singular_values import full_jacobian

__all__ = ["composed_log_det", "stochastic_log_det"]


def composed_log_det(model: Invertible, x: Float[Tensor, "batch *data"]) -> Tensor:
    """log|det J| in nats, (B,) float64: the sum over layers of slogdet of each layer's dense Jacobian at its state.

    Decomposed in float64. Layer by layer a determinant stays exact where that of the product would not: the condition
    number of one layer is far below that of the chain.

    Args:
        model: a bijective map; without layers() it is one layer.
        x: data.

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
    """An estimate of log|det J| = 1/2 tr log J^T J in nats and its standard error, (B,) float64 each.

    Stochastic Lanczos quadrature, layer by layer: with random signs v of unit length and the bidiagonal projection B of
    the layer's Jacobian started from v, v^T log(J^T J) v = sum_i q_i^2 log theta_i^2, theta_i the singular values of B
    and q_i the first entries of its right singular vectors. Only products are needed; the error is statistical.

    Args:
        linearization: of the model at x.
        probes: independent estimates, whose scatter gives the standard error.
        steps: Lanczos steps per layer and probe.
        generator: of the probes, on the CPU.

    References:
        Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature (Ubaru, Chen, Saad, 2017), Algorithm 1.
    """
    estimates = []
    for _ in range(probes):
        total = torch.zeros(
            len(linearization.output), dtype=torch.float64, device=linearization.output.device
        )
        for k in range(len(linearization.layers)):
            tangent, like = linearization.forward_checked(k), linearization.states[k]
            signs = 2.0 * torch.randint(0, 2, like.shape, generator=generator, device="cpu") - 1.0
            total = total + _quadrature(
                _scaled(tangent.jvp), _scaled(tangent.vjp), signs.to(like), steps
            )
        estimates.append(total)
    stacked = torch.stack(estimates)
    return stacked.mean(0), stacked.std(0) / math.sqrt(probes)


def _quadrature(
    product: Callable[[Tensor], LogScaledVector],
    adjoint: Callable[[Tensor], LogScaledVector],
    start: Tensor,
    steps: int,
) -> Tensor:
    space = Bidiagonalization(product, adjoint, start, steps)
    while space.size < space.capacity and not bool((space.exhausted | space.broken).all()):
        space.extend()
    _, theta, right = space.projection_svd()
    weights = right[:, :, 0].square()
    used = weights > torch.finfo(weights.dtype).eps ** 2
    logs = torch.where(used, theta.log() + space.reference.unsqueeze(1), torch.zeros_like(theta))
    estimate = start[0].numel() * (weights * logs).sum(1)
    return torch.where(space.broken, torch.full_like(estimate, math.nan), estimate)


def _scaled(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], LogScaledVector]:
    return lambda v: LogScaledVector.from_vector(product(v))

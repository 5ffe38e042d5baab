"""How much the inverse amplifies an error made in front of each of its layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.core.random import Noise, as_noise
from inn_guard.jacobian.chain import Linearization, LogScaledVector
from inn_guard.jacobian.lanczos import LargestSingularValue, largest_singular_value

__all__ = ["InverseGains", "inverse_gains", "layer_extremes"]


@dataclass(frozen=True)
class InverseGains:
    """Norms of P_k = J_1^-1 ... J_k^-1, k = 0 ... n: what the inverse makes of an error in state h_k.

    Attributes:
        log_rms: ln of ||P_k||_F / sqrt(D), the root mean square growth of errors in all directions, (n + 1, B).
        log_largest: ln of a lower bound of ||P_k||_2, the growth in the worst direction, (n + 1, B).
        exact: whether both are exact, because there were as many probes as dimensions.
    """

    log_rms: Tensor
    log_largest: Tensor
    exact: bool


def inverse_gains(
    linearization: Linearization, *, probes: int = 8, generator: torch.Generator | Noise
) -> InverseGains:
    """||P_k||_F / sqrt(D) and a lower bound of ||P_k||_2 for all k at once.

    P_{k+1}^T w = J_{k+1}^-T P_k^T w, so one sweep of transposed inverse products per probe w serves every k, and the
    mean of |P_k^T w|^2 over orthonormal random probes is ||P_k||_F^2 / D. With D probes it is no estimate any more.

    Args:
        linearization: of a bijective model at x.
        probes: number of sweeps; D are enough for exact norms.
        generator: of the probes, on the CPU; or what draws them itself.

    Raises:
        NotApplicable: if a layer's inverse has no correct derivative.
    """
    x = linearization.states[0]
    dimension = x[0].numel()
    count = min(probes, dimension)
    noise = as_noise(generator)((len(x), dimension, count))
    basis = torch.linalg.qr(noise).Q.to(x).transpose(1, 2).reshape(len(x), count, *x.shape[1:])
    sweeps = [_sweep(linearization, LogScaledVector.from_vector(basis[:, j])) for j in range(count)]
    norms = [_norms([sweep[k] for sweep in sweeps]) for k in range(len(linearization.states))]
    return InverseGains(
        torch.stack([rms for rms, _ in norms]),
        torch.stack([top for _, top in norms]),
        count == dimension,
    )


def layer_extremes(
    tangent: LayerJacobian,
    x: Tensor,
    *,
    generator: torch.Generator | Noise,
    tolerance: float = 0.1,
    max_steps: int = 20,
) -> tuple[LargestSingularValue, LargestSingularValue]:
    """sigma_max of one layer's J and of its J^-1, per sample."""
    lanczos = functools.partial(largest_singular_value, tolerance=tolerance, max_steps=max_steps)
    v, u = (as_noise(generator)(t.shape).to(t) for t in (x, tangent.output))
    forward = lanczos(_scaled(tangent.jvp), _scaled(tangent.vjp), v)
    return forward, lanczos(_scaled(tangent.inverse_jvp), _scaled(tangent.inverse_vjp), u)


def _scaled(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], LogScaledVector]:
    return lambda v: LogScaledVector.from_vector(product(v))


def _sweep(linearization: Linearization, probe: LogScaledVector) -> list[LogScaledVector]:
    """P_k^T w for every k."""
    sweep = [probe]
    for k in range(len(linearization.layers)):
        pulled = linearization.inverse_checked(k).inverse_vjp(sweep[-1].vector)
        sweep.append(LogScaledVector(pulled, sweep[-1].log_scale).normalized())
    return sweep


def _norms(images: list[LogScaledVector]) -> tuple[Tensor, Tensor]:
    """ln of root mean square length and of the largest singular value of the images of orthonormal vectors."""
    logs = torch.stack([image.log_norm() for image in images], dim=1)
    unit = logs.amax(1, keepdim=True)
    unit = torch.where(unit.isfinite(), unit, torch.zeros_like(unit))
    columns = torch.stack([image.vector.flatten(1).double() for image in images], dim=1)
    columns = columns * torch.stack([image.log_scale for image in images], dim=1).sub(
        unit
    ).exp().unsqueeze(2)
    finite = columns.flatten(1).isfinite().all(1)
    columns = torch.where(finite[:, None, None], columns, torch.zeros_like(columns))
    top = (
        torch.linalg.eigvalsh(columns @ columns.transpose(1, 2))[:, -1].clamp(min=0).sqrt().log()
        + unit[:, 0]
    )
    rms = (torch.logsumexp(2 * logs, dim=1) - math.log(len(images))) / 2
    return rms, torch.where(finite, top, torch.full_like(top, math.nan))

"""How much the inverse amplifies an error in the input of each of its layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.core.layer_jacobian import LayerJacobian, Map
from inn_guard.core.random import Noise, as_noise
from inn_guard.core.tensors import finite_rows
from inn_guard.jacobian.chain import Linearization, LogScaledVector, log_scaled
from inn_guard.jacobian.lanczos import largest_singular_value

__all__ = ["InverseGains", "inverse_gains", "layer_extremes"]

#: Up to this dimension all rows of J and of J^-1 cost less than an iteration for their norms.
SMALL = 16


@dataclass(frozen=True)
class InverseGains:
    """Norms of P_k = J_1^-1 ... J_k^-1, k = 0 ... n, which maps an error in state h_k to one in x.

    Attributes:
        log_rms: ln of ||P_k||_F / sqrt(D), the root mean square growth of errors over all
            directions, (n + 1, B).
        log_largest: ln of a lower bound of ||P_k||_2, the growth in the worst direction,
            (n + 1, B).
        exact: whether both are exact, because there were D probes.
    """

    log_rms: Tensor
    log_largest: Tensor
    exact: bool


def inverse_gains(
    linearization: Linearization, *, probes: int = 8, generator: torch.Generator | Noise
) -> InverseGains:
    """||P_k||_F / sqrt(D) and a lower bound of ||P_k||_2 for all k at once.

    P_{k+1}^T w = J_{k+1}^-T P_k^T w: one sweep of transposed inverse products per probe w serves
    all k. The mean of |P_k^T w|^2 over orthonormal random probes estimates ||P_k||_F^2 / D. With D
    probes it is exact.

    Args:
        linearization: of a bijective model at x.
        probes: number of sweeps; D give exact norms.
        generator: of the probes, on the CPU, or a function that draws them.

    Raises:
        NotApplicable: if the inverse of a layer has no correct derivative.
    """
    x = linearization.states[0]
    dimension = x[0].numel()
    count = min(probes, dimension)
    noise = as_noise(generator)((len(x), dimension, count))
    basis = torch.linalg.qr(noise).Q.to(x).transpose(1, 2).reshape(len(x), count, *x.shape[1:])
    probe_vectors = [LogScaledVector.from_vector(basis[:, j]) for j in range(count)]
    sweeps = [_sweep(linearization, probe) for probe in probe_vectors]
    log_rms, log_largest = [], []
    for images in zip(*sweeps, strict=True):  # the images of all probes under one P_k^T
        rms, largest = _log_norms(images)
        log_rms.append(rms)
        log_largest.append(largest)
    return InverseGains(torch.stack(log_rms), torch.stack(log_largest), count == dimension)


def layer_extremes(
    jacobian: LayerJacobian,
    x: Tensor,
    *,
    generator: torch.Generator | Noise,
    tolerance: float = 0.1,
    max_steps: int = 20,
) -> tuple[Tensor, Tensor]:
    """ln sigma_max of J and of J^-1 of one layer, for every sample, (B,) float64 each.

    In up to 16 dimensions both matrices are formed from their products, each by its own: a small
    singular value of J need not be found beside its large ones.

    Args:
        jacobian: of the layer at x.
        x: input of the layer, (B, *data).
        generator: of the random start vectors, on the CPU, or a function that draws them.
        tolerance: relative error to reach.
        max_steps: largest number of Lanczos steps.
    """
    if max(x[0].numel(), jacobian.output[0].numel()) <= SMALL:
        of_forward = _log_norm_of_rows(jacobian.vjp, jacobian.output, x)
        return of_forward, _log_norm_of_rows(jacobian.inverse_vjp, x, jacobian.output)
    lanczos = functools.partial(largest_singular_value, tolerance=tolerance, max_steps=max_steps)
    noise = as_noise(generator)
    v = noise(x.shape).to(x)
    u = noise(jacobian.output.shape).to(jacobian.output)
    forward = lanczos(log_scaled(jacobian.jvp), log_scaled(jacobian.vjp), v)
    inverse = lanczos(log_scaled(jacobian.inverse_jvp), log_scaled(jacobian.inverse_vjp), u)
    return forward.log_value, inverse.log_value


def _log_norm_of_rows(transposed: Map, output: Tensor, x: Tensor) -> Tensor:
    """ln of the largest singular value of the matrix A whose rows are A^T e_k, (B,) float64."""
    basis = torch.eye(output[0].numel(), dtype=output.dtype, device=output.device)
    rows = [transposed(e.expand(len(x), -1).reshape(output.shape)).flatten(1) for e in basis]
    matrix = torch.stack(rows, dim=1).double()
    finite = finite_rows(matrix)
    sigma = torch.linalg.svdvals(torch.where(finite[:, None, None], matrix, 0.0))[:, 0]
    return torch.where(finite, sigma.log(), math.nan)


def _sweep(linearization: Linearization, probe: LogScaledVector) -> list[LogScaledVector]:
    """The images P_k^T w of one probe, for k = 0 ... n."""
    sweep = [probe]
    for k in range(len(linearization.layers)):
        product = linearization.inverse_checked(k).inverse_vjp(sweep[-1].vector)
        sweep.append(LogScaledVector(product, sweep[-1].log_scale).normalized())
    return sweep


def _log_norms(images: Sequence[LogScaledVector]) -> tuple[Tensor, Tensor]:
    """ln of the root mean square length of images of orthonormal vectors, and ln of sigma_max."""
    logs = torch.stack([image.log_norm() for image in images], dim=1)
    rms = (torch.logsumexp(2 * logs, dim=1) - math.log(len(images))) / 2

    # relative to the longest image, so that the Gram matrix is in range
    unit = logs.amax(1, keepdim=True)
    unit = torch.where(unit.isfinite(), unit, 0.0)
    scales = torch.stack([image.log_scale for image in images], dim=1)
    columns = torch.stack([image.vector.flatten(1).double() for image in images], dim=1)
    columns = columns * (scales - unit).exp().unsqueeze(2)
    # eigvalsh refuses the whole batch if one matrix has a NaN
    finite = finite_rows(columns)
    columns = torch.where(finite[:, None, None], columns, 0.0)
    # one eigenvalue decomposition of the small Gram matrix; rounding may leave it below zero
    squares = torch.linalg.eigvalsh(columns @ columns.transpose(1, 2))[:, -1].clamp(min=0)
    largest = squares.sqrt().log() + unit[:, 0]
    return rms, torch.where(finite, largest, math.nan)

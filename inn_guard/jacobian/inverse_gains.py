"""How much the inverse amplifies an error in the input of each of its layers."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.core.layer_jacobian import LayerJacobian, Map
from inn_guard.core.random import Noise, as_noise
from inn_guard.core.tensors import finite_rows, log_norm
from inn_guard.jacobian.chain import Linearization, LogScaledVector, log_scaled
from inn_guard.jacobian.lanczos import largest_singular_value

__all__ = ["InverseGains", "inverse_gains", "layer_extremes"]

#: Up to this dimension all rows of J and of J^-1 cost less than an iteration for their norms.
SMALL = 16


@dataclass(frozen=True)
class InverseGains:
    """What P_k = S^-1 J_1^-1 ... J_k^-1, which maps an error of state h_k to one of x, does.

    S holds the units of x.

    Attributes:
        images: P_k^T w for every state k = 0 ... n and every probe w.
        exact: whether sizes are exact, because there were D probes.
    """

    images: tuple[tuple[LogScaledVector, ...], ...]
    exact: bool

    def log_size(self, k: int, errors: Tensor) -> Tensor:
        """ln of the root mean square over the entries of x of what errors of h_k do, (B,) float64.

            sqrt( E |P_k (s * e)|^2 / D ),   s: independent signs

        Every entry of h_k may have a unit of its own: errors in it are in that unit.

        Args:
            k: which state.
            errors: e, sizes of the errors of its entries, of the shape of h_k.
        """
        logs = []
        for image in self.images[k]:
            logs.append(image.log_scale + log_norm(image.vector.double() * errors.double()))
        return (torch.logsumexp(2 * torch.stack(logs), dim=0) - math.log(len(logs))) / 2


def inverse_gains(
    linearization: Linearization,
    *,
    unit: Tensor,
    probes: int = 8,
    generator: torch.Generator | Noise,
) -> InverseGains:
    """What errors of every state do to x, for all k at once.

    P_{k+1}^T w = J_{k+1}^-T P_k^T w: one sweep of transposed inverse products per probe w serves
    all k. The mean of (w^T P_k e)^2 over orthonormal random probes w estimates |P_k e|^2 / D. With
    D probes it is exact.

    Args:
        linearization: of a bijective model at x.
        unit: of every entry of x, in a shape that broadcasts against it.
        probes: number of sweeps; D give exact sizes.
        generator: of the probes, on the CPU, or a function that draws them.

    Raises:
        NotApplicable: if the inverse of a layer has no correct derivative.
    """
    x = linearization.states[0]
    dimension = x[0].numel()
    count = min(probes, dimension)
    noise = as_noise(generator)((len(x), dimension, count))
    basis = torch.linalg.qr(noise).Q.transpose(1, 2).reshape(len(x), count, *x.shape[1:])
    sweeps = []
    for j in range(count):
        probe = LogScaledVector.from_vector(basis[:, j].to(unit) / unit)
        sweeps.append(_sweep(linearization, LogScaledVector(probe.vector.to(x), probe.log_scale)))
    return InverseGains(tuple(zip(*sweeps, strict=True)), count == dimension)


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

"""First-order forecast of the rounding error of a round trip x -> z -> x, from one linearisation.

Every layer rounds what it computes, once on the way forward and once on the way back. Rounding the state h_i by
delta_i moves the reconstruction by A_i delta_i, with A_i the Jacobian of (F_i o ... o F_1)^-1 at h_i, so to first order

    e = sum_i A_i delta_i,   delta_i ~ U(-u |h_i|, u |h_i|) elementwise,   u the unit roundoff of the dtype.

All A_i are applied at once: one sweep of inverse Jacobian products from the last layer to the first, into which each
layer's errors are injected. u is a common factor: one set of sweeps serves every dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from inn_guard.linearization import Linearization, Scaled

Product = Callable[[Tensor], Tensor]

__all__ = ["RoundingForecast", "rounding_forecast", "unit_roundoff"]


@dataclass(frozen=True)
class RoundingForecast:
    """Forecast errors of the round trip per sample, for a unit roundoff of 1.

    Attributes:
        log_error: natural logarithm of the root mean square over probes of ||e||_2, (B,) float64.
        largest_state: the largest entry of any layer's state, (B,) float64: what a dtype must be able to hold.
        smallest_scale: the smallest non-zero root mean square of any state, (B,) float64.
        probes: number of sweeps.
    """

    log_error: Tensor
    largest_state: Tensor
    smallest_scale: Tensor
    probes: int

    def error(self, roundoff: float) -> Tensor:
        """Forecast l2 error of the reconstruction, (B,) float64, in a dtype of this unit roundoff."""
        return (self.log_error + math.log(roundoff)).exp()


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number of ``dtype``.

    >>> unit_roundoff(torch.float32) == 2.0**-24
    True
    """
    return torch.finfo(dtype).eps / 2


def rounding_forecast(
    linearization: Linearization,
    *,
    probes: int = 4,
    generator: torch.Generator,
    layer_roundoff: Sequence[float] | None = None,
) -> RoundingForecast:
    """Forecast the rounding error of F^-1(F(x)) for every sample of the linearised batch.

    Args:
        linearization: of the model at x, in any dtype that is finer than the ones asked about.
        probes: sweeps, each about as dear as one inverse and its Jacobian-vector product.
        generator: of the random errors, on the CPU.
        layer_roundoff: each layer's unit roundoff relative to the one asked about; 1 for all of them unless given.

    Returns:
        the forecast for a unit roundoff of 1; scale it by ``error(unit_roundoff(dtype))``.

    Raises:
        NotApplicable: if a layer's inverse has no correct derivative.

    References:
        Accuracy and Stability of Numerical Algorithms (Higham, 2002), sections 1.6 and 3.1: forward error as the
        backward error amplified by the inverse's Jacobian.
    """
    weights = _rounded_entries(linearization, layer_roundoff or [1.0] * len(linearization.layers))
    logs = torch.stack([_sweep(linearization, weights, generator).log_norm() for _ in range(probes)])
    flat = [state.flatten(1).double() for state in linearization.states]
    scales = torch.stack([_root_mean_square(state) for state in flat])
    return RoundingForecast(
        log_error=(torch.logsumexp(2 * logs, dim=0) - math.log(probes)) / 2,
        largest_state=torch.stack([state.abs().amax(1) for state in flat]).amax(0),
        smallest_scale=torch.where(scales > 0, scales, math.inf).amin(0),
        probes=probes,
    )


def _root_mean_square(flat: Tensor) -> Tensor:
    """(B,), also where a square leaves the range of float64."""
    peak = flat.abs().amax(1).clamp(min=math.ulp(0.0))
    return peak * (flat / peak[:, None]).square().mean(1).sqrt()


def _sweep(linearization: Linearization, weights: list[Tensor], generator: torch.Generator) -> Scaled:
    """One realisation of sum_i A_i delta_i for u = 1."""
    errors = [_errors(s, w, generator) for s, w in zip(reversed(linearization.states), reversed(weights), strict=True)]
    products = [linearization.returning_tangent(k).inverse_jvp for k in reversed(range(len(linearization.layers)))]
    error = errors[0]
    for product, extra in zip(products, errors[1:], strict=True):
        error = product(error) + extra
    # nothing is lost to underflow, beside errors of the states' size; what has overflown is not finite at the end
    if bool(error.isfinite().all()):
        return Scaled.of(error)
    return _careful_sweep(products, errors)


def _careful_sweep(products: Sequence[Product], errors: list[Tensor]) -> Scaled:
    """The same beyond the range of floats."""
    error = Scaled.of(errors[0])
    for product, extra in zip(products, errors[1:], strict=True):
        error = _plus(Scaled(product(error.vector), error.log_scale).normalized(), extra)
    return error


def _errors(state: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform errors of the size of the state's entries; ``weight`` independent ones add up to sqrt(weight) of one."""
    noise = 2 * torch.rand(state.shape, generator=generator, dtype=torch.float64) - 1
    return (noise.to(state.device) * weight.sqrt()).to(state.dtype) * state.abs()


def _plus(error: Scaled, extra: Tensor) -> Scaled:
    """The sum of both, on the scale of the larger one."""
    scale = error.log_scale.clamp(min=0)
    shape = (-1, *[1] * (extra.dim() - 1))
    old = error.vector.double() * (error.log_scale - scale).exp().reshape(shape)
    new = extra.double() * (-scale).exp().reshape(shape)
    return Scaled((old + new).to(extra.dtype), scale).normalized()


def _rounded_entries(linearization: Linearization, roundoff: Sequence[float]) -> list[Tensor]:
    """For every state how often each of its entries is rounded: by the layer before it, by the inverse after it.

    A layer of another roundoff counts by the square of it: variances add up.

    An entry that a layer copies, as a coupling does with half of them and a permutation with all, is not rounded.
    """
    states = linearization.states
    counts = [torch.zeros_like(state, dtype=torch.float64) for state in states]
    for k, (before, after) in enumerate(pairwise(states)):
        changed = _changed(before, after)
        variance = roundoff[k] ** 2
        counts[k] += variance * (changed.reshape(before.shape) if changed.numel() == before.numel() else 1)
        counts[k + 1] += variance * changed.reshape(after.shape)
    return counts


def _changed(before: Tensor, after: Tensor) -> Tensor:
    flat_before, flat_after = before.flatten(1), after.flatten(1)
    if flat_before.shape != flat_after.shape:
        return torch.ones_like(flat_after, dtype=torch.float64)
    moved = torch.equal(flat_before.sort(dim=1).values, flat_after.sort(dim=1).values)
    return torch.zeros_like(flat_after, dtype=torch.float64) if moved else (flat_before != flat_after).double()

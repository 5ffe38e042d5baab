"""First-order forecast of the rounding error of a round trip x -> z -> x, from one linearisation.

Every layer rounds what it computes, once on the way forward and once on the way back. Rounding the state h_i by
delta_i moves the reconstruction by A_i delta_i, with A_i the Jacobian of (F_i o ... o F_1)^-1 at h_i, so to first order

    e = sum_i A_i delta_i,   delta_i ~ U(-u |h_i|, u |h_i|) elementwise,   u the unit roundoff of the dtype.

All A_i are applied at once: one sweep of inverse Jacobian products from the last layer to the first, into which each
layer's errors are injected. u is a common factor: one set of sweeps serves every dtype. The products come from a
``Linearization``, or more cheaply, and from no derivative at all, from ``InverseDifferences`` in float64.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from inn_guard.jacobian.chain import LogScaledVector

Product = Callable[[Tensor], Tensor]


@runtime_checkable
class LinearizedModel(Protocol):
    """Layers, the states between them, and every layer's J^-1 u at its states."""

    @property
    def layers(self) -> Sequence[Any]:
        """First one first."""
        ...

    @property
    def states(self) -> Sequence[Tensor]:
        """The layers' inputs and last the output, (B, *) each."""
        ...

    def inverse_product(self, k: int) -> Product:
        """u -> J^-1 u of layer k, known to be right."""
        ...


@runtime_checkable
class ErrorPropagator(Protocol):
    """What adds up all errors by itself where that is cheaper."""

    def carried(self, errors: Sequence[Tensor]) -> Tensor | None:
        """sum_i A_i e_i for errors given from the last state to the first; None where that cannot be had this way."""
        ...


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
    linearization: LinearizedModel,
    *,
    probes: int = 4,
    generator: torch.Generator,
    layer_roundoff: Sequence[float] | None = None,
) -> RoundingForecast:
    """Forecast the rounding error of F^-1(F(x)) for every sample of the linearised batch.

    Args:
        linearization: of the model at x, in any dtype that is finer than the ones asked about: a ``Linearization``, or
            ``InverseDifferences`` for a few inverse passes.
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
    amplitudes = _amplitudes(linearization, layer_roundoff or [1.0] * len(linearization.layers))
    logs = torch.stack(
        [_sweep(linearization, amplitudes, generator).log_norm() for _ in range(probes)]
    )
    alike = list(_stacked_by_size(linearization.states))
    scales = torch.cat([_root_mean_square(states) for states in alike])
    return RoundingForecast(
        log_error=(torch.logsumexp(2 * logs, dim=0) - math.log(probes)) / 2,
        largest_state=torch.stack([states.abs().amax((0, 2)) for states in alike]).amax(0),
        smallest_scale=torch.where(scales > 0, scales, math.inf).amin(0),
        probes=probes,
    )


def _stacked_by_size(states: Iterable[Tensor]) -> Iterable[Tensor]:
    """States of one size together, (n, B, D) float64: one operation for all instead of one for each."""
    groups: dict[int, list[Tensor]] = defaultdict(list)
    for state in states:
        groups[state[0].numel()].append(state.flatten(1))
    return (torch.stack(group).double() for group in groups.values())


def _root_mean_square(states: Tensor) -> Tensor:
    """(n, B, D) -> (n, B), also where a square leaves the range of float64."""
    peak = states.abs().amax(2).clamp(min=math.ulp(0.0))
    return peak * (states / peak[..., None]).square().mean(2).sqrt()


def _sweep(
    linearization: LinearizedModel, amplitudes: list[Tensor], generator: torch.Generator
) -> LogScaledVector:
    """One realisation of sum_i A_i delta_i for u = 1."""
    errors = _errors(amplitudes, generator)[::-1]
    total = linearization.carried(errors) if isinstance(linearization, ErrorPropagator) else None
    if total is not None and bool(total.isfinite().all()):
        return LogScaledVector.from_vector(total)
    products = [
        linearization.inverse_product(k) for k in reversed(range(len(linearization.layers)))
    ]
    error = errors[0]
    for product, extra in zip(products, errors[1:], strict=True):
        error = product(error) + extra
    # nothing is lost to underflow, beside errors of the states' size; what has overflown is not finite at the end
    if bool(error.isfinite().all()):
        return LogScaledVector.from_vector(error)
    return _careful_sweep(products, errors)


def _careful_sweep(products: Sequence[Product], errors: list[Tensor]) -> LogScaledVector:
    """The same beyond the range of floats."""
    error = LogScaledVector.from_vector(errors[0])
    for product, extra in zip(products, errors[1:], strict=True):
        error = _plus(LogScaledVector(product(error.vector), error.log_scale).normalized(), extra)
    return error


def _errors(amplitudes: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """One uniform error for every entry of every state, in [-amplitude, amplitude)."""
    like = amplitudes[0]
    count = sum(amplitude.numel() for amplitude in amplitudes)
    noise = (2 * torch.rand(count, generator=generator, device="cpu", dtype=torch.float64) - 1).to(
        like
    )
    parts = noise.split([amplitude.numel() for amplitude in amplitudes])
    return [
        part.view_as(amplitude) * amplitude
        for part, amplitude in zip(parts, amplitudes, strict=True)
    ]


def _plus(error: LogScaledVector, extra: Tensor) -> LogScaledVector:
    """The sum of both, on the scale of the larger one."""
    scale = error.log_scale.clamp(min=0)
    shape = (-1, *[1] * (extra.dim() - 1))
    old = error.vector.double() * (error.log_scale - scale).exp().reshape(shape)
    new = extra.double() * (-scale).exp().reshape(shape)
    return LogScaledVector((old + new).to(extra.dtype), scale).normalized()


def _amplitudes(linearization: LinearizedModel, roundoff: Sequence[float]) -> list[Tensor]:
    """For every state |h| times the root of how often each entry is rounded: by the layer before, by the inverse after.

    A layer of another roundoff counts by the square of it: variances add up, and so w independent errors of one size
    are one error of sqrt(w) times the size. An entry that a layer copies, as a coupling does with half of them and a
    permutation with all, is not rounded.
    """
    states = linearization.states
    counts = [torch.zeros_like(state) for state in states]
    for k, (before, after) in enumerate(pairwise(states)):
        changed = _changed(before, after)
        if changed is None:
            continue
        rounded = roundoff[k] ** 2 * changed
        counts[k] += (
            rounded.reshape(before.shape) if rounded.numel() == before.numel() else roundoff[k] ** 2
        )
        counts[k + 1] += rounded.reshape(after.shape)
    return [count.sqrt() * state.abs() for count, state in zip(counts, states, strict=True)]


def _changed(before: Tensor, after: Tensor) -> Tensor | None:
    """Which entries of the output a layer computed, (B, D) of 0 and 1; None where it only moved them about."""
    before, after = before.flatten(1), after.flatten(1)
    if before.shape != after.shape:
        return torch.ones_like(after)
    # one sample tells for nearly every layer that computes, and is sorted faster than all
    moved = all(
        torch.equal(before[:n].sort(1).values, after[:n].sort(1).values) for n in (1, len(before))
    )
    return None if moved else (before != after).to(after)

"""First-order forecast of the rounding error of a round trip x -> z -> x, from one linearization.

Every layer rounds its result, once in the forward pass and once in the inverse. Rounding the state
h_i by delta_i moves the reconstruction by A_i delta_i, with A_i the Jacobian of
(F_i o ... o F_1)^-1 at h_i. To first order

    e = sum_i A_i delta_i,   delta_i ~ U(-u |h_i|, u |h_i|) elementwise,   u: unit roundoff.

One sweep of inverse Jacobian products from the last layer to the first applies all A_i: the errors
of each layer are added on the way. u is a common factor, so one set of sweeps serves every dtype.
The products come from a ``Linearization``, or at a lower cost and without derivatives from
``InverseDifferences`` in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from inn_guard.core.layer_jacobian import Map
from inn_guard.core.tensors import peak, per_sample
from inn_guard.jacobian.chain import LogScaledVector

__all__ = ["RoundingForecast", "rounding_forecast", "unit_roundoff"]


@runtime_checkable
class LinearizedModel(Protocol):
    """Layers, the states between them, and J^-1 u of every layer at its state."""

    @property
    def layers(self) -> Sequence[Any]:
        """The layers, first layer first."""
        ...

    @property
    def states(self) -> Sequence[Tensor]:
        """The layers' inputs and then the output."""
        ...

    def inverse_product(self, k: int) -> Map:
        """The function u -> J^-1 u of layer k."""
        ...


@runtime_checkable
class ErrorPropagator(Protocol):
    """A LinearizedModel that can also propagate the errors of all states at once."""

    def propagate_errors(self, errors: Sequence[Tensor]) -> Tensor | None:
        """sum_i A_i e_i of errors given from the last state to the first; None where it fails."""
        ...


@dataclass(frozen=True)
class RoundingForecast:
    """Forecast error of the round trip of every sample, for a unit roundoff of 1.

    Attributes:
        log_error: natural logarithm of the root mean square over the probes of ||e||_2, or of
            max_j |e_j| / unit_j where a unit was given, (B,) float64.
        largest_state: largest magnitude in any layer's state, (B,) float64: a dtype must be able to
            represent it.
        probes: number of sweeps.
    """

    log_error: Tensor
    largest_state: Tensor
    probes: int

    def error(self, roundoff: float) -> Tensor:
        """Forecast error of the reconstruction for this unit roundoff, (B,) float64."""
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
    unit: Tensor | None = None,
) -> RoundingForecast:
    """Forecast the rounding error of F^-1(F(x)) for every sample of the linearised batch.

    Args:
        linearization: of the model at x, in a dtype finer than those in question: a
            ``Linearization``, or ``InverseDifferences``, which costs a few inverse passes.
        probes: number of sweeps, each about as expensive as one inverse and its Jacobian-vector
            product.
        generator: of the random errors, on the CPU.
        layer_roundoff: unit roundoff of each layer relative to the common one. Default: all 1.
        unit: of each entry of x, in a shape that broadcasts against it. The size of an error is
            that of its largest entry in these units. Default: its Euclidean length.

    Returns:
        the forecast for a unit roundoff of 1; scale it by ``error(unit_roundoff(dtype))``.

    Raises:
        NotApplicable: if the inverse of a layer has no correct derivative.

    References:
        Accuracy and Stability of Numerical Algorithms (Higham, 2002), sections 1.6 and 3.1: forward
        error as the backward error amplified by the inverse's Jacobian.
    """
    if layer_roundoff is None:
        layer_roundoff = [1.0] * len(linearization.layers)
    amplitudes = _amplitudes(linearization, layer_roundoff)
    sweeps = [_sweep(linearization, amplitudes, generator) for _ in range(probes)]
    if unit is None:
        logs = torch.stack([error.log_norm() for error in sweeps])
    else:
        logs = torch.stack([error.log_largest(unit) for error in sweeps])
    largest = torch.stack([peak(state).double() for state in linearization.states]).amax(0)
    return RoundingForecast(
        log_error=(torch.logsumexp(2 * logs, dim=0) - math.log(probes)) / 2,
        largest_state=largest,
        probes=probes,
    )


def _sweep(
    linearization: LinearizedModel, amplitudes: list[Tensor], generator: torch.Generator
) -> LogScaledVector:
    """One realisation of sum_i A_i delta_i for u = 1."""
    errors = _errors(amplitudes, generator)[::-1]
    if isinstance(linearization, ErrorPropagator):
        # one pass of the whole inverse is cheaper than one product per layer, but may fail
        total = linearization.propagate_errors(errors)
        if total is not None and bool(total.isfinite().all()):
            return LogScaledVector.from_vector(total)
    backwards = reversed(range(len(linearization.layers)))
    products = [linearization.inverse_product(k) for k in backwards]
    error = errors[0]
    for product, extra in zip(products, errors[1:], strict=True):
        error = product(error) + extra
    # underflow loses nothing next to errors of the states' size; overflow is not finite at the end
    if bool(error.isfinite().all()):
        return LogScaledVector.from_vector(error)
    scaled = LogScaledVector.from_vector(errors[0])
    for product, extra in zip(products, errors[1:], strict=True):
        image = LogScaledVector(product(scaled.vector), scaled.log_scale).normalized()
        scaled = _plus(image, extra)
    return scaled


def _errors(amplitudes: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """One uniform error for every entry of every state, in [-amplitude, amplitude)."""
    # one draw for all states, instead of a small one per layer
    like = amplitudes[0]
    count = sum(amplitude.numel() for amplitude in amplitudes)
    uniform = torch.rand(count, generator=generator, device="cpu", dtype=torch.float64)
    noise = (2 * uniform - 1).to(like)
    errors = []
    for amplitude in amplitudes:
        part, noise = noise.tensor_split([amplitude.numel()])
        errors.append(part.view_as(amplitude) * amplitude)
    return errors


def _plus(error: LogScaledVector, extra: Tensor) -> LogScaledVector:
    """The sum of both, on the scale of the larger one."""
    scale = error.log_scale.clamp(min=0)
    old = error.vector.double() * per_sample((error.log_scale - scale).exp(), extra)
    new = extra.double() * per_sample((-scale).exp(), extra)
    return LogScaledVector((old + new).to(extra.dtype), scale).normalized()


def _amplitudes(linearization: LinearizedModel, roundoff: Sequence[float]) -> list[Tensor]:
    """|h| times the square root of the number of roundings, for every entry of every state.

    A state is rounded by the layer before it and by the inverse of the layer after it. Variances
    add up: w independent errors of one size are one error of sqrt(w) times the size, and a layer
    of roundoff r counts r^2 times. An entry that a layer copies is not rounded: a coupling copies a
    part of them, a permutation all.
    """
    states = linearization.states
    counts = [torch.zeros_like(state) for state in states]
    for k, (before, after) in enumerate(pairwise(states)):
        changed = _changed(before, after)
        if changed is None:
            continue
        rounded = roundoff[k] ** 2 * changed
        counts[k + 1] += rounded.reshape(after.shape)
        if rounded.numel() == before.numel():
            counts[k] += rounded.reshape(before.shape)
        else:
            # the layer changes the number of entries: which of them it copies is not known
            counts[k] += roundoff[k] ** 2
    return [count.sqrt() * state.abs() for count, state in zip(counts, states, strict=True)]


def _changed(before: Tensor, after: Tensor) -> Tensor | None:
    """The entries that a layer has computed, (B, D) of 0 and 1; None if it has only moved them."""
    before, after = before.flatten(1), after.flatten(1)
    if before.shape != after.shape:
        return torch.ones_like(after)
    # one sample is sorted faster than all, and settles it for nearly every layer that computes
    if _same_entries(before[:1], after[:1]) and _same_entries(before, after):
        return None
    return (before != after).to(after)


def _same_entries(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.sort(1).values, b.sort(1).values)

"""log_det: is the model's log-determinant that of its Jacobian, and does the inverse's cancel it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.audited_model import ModelError, polite, shares_of
from inn_guard.audits.jacobian_spectrum import usable_rows
from inn_guard.audits.thresholds import RESOLUTION
from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.execution.memory import linearized_footprint
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.log_det import composed_log_det, stochastic_log_det
from inn_guard.report.result import AuditResult, Verdict, to_full_batch

__all__ = ["log_det"]

NATS_PER_DIMENSION = 1e-3  #: an error that moves no published likelihood: 0.0014 bits per dimension
EXACT_UP_TO = 512  #: dimensions
SIGMAS = 4.0  #: standard errors that a stochastic estimate may be off
DERIVE = "Derive the log-determinant again; training by likelihood follows this number."
RETURN = (
    "The forward log-determinant is right, the inverse's is not its negative: look at reconstruction. If the inverse "
    "comes back to x, derive its log-determinant again; if it does not, likelihoods of samples mean nothing."
)
QUADRATURE_STEPS = 16  #: of the stochastic reference
DRAWS = 16  #: of a model whose log-determinant is itself random


@polite
def log_det(model: Invertible, x: Tensor, *, samples: int = 8, seed: int = 0) -> AuditResult:
    """Error of the model's log|det J| per sample, in nats.

    Three comparisons: with the Jacobian that autograd gives; with the log-determinant of the model's inverse at the
    latent, whose sum with it is 0; and of its shape, which is (B,). Up to D = 512 the reference is exact: a slogdet of
    every layer's dense Jacobian, in a float64 copy where there is one. Beyond, it is stochastic Lanczos quadrature
    with a standard error. A log-determinant that is random itself (Hutchinson's estimator) is averaged.

    An error counts above 1e-3 nats per dimension, or relative to the log-determinant, or above what the dtype holds;
    a stochastic reference adds four standard errors.

    Args:
        model: a bijective map.
        x: data, (B, *data).
        samples: the first so many samples that stay finite are compared.
        seed: of the probes.

    Returns:
        max_error against the Jacobian, forward_plus_inverse, per sample log_det, reference and error.

    Raises:
        NotApplicable: if the model has no log-determinant.
    """
    fits = shares_of(model).max_batch(
        lambda within: linearized_footprint(model, x, within=within, vectors=2 * QUADRATURE_STEPS)
    )
    rows = usable_rows(model, x)[: int(min(samples, fits))]
    if not len(rows):
        return AuditResult(
            "log_det", Verdict.NON_FINITE, "no sample has a finite latent: nothing to compare"
        )
    chosen, start = model.select(rows), x[rows]
    with torch.no_grad():
        own = _own(chosen, start)
        cancelled = _forward_plus_inverse(chosen, start)
    reference = _reference(chosen, start, seed)
    compared = _Compared(own, reference, cancelled, x[0].numel(), x.dtype)
    verdict, reason = compared.judged()
    return AuditResult(
        "log_det",
        verdict,
        reason,
        values=compared.values(),
        units=dict.fromkeys(
            ("max_error", "forward_plus_inverse", "largest_log_det", "allowed"), "nats"
        ),
        **to_full_batch(compared.per_sample(), rows, len(x)),
        settings={
            "samples": len(rows),
            "of": len(x),
            "reference": reference.label,
            "log_det_dtype": str(own.dtype).removeprefix("torch."),
            "draws": own.draws,
            "inverse": cancelled if isinstance(cancelled, str) else "measured",
            "nats_per_dimension": NATS_PER_DIMENSION,
            "seed": seed,
        },
        advice=compared.advice() if verdict.failed else "",
    )


@dataclass(frozen=True)
class _Own:
    value: Tensor  #: (B,) float64
    standard_error: Tensor
    dtype: torch.dtype
    draws: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Reference:
    value: Tensor
    standard_error: Tensor
    label: str


@dataclass(frozen=True)
class _Compared:
    own: _Own
    reference: _Reference
    cancelled: Tensor | str
    dimension: int
    dtype: torch.dtype

    @property
    def error(self) -> Tensor:
        return (self.own.value - self.reference.value).abs()

    @property
    def allowed(self) -> Tensor:
        level = max(NATS_PER_DIMENSION, RESOLUTION * torch.finfo(self.dtype).eps)
        return level * (self.dimension + self.own.value.abs())

    @property
    def statistical(self) -> Tensor:
        return (
            SIGMAS
            * (self.own.standard_error.square() + self.reference.standard_error.square()).sqrt()
        )

    def judged(self) -> tuple[Verdict, str]:
        batch = len(self.reference.value)
        if self.own.shape != (batch,):
            return (
                Verdict.UNSTABLE,
                f"the log-determinant has shape {self.own.shape}, expected ({batch},)",
            )
        if not bool(self.own.value.isfinite().all()):
            return (
                Verdict.NON_FINITE,
                f"{int((~self.own.value.isfinite()).sum())} of {batch} log-determinants are NaN or Inf",
            )
        if not bool(self.reference.value.isfinite().all()):
            return (
                Verdict.NON_FINITE,
                f"the Jacobian ({self.reference.label}) is singular or not finite",
            )
        wrong = self.error > self.allowed + self.statistical
        if bool(wrong.any()):
            return (
                Verdict.UNSTABLE,
                f"it differs from the Jacobian's by up to {self.error.max():.1e} nats {self._how}",
            )
        if isinstance(self.cancelled, Tensor):
            if not bool(self.cancelled.isfinite().all()):
                return Verdict.NON_FINITE, "the log-determinant of the inverse is NaN or Inf"
            # one draw of each
            scatter = SIGMAS * math.sqrt(2 * self.own.draws) * self.own.standard_error
            if bool((self.cancelled.abs() > self.allowed + scatter).any()):
                worst = self.cancelled.abs().max().item()
                return (
                    Verdict.UNSTABLE,
                    f"forward and inverse log-determinant leave {worst:.1e} nats, not 0",
                )
        return (
            Verdict.STABLE,
            f"it agrees with the Jacobian to {self.error.max():.1e} nats {self._how}",
        )

    def advice(self) -> str:
        """What to do if the verdict is a finding."""
        shaped = self.own.shape == (len(self.reference.value),)
        right = shaped and bool((self.error <= self.allowed + self.statistical).all())
        return RETURN if right else DERIVE

    @property
    def _how(self) -> str:
        scatter = self.statistical.max().item() / SIGMAS
        return f"({self.reference.label}" + (
            f", standard error {scatter:.1e})" if scatter > 0 else ")"
        )

    def values(self) -> dict[str, float]:
        values = {"max_error": self.error.max().item()}
        if isinstance(self.cancelled, Tensor):
            values["forward_plus_inverse"] = self.cancelled.abs().max().item()
        values["largest_log_det"] = self.own.value.abs().max().item()
        values["allowed"] = (self.allowed + self.statistical).min().item()
        return values

    def per_sample(self) -> dict[str, Tensor]:
        named = {"log_det": self.own.value, "reference": self.reference.value, "error": self.error}
        if isinstance(self.cancelled, Tensor):
            named["forward_plus_inverse"] = self.cancelled
        return named


def _own(model: Invertible, x: Tensor) -> _Own:
    first, again = (model.forward_and_log_det(x)[1] for _ in range(2))
    if first.shape != (len(x),):
        nothing = torch.full((len(x),), math.nan, dtype=torch.float64)
        return _Own(nothing, nothing, first.dtype, 1, tuple(first.shape))
    scale = first.abs().double() + x[0].numel()
    if bool(((first - again).abs().double() <= 100 * torch.finfo(first.dtype).eps * scale).all()):
        return _Own(
            first.double().cpu(),
            torch.zeros(len(x), dtype=torch.float64),
            first.dtype,
            1,
            tuple(first.shape),
        )
    draws = [first, again] + [model.forward_and_log_det(x)[1] for _ in range(DRAWS - 2)]
    stacked = torch.stack(draws).double().cpu()
    return _Own(
        stacked.mean(0), stacked.std(0) / math.sqrt(DRAWS), first.dtype, DRAWS, tuple(first.shape)
    )


def _forward_plus_inverse(model: Invertible, x: Tensor) -> Tensor | str:
    try:
        z, forward = model.forward_and_log_det(x)
        _, inverse = model.inverse_and_log_det(z)
    except (NotApplicable, ModelError) as error:
        return str(error)
    if forward.shape != inverse.shape:
        return f"the inverse's log-determinant has shape {tuple(inverse.shape)}"
    return (forward.double() + inverse.double()).cpu()


def _reference(model: Invertible, x: Tensor, seed: int) -> _Reference:
    if x[0].numel() > EXACT_UP_TO:
        value, error = stochastic_log_det(
            Linearization(model, x),
            steps=QUADRATURE_STEPS,
            generator=torch.Generator().manual_seed(seed),
        )
        return _Reference(value.cpu(), error.cpu(), "stochastic Lanczos quadrature")
    layered = "layer by layer" if model.layers() else "whole"
    try:
        value, where = composed_log_det(model.to_dtype(torch.float64), x.double()), "float64 copy"
    except (NotApplicable, ModelError):
        value, where = composed_log_det(model, x), str(x.dtype).removeprefix("torch.")
    return _Reference(
        value.cpu(), torch.zeros(len(x), dtype=torch.float64), f"exact, {layered}, {where}"
    )

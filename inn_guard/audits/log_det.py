"""log_det: is the log-determinant that of the Jacobian, and does the inverse's cancel it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.audited_model import AuditedModel, ModelError
from inn_guard.audits.context import AuditContext
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.level import Level
from inn_guard.audits.spec import audit_check
from inn_guard.audits.thresholds import worst
from inn_guard.core.missing import Missing, NotApplicable
from inn_guard.core.tensors import dtype_name, finite_rows
from inn_guard.jacobian.log_det import composed_log_det, stochastic_log_det
from inn_guard.report.result import AuditResult, to_full_batch
from inn_guard.report.uses import Finding
from inn_guard.report.verdict import Verdict

__all__ = ["log_det"]

EXACT_UP_TO = 512  #: dimensions up to which every layer's Jacobian is formed
ENTRIES = 4096  #: samples x dimensions that are compared exactly; a batch of 64 up to 64 dimensions
LEAST, MOST = 8, 256  #: samples that are compared
SIGMAS = 4.0  #: standard errors that a stochastic estimate may be off
QUADRATURE_STEPS = 16  #: of the stochastic reference
DRAWS = 16  #: of a model whose log-determinant is itself random
DERIVE = "Derive the log-determinant again; training by likelihood follows this number."


def _samples(dimension: int) -> int:
    """How many samples are compared by default."""
    return max(LEAST, min(MOST, ENTRIES // dimension))


def _cost(task: Task) -> Cost:
    chosen = min(task.samples, int(task.settings["samples"] or _samples(task.dimension)))
    own = Passes(forward=3, inverse=1)
    if task.dimension <= EXACT_UP_TO:
        reference = Passes(forward=1, product=task.dimension)
        vectors = task.dimension
    else:
        reference = Passes(linearize=1, product=8 * 2 * QUADRATURE_STEPS)
        vectors = 2 * QUADRATURE_STEPS
    passes = Passes(forward=1) * task.samples + (own + reference) * chosen
    return Cost(passes, chosen, linearized=True, vectors=vectors)


@audit_check(
    question="Is the log-determinant that of the Jacobian?",
    uses=("density",),
    level=Level.QUICK,
    cost=_cost,
)
def log_det(context: AuditContext, *, samples: int | None = None) -> AuditResult:
    """Error of the formula of log|det J|, in nats, per sample.

        error_b = | log_det(x_b) - log|det dF/dx(x_b)| |

    Up to 512 dimensions the reference is exact: slogdet of every layer's Jacobian by autograd,
    added up, in a float64 copy where there is one. Layer by layer matters: one Jacobian of a whole
    chain loses digits with its condition. The model's side is the copy's, too, so that this is the
    formula's error; what float32 adds is asked by ``density``. Beyond 512 dimensions the reference
    is stochastic Lanczos quadrature, with a standard error: an error is only called one if it
    exceeds the limit by four standard errors. A log-determinant that is random itself (Hutchinson's
    estimator) is averaged.

    The inverse's own log-determinant ought to be the negative at the same point. It matters for the
    density of draws, not for that of data: it is reported, and decides nothing here.

    Args:
        context: a bijective model, and data.
        samples: how many of the samples with finite latents are compared, the first ones. Default:
            4096 entries, at least 8 and at most 256 samples.

    Returns:
        max_error, forward_plus_inverse; per sample log_det, reference and error.

    Raises:
        NotApplicable: if the model has no log-determinant.
    """
    rows = _rows(context, samples)
    if not len(rows):
        reason = "no sample has a finite latent: there is no log-determinant to compare"
        return log_det.without_answer(Verdict.NON_FINITE, reason)
    compared = _compare(context, rows)
    finding = _finding(context, compared)
    return AuditResult(
        "log_det",
        finding.verdict,
        finding.reason,
        uses={"density": finding},
        headline=("max_error",),
        values=_values(compared),
        units={name: "nats" for name in _values(compared)},
        **to_full_batch(_by_sample(compared), rows, len(context.x)),
        settings={
            "samples": len(rows),
            "of": len(context.x),
            "reference": compared.reference.label,
            "draws": compared.own.draws,
            "inverse": "measured"
            if isinstance(compared.cancelled, Tensor)
            else str(compared.cancelled),
            "limit": context.limits.density,
            "seed": context.seed,
        },
        advice=DERIVE if finding.verdict.failed else "",
    )


@dataclass(frozen=True)
class _Own:
    """The model's log-determinant, (B,) float64 on the CPU."""

    value: Tensor
    standard_error: Tensor
    draws: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Reference:
    """log|det J|, (B,) float64 on the CPU."""

    value: Tensor
    standard_error: Tensor
    label: str


@dataclass(frozen=True)
class _Compared:
    """Both, and the sum of forward and inverse log-determinant in the model's own dtype."""

    own: _Own
    reference: _Reference
    cancelled: Tensor | Missing

    @property
    def error(self) -> Tensor:
        return (self.own.value - self.reference.value).abs()

    @property
    def statistical(self) -> Tensor:
        """What chance may add to the error."""
        variance = self.own.standard_error.square() + self.reference.standard_error.square()
        return SIGMAS * variance.sqrt()


def _rows(context: AuditContext, samples: int | None) -> Tensor:
    if samples is not None and samples < 1:
        raise ValueError(f"expected at least 1 sample; got {samples}")
    fits = context.max_linearized(2 * QUADRATURE_STEPS)
    wanted = _samples(context.x[0].numel()) if samples is None else samples
    return context.usable_rows()[: int(min(wanted, fits))]


def _compare(context: AuditContext, rows: Tensor) -> _Compared:
    model, x = context.at(rows)
    precise = _float64_copy(model, x)
    with torch.no_grad():
        cancelled = _forward_plus_inverse(model, x)
        own = _own(model, x) if isinstance(precise, Missing) else _own(precise, x.double())
    return _Compared(own, _reference(context, model, precise, x), cancelled)


def _float64_copy(model: AuditedModel, x: Tensor) -> AuditedModel | Missing:
    """A copy in float64 that runs there: what a function has captured stays in its own dtype."""
    try:
        copy = model.to_dtype(torch.float64)
        with torch.no_grad():
            copy.forward_and_log_det(x.double())
    except (NotApplicable, ModelError) as error:
        return Missing(str(error))
    return copy


def _own(model: AuditedModel, x: Tensor) -> _Own:
    first = model.forward_and_log_det(x)[1]
    again = model.forward_and_log_det(x)[1]
    if first.shape != (len(x),):
        nothing = torch.full((len(x),), math.nan, dtype=torch.float64)
        return _Own(nothing, nothing, 1, tuple(first.shape))
    # two evaluations of the same formula may add up in another order
    scale = first.abs().double() + x[0].numel()
    same = (first - again).abs().double() <= 100 * torch.finfo(first.dtype).eps * scale
    if bool(same.all()) or not bool(first.isfinite().all()):
        exact = torch.zeros(len(x), dtype=torch.float64)
        return _Own(first.double().cpu(), exact, 1, tuple(first.shape))
    draws = [first, again]
    draws += [model.forward_and_log_det(x)[1] for _ in range(DRAWS - 2)]
    stacked = torch.stack(draws).double().cpu()
    standard_error = stacked.std(0) / math.sqrt(DRAWS)
    return _Own(stacked.mean(0), standard_error, DRAWS, tuple(first.shape))


def _forward_plus_inverse(model: AuditedModel, x: Tensor) -> Tensor | Missing:
    try:
        z, forward = model.forward_and_log_det(x)
        if not bool(finite_rows(z).all()):
            return Missing("some latents are not finite")
        _, inverse = model.inverse_and_log_det(z)
    except (NotApplicable, ModelError) as error:
        return Missing(str(error))
    if forward.shape != inverse.shape:
        return Missing(f"the inverse's log-determinant has shape {tuple(inverse.shape)}")
    return (forward.double() + inverse.double()).cpu()


def _reference(
    context: AuditContext, model: AuditedModel, precise: AuditedModel | Missing, x: Tensor
) -> _Reference:
    if x[0].numel() > EXACT_UP_TO:
        linearization = context.linearization(context.usable_rows()[: len(x)])
        value, error = stochastic_log_det(
            linearization, steps=QUADRATURE_STEPS, generator=context.generator()
        )
        # with the same probes: what half of the steps change bounds the bias that is left, as far
        # as it is known
        coarse, _ = stochastic_log_det(
            linearization, steps=QUADRATURE_STEPS // 2, generator=context.generator()
        )
        bias = (value - coarse).abs().cpu()
        return _Reference(value.cpu(), error.cpu() + bias, "stochastic Lanczos quadrature")
    exact = torch.zeros(len(x), dtype=torch.float64)
    how = "layer by layer" if model.layers() else "of the whole map"
    if not isinstance(precise, Missing):
        try:
            value = composed_log_det(precise, x.double())
            return _Reference(value.cpu(), exact, f"exact, {how}, float64 copy")
        except (NotApplicable, ModelError):
            pass  # a layer that has no derivative in float64 may have one in its own dtype
    value = composed_log_det(model, x)
    return _Reference(value.cpu(), exact, f"exact, {how}, {dtype_name(x.dtype)}")


def _finding(context: AuditContext, compared: _Compared) -> Finding:
    own, reference = compared.own, compared.reference
    limit, count = context.limits.density, len(reference.value)
    figure = math.inf
    if own.shape != (count,):
        verdict = Verdict.UNSTABLE
        reason = f"the log-determinant has shape {own.shape}, expected ({count},)"
    elif not bool(own.value.isfinite().all()):
        verdict = Verdict.NON_FINITE
        lost = int((~own.value.isfinite()).sum())
        reason = f"{lost} of {count} log-determinants are NaN or Inf"
    elif not bool(reference.value.isfinite().all()):
        verdict = Verdict.UNDECIDED
        lost = int((~reference.value.isfinite()).sum())
        reason = (
            f"the Jacobian of {lost} of {count} samples is singular or not finite "
            f"({reference.label}): the formula could not be checked there"
        )
    else:
        figure = worst((compared.error - compared.statistical).clamp(min=0))
        verdict = context.limits.verdict(figure, limit)
        reason = _reason(compared, limit)
    return Finding(verdict, figure, limit, "nats", reason, count, len(context.x))


def _reason(compared: _Compared, limit: float) -> str:
    count = len(compared.reference.value)
    how = compared.reference.label
    scatter = compared.statistical.max().item() / SIGMAS
    if scatter > 0:
        how += f", standard error {scatter:.1e}"
    wrong = compared.error - compared.statistical > limit
    if bool(wrong.any()):
        text = (
            f"the log-determinant of {int(wrong.sum())} of {count} samples differs from the "
            f"Jacobian's by up to {worst(compared.error):.1e} nats ({how})"
        )
    else:
        text = (
            f"the formula of the log-determinant agrees with the Jacobian of {count} samples to "
            f"{worst(compared.error):.1e} nats ({how})"
        )
    if isinstance(compared.cancelled, Tensor):
        left = worst(compared.cancelled.abs())
        if left > limit:
            text += f"; forward and inverse log-determinant leave {left:.1e} nats, not 0"
    return text


def _values(compared: _Compared) -> dict[str, float]:
    values = {
        "max_error": worst(compared.error),
        "largest_log_det": worst(compared.own.value.abs()),
        "standard_error": worst(compared.statistical) / SIGMAS,
    }
    if isinstance(compared.cancelled, Tensor):
        values["forward_plus_inverse"] = worst(compared.cancelled.abs())
    return values


def _by_sample(compared: _Compared) -> dict[str, Tensor]:
    named = {
        "log_det": compared.own.value,
        "reference": compared.reference.value,
        "error": compared.error,
    }
    if isinstance(compared.cancelled, Tensor):
        named["forward_plus_inverse"] = compared.cancelled
    return named

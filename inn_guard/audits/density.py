"""density: is log p(x) right, held against a float64 copy of the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.audited_model import AuditedModel, ModelError
from inn_guard.audits.context import AuditContext
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.level import Level
from inn_guard.audits.rates import percent, rate_interval
from inn_guard.audits.spec import audit_check
from inn_guard.audits.thresholds import worst
from inn_guard.core.missing import Missing, NotApplicable
from inn_guard.report.formatting import brief
from inn_guard.report.result import AuditResult, to_full_batch
from inn_guard.report.uses import Finding
from inn_guard.report.verdict import Verdict

__all__ = ["density"]

#: Share of the limit up to which calls may differ, as those of adaptive solvers do.
NOTICED = 0.1
BATCH = 256  #: samples in one call
#: Relative size of the random change of x and weights by which the error of a float64 model is
#: estimated: far above its rounding, far below what changes the map.
PERTURBATION = 2.0**-36
#: Two calls on the same x may differ by this many float32 roundings of the largest |log p(x)|: by
#: the order of sums.
SAME = 1000.0
FEW = 16  #: samples that are evaluated again, and from the parts of log p


def _cost(task: Task) -> Cost:
    return Cost(Passes(forward=4) * task.samples, min(BATCH, task.samples), vectors=4)


@audit_check(
    question="Is log p(x) of data right?",
    uses=("density",),
    level=Level.QUICK,
    cost=_cost,
    shares_samples=True,
)
def density(context: AuditContext) -> AuditResult:
    """Error of log p(x), in nats, of all samples.

        error_b = |log p(x_b) - log p_64(x_b)|

    log p is the model's own, with its own base (N(0, I) where it has none), in its own dtype; log
    p_64 is that of a float64 copy of the same weights. The verdict holds the largest error against
    ``limits.density``. The share of samples above the limit has a Clopper-Pearson interval: a
    maximum over few samples is luck near the limit.

    Whether the formula of the log-determinant is right is asked by ``log_det``; whether the inverse
    works, which log p does not need, by ``reconstruction``. At the first 16 samples log p(x) is
    compared with log p(z) + log|det J| of the model's own base, where it has a density: a model
    whose log_prob is another number is unstable.

    A model that is in float64 already is held against itself in another way: its error is estimated
    from a float32 copy, whose error is scaled by the ratio of the two rounding units; where float32
    gives no finite number, from the change that a random relative change of x and weights by 2^-36
    makes, scaled likewise. It is an estimate of first order: where float32 has lost all digits, it
    may be too small.

    Returns:
        max_error and median_error in nats, bits_per_dimension, share_above_limit; per sample
        log_prob and error.

    Raises:
        NotApplicable: if the model has no log-determinant.
    """
    rows = context.finite_rows()
    if not len(rows):
        reason = "every sample of x contains NaN or Inf already: there is no density to compare"
        return density.without_answer(
            Verdict.NON_FINITE, reason, advice="Remove NaN and Inf from the data, then audit again."
        )
    measured = _measure(context, rows)
    finding = _finding(context, measured)
    named = {"log_prob": measured.own, "error": measured.error}
    return AuditResult(
        "density",
        finding.verdict,
        finding.reason,
        uses={"density": finding},
        headline=("max_error",),
        values=_values(context, measured),
        units={
            "max_error": "nats",
            "median_error": "nats",
            "largest_log_prob": "nats",
            "error": "nats",
            "log_prob": "nats",
        },
        **to_full_batch(named, rows, len(context.x)),
        settings={
            "samples": len(rows),
            "of": len(context.x),
            "limit": finding.limit,
            "reference": measured.reference,
            "base": context.base.description,
            "outside_of_support": int(measured.outside.sum()),
            "random": measured.is_random,
            "float64_suffices": measured.float64_suffices(finding.limit),
        },
        advice="" if not finding.verdict.failed else _advice(measured, finding.limit),
    )


@dataclass(frozen=True)
class _Measured:
    """log p of the finite rows; (B,) float64 on the CPU.

    Attributes:
        own: the model's.
        error: of it; inf where one of both is not finite and the other is another number.
        outside: rows with a finite latent of which both say that p(x) = 0.
        reference: what ``own`` was held against, in words.
        repeats: largest difference of two calls on the same x.
        apart: largest difference of log p(x) and log p(z) + log|det J| beyond rounding; 0 where
            there is no base with a density.
        expected: of the error that float64 would leave, in nats; inf where its log p is not finite
            either; None where there is no float64 copy.
    """

    own: Tensor
    error: Tensor
    outside: Tensor
    reference: str
    repeats: float
    apart: float = 0.0
    expected: Tensor | None = None

    def float64_suffices(self, limit: float) -> bool:
        """Whether float64 can be expected to bring every error below the limit."""
        return self.expected is not None and bool((self.expected <= limit).all())

    @property
    def is_random(self) -> bool:
        """Whether log p differs from call to call by more than the order of sums explains."""
        finite = self.own[self.own.isfinite()]
        size = finite.abs().max().item() if len(finite) else 1.0
        return self.repeats > SAME * torch.finfo(torch.float32).eps * max(size, 1.0)


def _measure(context: AuditContext, rows: Tensor) -> _Measured:
    model = context.model
    own = _log_prob(context, model, rows, context.x)
    expected = None
    few = rows[: min(len(rows), FEW)]
    again = _log_prob(context, model, few, context.x)
    apart = (again - own[: len(few)]).abs()
    repeats = apart[apart.isfinite()].max().item() if bool(apart.isfinite().any()) else 0.0
    if context.x.dtype == torch.float64:
        estimated = _estimated_error(context, rows, own)
        if isinstance(estimated, Missing):
            return _unchecked(own, repeats, estimated)
        error, reference = estimated
        outside = own == -math.inf
    else:
        precise = _precise(context, rows)
        if isinstance(precise, Missing):
            return _unchecked(own, repeats, precise)
        outside = (own == -math.inf) & (precise == -math.inf)
        error, reference = (own - precise).abs(), "float64 copy"
        # errors scale with the rounding unit; what is not finite in own tells nothing about float64
        ratio = torch.finfo(torch.float64).eps / torch.finfo(context.x.dtype).eps
        expected = (error * ratio).nan_to_num(nan=0.0, posinf=0.0)
        expected = expected.where(precise.isfinite() | outside, math.inf)
    # where the latent itself overflows, -inf is no statement about the support
    outside = outside & torch.isin(rows, context.usable_rows()).cpu()
    error = torch.where(outside, torch.zeros_like(error), error)
    error = error.nan_to_num(nan=math.inf, posinf=math.inf)
    gap = _apart_from_parts(context, few, own[: len(few)])
    return _Measured(own, error, outside, reference, repeats, gap, expected)


def _apart_from_parts(context: AuditContext, rows: Tensor, own: Tensor) -> float:
    """How far log p(x) is from the base's log p(z) plus the log-determinant, beyond rounding."""
    model, x = context.at(rows)
    base = model.base()
    if base is None or base.log_density is None:
        return 0.0
    try:
        with torch.no_grad():
            z, log_det = model.forward_and_log_det(x)
            parts = (base.log_prob(z) + log_det).double().cpu()
    except (ModelError, NotApplicable, RuntimeError, ValueError):
        # a base that has no value there, as outside of its support
        model.recovery()
        return 0.0
    if parts.shape != own.shape:
        return 0.0
    rounding = SAME * torch.finfo(x.dtype).eps * own.abs().clamp(min=1.0)
    apart = (parts - own).abs() - rounding
    return max(0.0, apart[apart.isfinite()].max().item()) if bool(apart.isfinite().any()) else 0.0


def _unchecked(own: Tensor, repeats: float, why: Missing) -> _Measured:
    return _Measured(own, torch.full_like(own, math.nan), own == -math.inf, str(why), repeats)


def _log_prob(context: AuditContext, model: AuditedModel, rows: Tensor, x: Tensor) -> Tensor:
    def measure(part: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            value = model.select(part).log_prob(x[part])
        if value.shape != (len(part),):
            raise ModelError(
                f"log_prob of the model returns shape {tuple(value.shape)}, expected ({len(part)},)"
            )
        return (value.double(),)

    at_most = min(BATCH, context.max_forward())
    return context.parallel.map(rows, measure, at_most=at_most)[0].cpu()


def _precise(context: AuditContext, rows: Tensor) -> Tensor | Missing:
    try:
        copy = context.in_float64()
        return _log_prob(context, copy, rows, context.x.double())
    except (ModelError, NotApplicable) as error:
        return Missing(f"no float64 copy could be measured: {error}")


def _estimated_error(
    context: AuditContext, rows: Tensor, own: Tensor
) -> tuple[Tensor, str] | Missing:
    """The error of a float64 model, in nats, from a copy that errs visibly."""
    eps = torch.finfo(torch.float64).eps
    coarse = _attempt(lambda: _float32_log_prob(context, rows))
    if coarse is not None and bool(coarse[own.isfinite()].isfinite().all()):
        ratio = eps / torch.finfo(torch.float32).eps
        return (coarse - own).abs() * ratio, "estimated from a float32 copy"
    moved = _attempt(lambda: _perturbed_log_prob(context, rows))
    if moved is not None:
        error = (moved - own).abs() * (eps / PERTURBATION)
        return error, "estimated from random changes by 2^-36"
    return Missing("neither a float32 nor a perturbed copy could be measured")


def _attempt(measure: Callable[[], Tensor]) -> Tensor | None:
    try:
        return measure()
    except (ModelError, NotApplicable):
        return None


def _float32_log_prob(context: AuditContext, rows: Tensor) -> Tensor:
    copy = context.in_dtype(torch.float32)
    return _log_prob(context, copy, rows, context.x.float())


def _perturbed_log_prob(context: AuditContext, rows: Tensor) -> Tensor:
    generator = context.generator()
    copy = context.model.to_dtype(torch.float64)  # of its own: its weights are moved

    def move(t: Tensor) -> Tensor:
        noise = torch.randn(t.shape, generator=generator, device="cpu", dtype=torch.float64)
        return t * (1 + PERTURBATION * noise.to(t.device))

    with torch.no_grad():
        for parameter in copy.parameters():
            if parameter.is_floating_point():
                parameter.copy_(move(parameter))
    return _log_prob(context, copy, rows, move(context.x))


def _finding(context: AuditContext, measured: _Measured) -> Finding:
    limit = context.limits.density
    count = len(measured.own)
    figure = worst(measured.error)
    # a row that the float64 copy calls finite, and the model does not, has an infinite error
    broken = ~measured.own.isfinite() & ~measured.outside
    if bool(broken.any()):
        verdict = Verdict.NON_FINITE
        reason = f"log p(x) of {int(broken.sum())} of {count} samples is NaN or Inf"
    elif bool(measured.error.isnan().all()):
        verdict, figure = Verdict.UNDECIDED, math.nan
        reason = f"log p(x) could not be checked: {measured.reference}"
    elif measured.is_random and measured.repeats > NOTICED * limit:
        verdict = Verdict.UNDECIDED
        reason = (
            "log p(x) is random, as where a trace is estimated: two calls on the same x differ by "
            f"up to {brief(measured.repeats)} nats"
        )
    elif measured.apart > limit:
        verdict, figure = Verdict.UNSTABLE, measured.apart
        reason = (
            "log_prob(x) is not the base's log p(z) plus the log-determinant: they differ by up to "
            f"{brief(measured.apart)} nats"
        )
    else:
        verdict = context.limits.verdict(figure, limit)
        reason = _reason(context, measured, figure)
    if int(measured.outside.sum()):
        reason += f"; {int(measured.outside.sum())} samples lie where p(x) = 0"
    return Finding(verdict, figure, limit, "nats", reason, count, len(context.x))


def _reason(context: AuditContext, measured: _Measured, figure: float) -> str:
    limit, count = context.limits.density, len(measured.own)
    above = int((measured.error > limit).sum())
    if not above:
        text = f"log p(x) of all {count} samples right to {brief(figure)} nats (limit {limit:g})"
        return text if measured.reference == "float64 copy" else f"{text}, {measured.reference}"
    low, high = rate_interval(above, count, confidence=context.limits.confidence)
    return (
        f"log p(x) of {above} of {count} samples is off by more than {limit:g} nats "
        f"({percent(low)} to {percent(high)} % of all), by up to {brief(figure)}"
    )


def _values(context: AuditContext, measured: _Measured) -> dict[str, float]:
    error = measured.error
    dimension = context.x[0].numel()
    return {
        "max_error": worst(error),
        "median_error": error.median().item(),
        "bits_per_dimension": worst(error) / math.log(2) / dimension,
        "share_above_limit": (error > context.limits.density).double().mean().item(),
        "largest_log_prob": worst(measured.own[measured.own.isfinite()].abs()),
    }


def _advice(measured: _Measured, limit: float) -> str:
    if measured.apart > 0 and measured.apart >= worst(measured.error):
        return "Compare log_prob with its formula, or the base with the one that is sampled from."
    if measured.float64_suffices(limit):
        return "Evaluate log p in float64: model.double().log_prob(x.double())."
    if bool(measured.error.isfinite().all()):
        largest = brief(measured.own.abs().max())
        return (
            f"log p(x) is of {largest} nats, of which float64 does not resolve {limit:g} either: "
            "bound the scales of the layers, or standardise the data, and train again."
        )
    return "Bound the scales of the layers: their log-determinants leave the range of the dtype."

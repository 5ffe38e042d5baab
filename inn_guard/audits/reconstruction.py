"""reconstruction: does x -> z -> x come back, and if not, why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.audited_model import ModelError
from inn_guard.audits.bits_lost import bits_lost_by_layer
from inn_guard.audits.context import AuditContext
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.explained_rounding import MAX_STEPS, Explanation, explain
from inn_guard.audits.level import Level
from inn_guard.audits.round_trip import (
    RoundTrip,
    first_non_finite,
    latent_round_trip,
    round_trip,
    unconverged,
)
from inn_guard.audits.solver_settings import HELPS, SAMPLES, Turned, find_helpful_setting
from inn_guard.audits.spec import audit_check
from inn_guard.audits.thresholds import feature_scale, format_log10, worst
from inn_guard.core.missing import Missing, NotApplicable
from inn_guard.core.tensors import finite_rows
from inn_guard.report.formatting import brief
from inn_guard.report.result import AuditResult, to_full_batch
from inn_guard.report.uses import Finding
from inn_guard.report.verdict import Verdict

__all__ = ["reconstruction"]

#: The worst ones, whose condition number is measured where the round trip fails.
EXPLAINED_SAMPLES = 8
FIRST = 16  #: samples at which the iterations of an inverse are looked at
#: An error that rounding explains is known to first order up to this share of a feature's scale.
LINEAR = 0.1
SHOWN = 8  #: images kept for the report, the worst ones
#: A float64 round trip whose error is above this share of the float32 one is limited by the
#: inverse, not by rounding.
FLOOR_SHARE = 0.1


def _cost(task: Task) -> Cost:
    batch = min(task.samples, int(task.settings["batch_size"]))
    passes = Passes(forward=4, inverse=2) * task.samples
    return Cost(passes, batch, vectors=4)


@audit_check(
    question="Does x -> z -> x come back?",
    uses=("reconstruction",),
    level=Level.QUICK,
    cost=_cost,
    shares_samples=True,
)
def reconstruction(context: AuditContext, *, batch_size: int = 128) -> AuditResult:
    """Error of x -> z -> x of all samples, entry by entry in units of the entry's feature.

        error_b = max_j |F^-1(F(x_b))_j - x_bj| / max(deviation of feature j, |x_bj|)

    The verdict is that of the largest error against ``limits.reconstruction`` (at least what the
    dtype can hold), and non_finite where NaN or Inf comes back. A map that is injective only is
    judged by z -> x -> z from z = F(x); its x -> z -> x is a projection.

    A float64 copy runs the same round trip. Where the model fails, its error tells the cause:
    float64 comes back (rounding: more precision helps); float64 fails, too, by no more than ten
    times its rounding and condition explain (no precision helps much); or by more (the inverse is
    another map, or an iteration that did not converge). Where it fails, the layers are listed with
    the bits that each throws away at the first samples.

    Args:
        context: model and data.
        batch_size: samples in one call.

    Returns:
        per sample max_error and l2_error (units of x), relative_error (of the feature),
        latent_error (z -> x -> z); per layer, of a model that fails, bits_lost (per entry of x).
    """
    rows = context.finite_rows()
    if not len(rows):
        reason = "every sample of x contains NaN or Inf already: there is nothing to reconstruct"
        return reconstruction.without_answer(
            Verdict.NON_FINITE, reason, advice="Remove NaN and Inf from the data, then audit again."
        )
    measured = _measure(context, rows, batch_size)
    finding, advice = _finding(context, measured)
    return AuditResult(
        "reconstruction",
        finding.verdict,
        finding.reason,
        uses={"reconstruction": finding},
        headline=("relative_error",),
        values=_values(measured),
        units=_UNITS,
        **_by_sample(measured, len(context.x)),
        per_layer=_bits_by_layer(context, measured) if finding.verdict.failed else (),
        settings={
            "samples": len(rows),
            "of": len(context.x),
            "limit": finding.limit,
            "batch_size": batch_size,
            "float64": measured.float64,
            "cause": measured.cause,
            "setting": "" if measured.turned is None else measured.turned.sentence(),
            "seed": context.seed,
        },
        advice=advice,
        images=_images(measured.data),
    )


_UNITS = {
    "max_error": "units of x",
    "l2_error": "units of x",
    "relative_error": "of the feature",
    "float64_error": "of the feature",
    "latent_error": "of |z|",
    "bits_lost": "bits per entry of x",
}


@dataclass(frozen=True)
class _Measured:
    """Round trips of the finite rows of x.

    Attributes:
        rows: which rows of x.
        data: x -> z -> x.
        encoded: z -> x -> z from the latents of the data.
        bijective: whether x -> z -> x ought to be the identity.
        precise: the deciding round trip in a float64 copy, or why there is none.
        explained: for the worst samples of a failing model, what rounding explains; None else.
        cause: "rounding", "condition", "tolerance", "unconverged", "wrong inverse", "unknown", or
            "" where nothing fails.
        turned: a setting of the inverse that makes it more exact, if one was found.
    """

    rows: Tensor
    data: RoundTrip
    encoded: RoundTrip
    bijective: bool
    precise: RoundTrip | Missing
    explained: Explanation | None = None
    cause: str = ""
    turned: Turned | None = None

    @property
    def deciding(self) -> RoundTrip:
        """The round trip that ought to be the identity."""
        return self.data if self.bijective else self.encoded

    @property
    def start(self) -> str:
        """What it starts from, in words."""
        return "" if self.bijective else " of encoded latents"

    @property
    def float64(self) -> str:
        """Whether the float64 copy was measured, in words."""
        return "measured" if isinstance(self.precise, RoundTrip) else self.precise.reason

    @property
    def float64_error(self) -> Tensor | None:
        """Error of the float64 copy by feature, (B,); None where it was not measured."""
        return self.precise.by_feature if isinstance(self.precise, RoundTrip) else None


def _measure(context: AuditContext, rows: Tensor, batch_size: int) -> _Measured:
    model, x = context.at(rows)
    fits = context.max_forward()
    if x.dtype != torch.float64:
        fits = fits / 2  # the float64 copy takes twice as much
    at_once = max(1, int(min(batch_size, fits)))
    parallel = context.parallel
    data = round_trip(model, x, batch_size=at_once, parallel=parallel)
    encoded = latent_round_trip(
        model, data.middle, x=data.end, batch_size=at_once, parallel=parallel
    )
    measured = _Measured(rows, data, encoded, model.bijective, Missing("not measured"))
    precise = _in_float64(context, measured, at_once)
    measured = _Measured(rows, data, encoded, model.bijective, precise)
    limit = context.limits.round_trip(x.dtype)
    if worst(measured.deciding.by_feature) > limit:
        measured = _with_cause(context, measured, limit)
    if measured.cause == "rounding" or not _has_floor(measured):
        return measured
    error = worst(measured.deciding.by_feature)
    if context.limits.verdict(error, limit) is Verdict.STABLE:
        return measured  # there is nothing to turn
    turned = _helpful_setting(context, measured, limit)
    # alone, the worst samples may take other steps than in their batch, and have other errors
    if turned is not None and not turned.error_after * HELPS <= error:
        turned = None
    cause = "tolerance" if turned is not None and measured.cause else measured.cause
    return dataclasses.replace(measured, turned=turned, cause=cause)


def _has_floor(measured: _Measured) -> bool:
    """Whether precision does not make the inverse exact, as with iterations and solvers."""
    error, precise = worst(measured.deciding.by_feature), measured.float64_error
    dtype = measured.deciding.start.dtype
    if measured.cause or precise is None:
        return bool(measured.cause)
    if dtype == torch.float64:
        # without a finer copy: far above what rounding does to well-conditioned maps
        return error > torch.finfo(dtype).eps ** 0.5
    floor = worst(precise)
    least = max(FLOOR_SHARE * error, torch.finfo(dtype).eps)
    return floor > least and math.isfinite(floor)


def _helpful_setting(context: AuditContext, measured: _Measured, limit: float) -> Turned | None:
    """A setting that makes the inverse more exact at the worst samples."""
    if not measured.bijective:
        return None
    worst_rows = _worst_rows(context, measured)[:SAMPLES]
    if not len(worst_rows):
        return None
    chosen = measured.rows[worst_rows.to(measured.rows.device)]
    return find_helpful_setting(*context.at(chosen), limit)


def _in_float64(context: AuditContext, measured: _Measured, batch_size: int) -> RoundTrip | Missing:
    start = measured.deciding.start
    if start.dtype == torch.float64:
        return measured.deciding
    go = round_trip if measured.bijective else latent_round_trip
    try:
        copy = context.in_float64().select(measured.rows)
        return go(copy, start.double(), batch_size=batch_size, parallel=context.parallel)
    except (ModelError, NotApplicable) as error:
        return Missing(str(error))


def _with_cause(context: AuditContext, measured: _Measured, limit: float) -> _Measured:
    """The same with the reason why a round trip fails."""
    parts = (measured.rows, measured.data, measured.encoded, measured.bijective, measured.precise)
    precise = measured.precise
    if isinstance(precise, RoundTrip) and worst(precise.by_feature) <= limit:
        return _Measured(*parts, cause="rounding")
    worst_rows = _worst_rows(context, measured)
    chosen = worst_rows.to(measured.rows.device)
    unit = feature_scale(measured.deciding.start)[chosen]
    explained = _explain(context, measured.rows[chosen], unit)
    if explained is None or isinstance(precise, Missing):
        return _Measured(*parts, explained, cause="unknown")
    allowed = explained.error(torch.float64)
    # where rounding moves a sample this far, the derivative at the sample no longer tells how far
    allowed = torch.where(allowed > LINEAR, torch.inf, allowed)
    # an error of NaN or Inf is beyond every finite bound, and never beyond an infinite one
    error = precise.by_feature[worst_rows]
    error = error.where(error.isfinite(), torch.inf)
    beyond = error > allowed.where(allowed.isfinite(), torch.inf)
    cause = "condition"
    if bool(beyond.any()):
        cause = "unconverged" if _unconverged(context, measured.rows) else "wrong inverse"
    return _Measured(*parts, explained, cause=cause)


def _worst_rows(context: AuditContext, measured: _Measured) -> Tensor:
    """Positions of the samples with the largest errors whose latents are finite."""
    usable = finite_rows(measured.data.middle).cpu().nonzero()[:, 0]
    errors = measured.deciding.by_feature[usable].nan_to_num(math.inf, posinf=math.inf)
    ordered = usable[errors.argsort(descending=True)]
    fits = context.max_linearized(2 * MAX_STEPS + len(context.model.layers()))
    return ordered[: int(min(EXPLAINED_SAMPLES, fits))]


def _explain(context: AuditContext, rows: Tensor, unit: Tensor) -> Explanation | None:
    if not context.model.bijective or not len(rows):
        return None
    try:
        return explain(context.linearization(rows), unit=unit, seed=context.seed)
    except (ModelError, NotApplicable):
        return None


def _bits_by_layer(context: AuditContext, measured: _Measured) -> tuple[Mapping[str, Any], ...]:
    """What each layer of a bijective model throws away, where it is known of all."""
    if not measured.bijective:
        return ()
    model, x = context.at(measured.rows[:FIRST])
    try:
        rows = bits_lost_by_layer(model, x)
    except (ModelError, NotApplicable):
        return ()
    if any(math.isnan(row["bits_lost"]) for row in rows):
        return ()
    return rows


def _finding(context: AuditContext, measured: _Measured) -> tuple[Finding, str]:
    error = measured.deciding.by_feature
    count = len(error)
    limit = context.limits.round_trip(context.x.dtype)
    lost = ~measured.deciding.finite
    left_out = len(context.x) - count
    if bool(lost.any()):
        verdict = Verdict.NON_FINITE
        reason = f"{int(lost.sum())} of {count} round trips{measured.start} return NaN or Inf"
        reason += _first_place(context, measured, lost)
    else:
        verdict = context.limits.verdict(worst(error), limit)
        reason = (
            f"worst of {count} round trips{measured.start} {brief(worst(error))} of its feature "
            f"(limit {limit:g})"
        )
    reason += _because(measured, limit)
    reason += _floor(measured)
    if measured.turned is not None:
        reason += f"; {measured.turned.sentence()}"
    if not verdict.failed or measured.cause in ("unconverged", "tolerance"):
        reason += _unconverged(context, measured.rows)
    if left_out:
        reason += f"; {left_out} samples of x contain NaN or Inf and are left out"
    unit = "of the feature's deviation or size"
    finding = Finding(verdict, worst(error), limit, unit, reason, count, len(context.x))
    return finding, _advice(measured) if verdict.failed else ""


def _advice(measured: _Measured) -> str:
    if measured.turned is not None:
        return measured.turned.advice()
    return _ADVICE[measured.cause]


_ADVICE = {
    "": "",
    "rounding": (
        "Invert with a few layers in float64, where the round trips were measured to come back: "
        "ig.raise_precision(flow, x)."
    ),
    "condition": "Bound the scales of the layers, or fine-tune: ig.stabilize(flow, batches).",
    "tolerance": "",
    "unconverged": (
        "Bound the Lipschitz constant of the iterated layers below 1: no setting of the iteration "
        "was found that lowers the error."
    ),
    "wrong inverse": ("Compare the inverse with the forward formula."),
    "unknown": "Bound the scales of the layers, or train with a RegularizerHook.",
}


def _first_place(context: AuditContext, measured: _Measured, lost: Tensor) -> str:
    """The layer in which the first lost sample stops being finite."""
    first = lost.nonzero()[:1, 0].to(measured.rows.device)
    model, x = context.at(measured.rows[first])
    try:
        place = first_non_finite(model, x)
    except (ModelError, NotApplicable) as error:
        return f", and {error}"
    return "" if place is None else f", first in {place}"


def _because(measured: _Measured, limit: float) -> str:
    precise = measured.float64_error
    if not measured.cause:
        return ""
    text = ""
    if precise is not None and measured.cause == "rounding":
        return f"; in float64 they come back to {brief(worst(precise))}"
    if precise is not None and measured.cause == "wrong inverse":
        text = (
            f"; the inverse is another map, not an inexact one: in float64 it is off by "
            f"{brief(worst(precise))}, more than rounding explains"
        )
    elif precise is not None and measured.cause == "tolerance":
        text = f"; the inverse itself is inexact: float64 is off by {brief(worst(precise))}, too"
    elif precise is not None and measured.deciding.start.dtype != torch.float64:
        off = f"is off by {brief(worst(precise))}"
        if not math.isfinite(worst(precise)):
            off = "returns NaN or Inf"
        text = f"; float64 {off}, too"
    if measured.explained is not None:
        condition = (
            measured.explained.log_condition.nan_to_num(math.inf, posinf=math.inf).max().item()
        )
        count = len(measured.explained.log_condition)
        text += (
            f"; the condition number is {format_log10(condition / math.log(10))} at the worst of "
            f"the {count} worst samples"
        )
    return text


def _floor(measured: _Measured) -> str:
    """What is said of an inverse that is inexact in float64, too, as iterations and solvers are."""
    precise = measured.float64_error
    if measured.cause or precise is None or not _has_floor(measured):
        return ""
    if measured.deciding.start.dtype == torch.float64:
        return ""
    return f"; the inverse itself is exact to {brief(worst(precise))} only, in float64, too"


def _unconverged(context: AuditContext, rows: Tensor) -> str:
    """Which iterations of the inverse did not end at the first samples, in words."""
    model, x = context.at(rows[:FIRST])
    found = unconverged(model, x)
    return "".join(
        f"; the inverse of {layer} did not converge: {how}" for layer, how in found.items()
    )


def _values(measured: _Measured) -> dict[str, float]:
    values = {
        "relative_error": worst(measured.deciding.by_feature),
        "max_error": measured.data.largest.max().item(),
        "l2_error": measured.data.l2.max().item(),
        "latent_error": measured.encoded.relative.max().item(),
        "non_finite_samples": float((~measured.deciding.finite).sum()),
    }
    precise = measured.float64_error
    if precise is not None:
        values["float64_error"] = worst(precise)
    if measured.explained is not None:
        log_condition = measured.explained.log_condition.max().item()
        values["log10_condition_number"] = log_condition / math.log(10)
    return values


def _by_sample(measured: _Measured, batch: int) -> dict[str, Any]:
    named = {
        "relative_error": measured.deciding.by_feature,
        "max_error": measured.data.largest,
        "l2_error": measured.data.l2,
        "latent_error": measured.encoded.relative,
    }
    precise = measured.float64_error
    if precise is not None:
        named["float64_error"] = precise
    return to_full_batch(named, measured.rows, batch)


def _images(data: RoundTrip) -> dict[str, Tensor]:
    """The worst samples with their reconstructions, if they are images."""
    start = data.start
    if start.dim() != 4 or start.shape[1] not in (1, 3) or min(start.shape[2:]) < 2:
        return {}
    order = data.largest.nan_to_num(math.inf, posinf=math.inf).argsort(descending=True)
    rows = order[:SHOWN].to(start.device)
    original = start[rows].detach().cpu()
    returned = data.end[rows].detach().cpu()
    return {"original": original, "reconstruction": returned, "difference": returned - original}

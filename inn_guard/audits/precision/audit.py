"""precision: in which dtype the model still inverts, forecast and measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.audited_model import ModelError
from inn_guard.audits.context import AuditContext
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.fault_tolerant import patience
from inn_guard.audits.level import Level
from inn_guard.audits.precision.by_use import BASE_DRAWS, FiguresByUse, lowest_by_use
from inn_guard.audits.precision.forecast import (
    NUMERIC,
    DtypeCopies,
    RoundingForecaster,
)
from inn_guard.audits.precision.number_format import (
    NumberFormat,
    autocast,
    number_formats,
    tf32,
)
from inn_guard.audits.round_trip import RoundTrip
from inn_guard.audits.spec import audit_check
from inn_guard.core.missing import NotApplicable
from inn_guard.execution.memory import forward_footprint
from inn_guard.execution.time_limit import TimedOut, time_limit
from inn_guard.jacobian.rounding_error import unit_roundoff
from inn_guard.report.formatting import brief
from inn_guard.report.limits import Limits
from inn_guard.report.result import AuditResult, to_full_batch
from inn_guard.report.verdict import Verdict

__all__ = ["precision"]

#: A forecast this far below usable is decided: most samples lie within a factor of 3 of theirs.
MARGIN = 5.0
#: A forecast error of the size of the feature: first order says nothing more, and x is lost.
BROKEN = 1.0
DRAWS = 128  #: realisations of the rounding errors, over all samples together, that are enough
FORMATS = 5  #: on a CPU
#: At most, however few the samples: each costs about as much as three passes of the inverse.
SWEEPS = 2
QUANTILE = 0.95  #: of the samples; the few beyond it do not decide


def _cost(task: Task) -> Cost:
    forecast = Passes(forward=1, inverse=2 * SWEEPS)
    round_trips = Passes(forward=3, inverse=2) * FORMATS
    figures = Passes(forward=3, inverse=1) * FORMATS
    draws = Passes(forward=1, inverse=1) * (FORMATS * BASE_DRAWS)
    passes = (round_trips + forecast + figures) * task.samples + draws
    return Cost(passes, task.samples, vectors=2 * (task.layers + 4))


@audit_check(
    question="In which precision does the model still work?",
    level=Level.STANDARD,
    cost=_cost,
)
def precision(
    context: AuditContext,
    *,
    candidates: Sequence[NumberFormat] | None = None,
    usable: float | None = None,
    probes: int | None = None,
) -> AuditResult:
    """Error of the round trip in each number format, forecast and measured.

        error_b = max_j |F^-1(F(x_b))_j - x_bj| / max(deviation of feature j, |x_bj|)

    It is that of ``reconstruction``, so that no unit of a feature matters.

    The forecast says works if its 95 % quantile over the samples is below usable / 5, breaks if it
    exceeds 1 or a state leaves the range of the dtype, uncertain in between. It counts one
    rounding per layer. A layer that rounds many times inside, such as a polynomial of high degree,
    shows in the round trip in float32: for a coarser dtype, works is said only if that error, too,
    times the ratio of the roundoffs, is below usable / 5.

    For all dtypes together the forecast costs one forward pass and ``probes`` sweeps, each about
    one inverse pass, in a float64 copy (more where there is no such copy or its inverse does not
    come back: then the sweeps are products with derivatives). Under autocast a state is rounded to
    the dtype of the layer that made it, but a coarser rounding inside a sub-network may come out
    otherwise in the inverse, whose input differs in the last bits: works is said only if every
    layer could round to the coarse dtype, breaks only if the finer roundings do it alone; the
    larger forecast is
    printed. The measurement runs the model; a round trip that takes longer than 50 times the
    model's own, and 10 s, is given up and counts as broken: an adaptive solver may never reach its
    tolerance in a coarse dtype. Data that a dtype cannot hold to ``usable`` count as an error of
    the size of what is lost. The verdict is that of the model's own dtype.

    The round trip of a map that is injective only is a projection: it starts from F^-1(F(x)), which
    lies on the manifold, and there is no forecast. Samples with NaN or Inf are left out.

    In each format the figures of the uses are measured, too: the error of log p(x) against the
    float64 copy, of round trips by feature, and the lost of 256 draws from the base.
    ``settings["lowest"]`` names the coarsest format that passes each use.

    Args:
        context: model and data.
        candidates: what to try, at least one. Default: ``number_formats(x.device)``.
        usable: error of the feature up to which an inverse is usable. Default:
            ``limits.reconstruction``, at least what the coarsest dtype of the format can hold,
            which is 6 per cent for bfloat16.
        probes: sweeps of the forecast. Default: 1 for 128 samples or more, 2 for fewer.

    Returns:
        AuditResult with the table ``number format``, one row each, and per_sample errors of the
        format judged: the model's own dtype, or the first candidate if it is not among them.

    Raises:
        ValueError: if there is no candidate, or ``usable`` or ``probes`` is not positive.

    References:
        see ``inn_guard.rounding_forecast``.
    """
    x = context.x
    candidates = number_formats(x.device) if candidates is None else candidates
    _check(candidates, usable, probes)
    rows = context.finite_rows()[: _fitting(context)]
    if not len(rows):
        reason = "every sample of x contains NaN or Inf already: there is no round trip to measure"
        return AuditResult(
            "precision", Verdict.NON_FINITE, reason, advice="Clean the data, then audit again."
        )
    chosen, start = context.at(rows)
    if not chosen.bijective:
        start = _projected(context, rows)
    probes = min(SWEEPS, math.ceil(DRAWS / len(rows))) if probes is None else probes
    copies = DtypeCopies(context, rows)
    forecaster = RoundingForecaster(copies, start, probes=probes, seed=context.seed)
    limits = [usable or context.limits.round_trip(one.coarsest) for one in candidates]
    seconds = patience(chosen, start)
    measured = [_relative(copies, start, one, seconds=seconds) for one in candidates]
    in_float32 = _error_in_float32(candidates, measured)
    figures = FiguresByUse(context, copies.of, rows, seconds)
    table = []
    for one, found, limit in zip(candidates, measured, limits, strict=True):
        row = _row(one, found, limit, forecaster, in_float32)
        table.append({**row, **figures.of(one, found.trip)})
    mine = next((k for k, one in enumerate(candidates) if _is_own(one, x.dtype)), 0)
    verdict, reason = _verdict(context.limits, table[mine], own=_is_own(candidates[mine], x.dtype))
    works = _working(table, table[mine])
    return AuditResult(
        name="precision",
        verdict=verdict,
        reason=f"{reason} Works in: {', '.join(works) or 'none of those tried'}.",
        headline=(f"{table[mine]['number format']}_error",),
        values=_values(table),
        units=dict.fromkeys(_values(table), "of the feature"),
        **to_full_batch({"error": _with_losses(measured[mine], limits[mine])}, rows, len(x)),
        tables={"number format": tuple(table)},
        settings={
            "usable": limits[mine],
            "margin": MARGIN,
            "quantile": QUANTILE,
            "probes": probes,
            "lowest": lowest_by_use(context, table),
            "seed": context.seed,
            "samples": len(rows),
            "of": len(x),
            "device": str(x.device),
            "start": "x" if context.model.bijective else "F^-1(F(x))",
        },
        advice="" if verdict.passed else _advice(works, table[mine]["number format"]),
    )


def _fitting(context: AuditContext) -> int:
    """How many samples memory allows: all states of all of them are held in float64."""
    model, x = context.model, context.x
    states = 8 * (len(model.layers()) + 4) * x[0].numel()
    fits = context.max_batch(lambda within: forward_footprint(model, x, within=within).plus(states))
    return int(min(len(x), fits))


def _working(table: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> list[str]:
    """The formats that work. Where the model's own fails, a coarser one has to meet its limit.

    Else an inverse that is 5 % off in every format would work in bfloat16 alone, of which no more
    can be asked.
    """
    works = [row for row in table if row["measured verdict"] == "works"]
    if own["measured verdict"] != "works":
        works = [row for row in works if row["measured"] <= own["usable"]]
    return [row["number format"] for row in works]


def _check(candidates: Sequence[NumberFormat], usable: float | None, probes: int | None) -> None:
    if not candidates:
        raise ValueError(
            "expected at least one number format to try, got none: leave candidates out to try the "
            "usual ones"
        )
    if usable is not None and not usable > 0:
        raise ValueError(
            f"expected a positive usable error, as a share of the feature; got {usable}"
        )
    if probes is not None and probes < 1:
        raise ValueError(
            f"expected at least 1 probe, or None for as many as are needed; got {probes}"
        )


def _is_own(number_format: NumberFormat, dtype: torch.dtype) -> bool:
    return (
        number_format.storage == dtype and number_format.autocast is None and not number_format.tf32
    )


def _projected(context: AuditContext, rows: Tensor) -> Tensor:
    """F^-1(F(x)) at these rows, computed in float64 where the model can."""
    model, x = context.at(rows)
    with torch.no_grad():
        try:
            copy = context.in_dtype(torch.float64).select(rows)
            return copy.inverse(copy(x.double())).to(x.dtype)
        except (NotApplicable, ModelError):
            return model.inverse(model(x))


@dataclass(frozen=True)
class _Measured:
    """One round trip.

    Attributes:
        error: by feature, (B,).
        lost: what the dtype loses of the data themselves, likewise.
        trip: the states of it, if the model ran.
        problem: what the model raised; "" if nothing.
    """

    error: Tensor
    lost: Tensor
    trip: RoundTrip | None = None
    problem: str = ""


def _row(
    number_format: NumberFormat,
    measurement: _Measured,
    usable: float,
    forecaster: RoundingForecaster,
    in_float32: float | None,
) -> dict[str, Any]:
    forecast = forecaster.relative(number_format)
    measured = _with_losses(measurement, usable)
    finite = measured[measured.isfinite()]
    outside = int((measurement.lost > usable).sum())
    remark = (
        f"{outside} samples do not fit the range of the dtype" if outside else forecaster.reason
    )
    refused = measurement.problem.startswith("refused")
    return {
        "number format": number_format.name,
        "unit roundoff": number_format.roundoff,
        "usable": usable,
        "forecast": None if forecast is None else _quantile(forecast[1]),
        "forecast verdict": _forecast_verdict(forecast, number_format, usable, in_float32),
        "measured": None if refused else _quantile(measured),
        "measured median": finite.median().item() if len(finite) else None,
        "non-finite samples": None if refused else len(measured) - len(finite),
        "measured verdict": "refused" if refused else _measured_verdict(measured, usable),
        "remark": measurement.problem or remark,
    }


def _values(table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Errors measured, then forecast; what was not measured has no entry."""
    named = {f"{row['number format']}_error": row["measured"] for row in table}
    named |= {f"{row['number format']}_forecast": row["forecast"] for row in table}
    return {name: value for name, value in named.items() if value is not None}


def _with_losses(measurement: _Measured, usable: float) -> Tensor:
    """The errors; where the dtype cannot hold a sample, at least what it loses of it."""
    error, lost = measurement.error, measurement.lost
    return torch.where(lost > usable, torch.maximum(error, lost), error)


def _relative(
    copies: DtypeCopies, x: Tensor, number_format: NumberFormat, *, seconds: float
) -> _Measured:
    """Measured error of x -> z -> x by feature, and what came instead, '' if the model ran.

    It may have refused (no such operation in this dtype: nan), raised (its own check of its numbers
    failed: inf) or not returned (a solver that cannot reach its tolerance in this dtype: inf).
    """
    cast = x.to(number_format.storage)
    lost = RoundTrip(x, x, cast).by_feature
    try:
        with (
            torch.no_grad(),
            tf32(number_format),
            autocast(x.device.type, number_format),
            time_limit(seconds),
        ):
            copy = copies.of(number_format.storage)
            z = copy(cast.clone())
            rebuilt = copy.inverse(z)
    except TimedOut as hang:
        return _Measured(_failed(x, math.inf), lost, problem=f"did not return: {hang}")
    except (NotApplicable, ModelError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, NUMERIC):
            return _Measured(_failed(x, math.inf), lost, problem=f"raised: {_one_line(cause)}")
        return _Measured(_failed(x, math.nan), lost, problem=f"refused: {_one_line(cause)}")
    trip = RoundTrip(cast, z, rebuilt)
    return _Measured(trip.by_feature, lost, trip)


def _failed(x: Tensor, value: float) -> Tensor:
    return torch.full((len(x),), value, dtype=torch.float64)


def _one_line(error: BaseException) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])


def _quantile(values: Tensor) -> float:
    """The 95 % quantile, a NaN counting as worse than any number."""
    ordered = values.double().nan_to_num(nan=math.inf, posinf=math.inf).sort().values
    return ordered[max(0, math.ceil(QUANTILE * len(ordered)) - 1)].item()


def _error_in_float32(
    candidates: Sequence[NumberFormat], measured: Sequence[_Measured]
) -> float | None:
    """Measured error of the plain float32 round trip; None if it is not among the candidates."""
    for one, measurement in zip(candidates, measured, strict=True):
        if _is_own(one, torch.float32):
            return _quantile(measurement.error)
    return None


def _forecast_verdict(
    forecast: tuple[Tensor, Tensor] | None,
    number_format: NumberFormat,
    usable: float,
    in_float32: float | None,
) -> str:
    if forecast is None:
        return "none"
    least, most = map(_quantile, forecast)
    coarser = number_format.roundoff / unit_roundoff(torch.float32)
    # autocast keeps some layers in float32: the ratio of the roundoffs is not that of the errors
    if in_float32 is not None and coarser > 1 and number_format.autocast is None:
        most = max(most, in_float32 * coarser)
    if most <= usable / MARGIN:
        return "works"
    return "breaks" if least >= BROKEN else "uncertain"


def _measured_verdict(measured: Tensor, usable: float) -> str:
    finite = bool(measured.isfinite().all())
    return "works" if finite and _quantile(measured) <= usable else "breaks"


def _verdict(limits: Limits, row: dict[str, Any], *, own: bool) -> tuple[Verdict, str]:
    where = f"In {row['number format']}," + (" the dtype of the data," if own else "")
    if row["measured verdict"] == "refused":
        return Verdict.UNSTABLE, f"{where} the model refuses to run ({row['remark']})."
    if row["non-finite samples"]:
        why = f" ({row['remark']})" if row["remark"] else ""
        return (
            Verdict.NON_FINITE,
            f"{where} {row['non-finite samples']} samples do not come back finite{why}.",
        )
    if row["measured verdict"] == "breaks":
        return (
            Verdict.UNSTABLE,
            f"{where} 5 % of the samples come back more than {brief(row['measured'])} of a feature "
            f"off ({row['usable']:g} is usable).",
        )
    return (
        limits.verdict(row["measured"], row["usable"]),
        f"{where} 95 % of the samples come back within {brief(row['measured'])} of each feature "
        f"({row['usable']:g} is usable).",
    )


def _advice(works: list[str], own: str) -> str:
    if works:
        return f"Run the inverse in {works[0]} instead of {own}, or train with a regularizer."
    return "No dtype saves this inverse: train with a regularizer, or bound the layers' scales."

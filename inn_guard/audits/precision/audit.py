"""precision: in which dtype the model still inverts; a forecast from one linearisation beside the measured error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.audited_model import ModelError, polite, shares_of
from inn_guard.audits.fault_tolerant import patience
from inn_guard.audits.precision.arithmetic import NumberFormat, arithmetics, autocast, tf32
from inn_guard.audits.precision.forecast import (
    NUMERIC,
    DtypeCopies,
    RoundingForecaster,
    batch_length,
)
from inn_guard.audits.thresholds import max_usable_error
from inn_guard.core.invertible import Invertible, NotApplicable
from inn_guard.core.tensors import finite_rows
from inn_guard.execution.memory import forward_footprint
from inn_guard.execution.time_limit import TimedOut, time_limit
from inn_guard.report.result import AuditResult, Verdict, to_full_batch

__all__ = ["NumberFormat", "arithmetics", "precision"]

MARGIN = 5.0  #: a forecast this far below usable is decided; most samples lie within a factor of 3 of their forecast
BROKEN = 1.0  #: a forecast error of the size of x itself: first order says nothing more, and nothing is left of x
DRAWS = 128  #: realisations of the rounding errors, over all samples together, that are enough
SWEEPS = (
    2  #: at most, however few the samples: each costs about as much as three passes of the inverse
)
QUANTILE = 0.95  #: of the samples; the few beyond it do not decide


@polite
def precision(
    model: Invertible,
    x: Tensor,
    *,
    candidates: Sequence[NumberFormat] | None = None,
    usable: float | None = None,
    probes: int | None = None,
    seed: int = 0,
) -> AuditResult:
    """Relative error |F^-1(F(x)) - x| / |x| of the round trip in each arithmetic, forecast and measured.

    |x| is the sample's own length, at least the median one of the batch: a sample that is nearly zero is held to the
    size of its neighbours (`data_scale`).

    The forecast says works if its 95 % quantile over the samples is below usable / 5, breaks if it exceeds |x| or a
    state leaves the range of the dtype, uncertain in between. For all dtypes together it costs one forward pass and
    ``probes`` sweeps, each about one inverse pass, in a float64 copy (more where there is no such copy or its inverse
    does not come back: then the sweeps are products with derivatives). Under autocast a state is rounded to the dtype
    of the layer that made it, but a coarser rounding inside a sub-network may come out otherwise in the inverse, whose
    input differs in the last bits: works is said only if every layer could round to the coarse dtype, breaks only if
    the finer roundings do it alone; the larger forecast is printed. The measurement runs the model; a
    round trip that takes longer than 50 times the model's own, and 10 s, is given up and counts as broken: an adaptive
    solver may never reach its tolerance in a coarse dtype. Data that a dtype cannot hold to ``usable`` count as an
    error of the size of what is lost. The verdict is that of the model's own dtype.

    The round trip of a map that is injective only is a projection: it starts from F^-1(F(x)), which lies on the
    manifold, and there is no forecast. Samples with NaN or Inf are left out.

    Args:
        model: the map.
        x: data, (B, *data).
        candidates: what to try, at least one; ``arithmetics(x.device)`` unless given.
        usable: error in units of |x| up to which an inverse is usable; ``max_usable_error`` of the coarsest dtype in the
            arithmetic unless given, which is one per cent, and 6 per cent for bfloat16.
        probes: sweeps of the forecast; 1 for 128 samples or more, 2 for fewer, unless given.
        seed: of the forecast's random errors.

    Returns:
        AuditResult with the table ``arithmetic``, one row each, and per_sample errors of the arithmetic judged: the
        model's own dtype, or the first candidate if it is not among them.

    Raises:
        ValueError: if there is no candidate, or ``usable`` or ``probes`` is not positive.

    References:
        see ``inn_guard.rounding_forecast``.
    """
    candidates = arithmetics(x.device) if candidates is None else candidates
    _check(candidates, usable, probes)
    rows = finite_rows(x).nonzero()[:, 0][: _fitting(model, x)]
    if not len(rows):
        reason = "every sample of x contains NaN or Inf already: there is no round trip to measure"
        return AuditResult(
            "precision", Verdict.NON_FINITE, reason, advice="Clean the data, then audit again."
        )
    chosen, start = model.select(rows), x[rows]
    if not model.bijective:
        start = _projected(chosen, start)
    probes = min(SWEEPS, math.ceil(DRAWS / len(rows))) if probes is None else probes
    copies = DtypeCopies(chosen, start.dtype)
    forecaster = RoundingForecaster(copies, start, probes=probes, seed=seed)
    limits = [
        max_usable_error(arithmetic.coarsest) if usable is None else usable
        for arithmetic in candidates
    ]
    seconds = patience(chosen, start)
    measured = [_relative(copies, start, arithmetic, seconds=seconds) for arithmetic in candidates]
    table = [_row(*triple, forecaster) for triple in zip(candidates, measured, limits, strict=True)]
    mine = next((k for k, arithmetic in enumerate(candidates) if _is_own(arithmetic, x.dtype)), 0)
    verdict, reason = _verdict(table[mine], own=_is_own(candidates[mine], x.dtype))
    works = [row["arithmetic"] for row in table if row["measured verdict"] == "works"]
    return AuditResult(
        name="precision",
        verdict=verdict,
        reason=f"{reason} Works in: {', '.join(works) or 'none of those tried'}.",
        values=(values := _values(table)),
        units=dict.fromkeys(values, "|x|"),
        **to_full_batch({"error": _with_losses(measured[mine], limits[mine])}, rows, len(x)),
        tables={"arithmetic": tuple(table)},
        settings={
            "usable": limits[mine],
            "margin": MARGIN,
            "quantile": QUANTILE,
            "probes": probes,
            "seed": seed,
            "samples": len(rows),
            "of": len(x),
            "device": str(x.device),
            "start": "x" if model.bijective else "F^-1(F(x))",
        },
        advice="" if verdict is Verdict.STABLE else _advice(works, table[mine]["arithmetic"]),
    )


def _fitting(model: Invertible, x: Tensor) -> int:
    """How many samples memory allows: all states of all of them are held in float64."""
    states = 8 * (len(model.layers()) + 4) * x[0].numel()
    return int(
        min(
            len(x),
            shares_of(model).max_batch(
                lambda within: forward_footprint(model, x, within=within).plus(states)
            ),
        )
    )


def _check(candidates: Sequence[NumberFormat], usable: float | None, probes: int | None) -> None:
    if not candidates:
        raise ValueError(
            "expected at least one arithmetic to try, got none: leave candidates out to try the usual ones"
        )
    if usable is not None and not usable > 0:
        raise ValueError(f"expected a positive usable error, in units of |x|; got {usable}")
    if probes is not None and probes < 1:
        raise ValueError(
            f"expected at least 1 probe, or None for as many as are needed; got {probes}"
        )


def _is_own(arithmetic: NumberFormat, dtype: torch.dtype) -> bool:
    return arithmetic.storage == dtype and arithmetic.autocast is None and not arithmetic.tf32


def _projected(model: Invertible, x: Tensor) -> Tensor:
    """F^-1(F(x)), computed in float64 where the model can."""
    with torch.no_grad():
        try:
            twin = model.to_dtype(torch.float64)
            return twin.inverse(twin(x.double())).to(x.dtype)
        except (NotApplicable, ModelError):
            return model.inverse(model(x))


@dataclass(frozen=True)
class _Measured:
    """One round trip: errors in units of |x|, what the dtype lost of the data before, and what the model raised."""

    error: Tensor
    lost: Tensor
    problem: str = ""


def _row(
    arithmetic: NumberFormat, measurement: _Measured, usable: float, forecaster: RoundingForecaster
) -> dict[str, Any]:
    forecast = forecaster.relative(arithmetic)
    measured = _with_losses(measurement, usable)
    finite = measured[measured.isfinite()]
    outside = int((measurement.lost > usable).sum())
    remark = (
        f"{outside} samples do not fit the range of the dtype" if outside else forecaster.reason
    )
    refused = measurement.problem.startswith("refused")
    return {
        "arithmetic": arithmetic.name,
        "unit roundoff": arithmetic.roundoff,
        "usable": usable,
        "forecast": None if forecast is None else _quantile(forecast[1]),
        "forecast verdict": "none" if forecast is None else _forecast_verdict(*forecast, usable),
        "measured": None if refused else _quantile(measured),
        "measured median": finite.median().item() if len(finite) else None,
        "non-finite samples": None if refused else len(measured) - len(finite),
        "measured verdict": "refused" if refused else _measured_verdict(measured, usable),
        "remark": measurement.problem or remark,
    }


def _values(table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Errors measured, then forecast; what was not to be had has no entry."""
    named = {f"{row['arithmetic']}_error": row["measured"] for row in table}
    named |= {f"{row['arithmetic']}_forecast": row["forecast"] for row in table}
    return {name: value for name, value in named.items() if value is not None}


def _with_losses(measurement: _Measured, usable: float) -> Tensor:
    """The errors; where the dtype cannot hold a sample, at least what it loses of it."""
    error, lost = measurement.error, measurement.lost
    return torch.where(lost > usable, torch.maximum(error, lost), error)


def _relative(
    copies: DtypeCopies, x: Tensor, arithmetic: NumberFormat, *, seconds: float
) -> _Measured:
    """Measured |F^-1(F(x)) - x| / |x| per sample, and what came instead, '' if the model ran.

    It may have refused (no such operation in this dtype: nan), raised (its own check of its numbers failed: inf) or not
    returned (a solver that cannot reach its tolerance in this dtype: inf).
    """
    cast = x.to(arithmetic.storage)
    lost = _ratio(cast.double() - x.double(), x).cpu()
    try:
        with (
            torch.no_grad(),
            tf32(arithmetic),
            autocast(x.device.type, arithmetic),
            time_limit(seconds),
        ):
            twin = copies.of(arithmetic.storage)
            rebuilt = twin.inverse(twin(cast.clone()))
    except TimedOut as hang:
        return _Measured(_failed(x, math.inf), lost, f"did not return: {hang}")
    except (NotApplicable, ModelError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, NUMERIC):
            return _Measured(_failed(x, math.inf), lost, f"raised: {_one_line(cause)}")
        return _Measured(_failed(x, math.nan), lost, f"refused: {_one_line(cause)}")
    return _Measured(_ratio(rebuilt.double() - cast.double(), cast).cpu(), lost)


def _failed(x: Tensor, value: float) -> Tensor:
    return torch.full((len(x),), value, dtype=torch.float64)


def _one_line(error: BaseException) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])


def _ratio(difference: Tensor, reference: Tensor) -> Tensor:
    """|difference| / |reference| per sample in float64, also where a square overflows."""
    length = batch_length(reference)
    return (difference.double().flatten(1) / length[:, None]).norm(dim=1)


def _quantile(values: Tensor) -> float:
    """The 95 % quantile, a NaN counting as worse than any number."""
    ordered = values.double().nan_to_num(nan=math.inf, posinf=math.inf).sort().values
    return ordered[max(0, math.ceil(QUANTILE * len(ordered)) - 1)].item()


def _forecast_verdict(least: Tensor, most: Tensor, usable: float) -> str:
    if _quantile(most) <= usable / MARGIN:
        return "works"
    return "breaks" if _quantile(least) >= BROKEN else "uncertain"


def _measured_verdict(measured: Tensor, usable: float) -> str:
    finite = bool(measured.isfinite().all())
    return "works" if finite and _quantile(measured) <= usable else "breaks"


def _verdict(row: dict[str, Any], *, own: bool) -> tuple[Verdict, str]:
    where = f"In {row['arithmetic']}," + (" the dtype of the data," if own else "")
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
            f"{where} 5 % of the samples come back more than {row['measured']:.1e} |x| off.",
        )
    return (
        Verdict.STABLE,
        f"{where} 95 % of the samples come back within {row['measured']:.1e} |x| ({row['usable']:g} is usable).",
    )


def _advice(works: list[str], own: str) -> str:
    if works:
        return f"Run the inverse in {works[0]} instead of {own}, or train with a regularizer."
    return "No dtype saves this inverse: train with a regularizer, or bound the layers' scales."

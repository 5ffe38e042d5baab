"""precision: in which dtype the model still inverts; a forecast from one linearisation beside the measured error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.base import AuditResult, Verdict
from inn_guard.audits.round_trip import finite_rows
from inn_guard.audits.watched import ModelRaised, polite
from inn_guard.invertible import Invertible, NotApplicable
from inn_guard.linearization import Linearization
from inn_guard.rounding_forecast import RoundingForecast, rounding_forecast, unit_roundoff

__all__ = ["Arithmetic", "arithmetics", "precision"]

USABLE = 1e-2  #: l2 error of a reconstruction, in units of |x|, up to which an inverse is called usable
MARGIN = 5.0  #: a forecast this far below USABLE is decided; most samples lie within a factor of 3 of their forecast
BROKEN = 1.0  #: a forecast error of the size of x itself: first order says nothing more, and nothing is left of x
DRAWS = 128  #: realisations of the rounding errors, over all samples together, that the quantile is taken of
QUANTILE = 0.95  #: of the samples; the few beyond it do not decide
HALF = (torch.bfloat16, torch.float16)

#: what numbers that left their range make a model raise; anything else is an operation that the dtype does not have
NUMERIC = (ValueError, AssertionError, ArithmeticError, torch.linalg.LinAlgError)


@dataclass(frozen=True)
class Arithmetic:
    """One way to run a model: parameters and data in ``storage``, and under autocast to ``autocast`` if given."""

    name: str
    storage: torch.dtype
    autocast: torch.dtype | None = None
    tf32: bool = False

    @property
    def roundoff(self) -> float:
        """The coarsest unit roundoff in it; TF32 keeps 10 bits of the fraction of what enters a product."""
        return 2.0**-11 if self.tf32 else unit_roundoff(self.autocast or self.storage)


def arithmetics(device: torch.device) -> tuple[Arithmetic, ...]:
    """What is tried on this device: float64, float32, bfloat16, float16, autocast, and TF32 on a GPU."""
    plain = tuple(
        Arithmetic(str(dtype).removeprefix("torch."), dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    )
    autocast = (Arithmetic("autocast bfloat16", torch.float32, autocast=torch.bfloat16),)
    tf32 = (Arithmetic("tf32", torch.float32, tf32=True),) if device.type == "cuda" else ()
    return plain + autocast + tf32


@polite
def precision(
    model: Invertible,
    x: Tensor,
    *,
    candidates: Sequence[Arithmetic] | None = None,
    usable: float = USABLE,
    probes: int | None = None,
    seed: int = 0,
) -> AuditResult:
    """Relative error |F^-1(F(x)) - x| / |x| of the round trip in each arithmetic, forecast and measured.

    The forecast says works if its 95 % quantile over the samples is below usable / 5, breaks if it exceeds |x| or a
    state leaves the range of the dtype, uncertain in between; it costs ``probes`` sweeps of inverse Jacobian products
    for all dtypes together. Under autocast a state is rounded to the dtype of the layer that made it, but a coarser
    rounding inside a sub-network may come out otherwise in the inverse, whose input differs in the last bits: works
    is said only if every layer could round to the coarse dtype, breaks only if the finer roundings do it alone; the
    larger forecast is printed. The measurement runs the model. Data that a dtype cannot hold to ``usable`` count as
    an error of the size of what is lost. The verdict is that of the model's own dtype.

    The round trip of a map that is injective only is a projection: it starts from F^-1(F(x)), which lies on the
    manifold, and there is no forecast. Samples with NaN or Inf are left out.

    Args:
        model: the map.
        x: data, (B, *data).
        candidates: what to try, at least one; ``arithmetics(x.device)`` unless given.
        usable: error in units of |x| up to which an inverse is usable.
        probes: sweeps of the forecast; as many as give 128 of them over all samples unless given.
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
    rows = finite_rows(x).nonzero()[:, 0]
    if not len(rows):
        reason = "every sample of x contains NaN or Inf already: there is no round trip to measure"
        return AuditResult("precision", Verdict.NON_FINITE, reason, advice="Clean the data, then audit again.")
    chosen, start = model.select(rows), x[rows]
    if not model.bijective:
        start = _projected(chosen, start)
    probes = math.ceil(DRAWS / len(rows)) if probes is None else probes
    forecaster = _Forecaster(chosen, start, probes=probes, seed=seed)
    measured = [_relative(chosen, start, arithmetic) for arithmetic in candidates]
    table = [_row(*pair, forecaster, usable) for pair in zip(candidates, measured, strict=True)]
    mine = next((k for k, arithmetic in enumerate(candidates) if _is_own(arithmetic, x.dtype)), 0)
    verdict, reason = _verdict(table[mine], usable, own=_is_own(candidates[mine], x.dtype))
    works = [row["arithmetic"] for row in table if row["measured verdict"] == "works"]
    return AuditResult(
        name="precision",
        verdict=verdict,
        reason=f"{reason} Works in: {', '.join(works) or 'none of those tried'}.",
        values={f"{row['arithmetic']}_error": row["measured"] for row in table}
        | {f"{row['arithmetic']}_forecast": row["forecast"] for row in table},
        units={f"{row['arithmetic']}_{key}": "|x|" for row in table for key in ("error", "forecast")},
        per_sample={"error": _scattered(_with_losses(measured[mine], usable), rows, len(x))},
        tables={"arithmetic": tuple(table)},
        settings={
            "usable": usable,
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


def _check(candidates: Sequence[Arithmetic], usable: float, probes: int | None) -> None:
    if not candidates:
        raise ValueError(
            "expected at least one arithmetic to try, got none: leave candidates out to try the usual ones"
        )
    if not usable > 0:
        raise ValueError(f"expected a positive usable error, in units of |x|; got {usable}")
    if probes is not None and probes < 1:
        raise ValueError(f"expected at least 1 probe, or None for as many as are needed; got {probes}")


def _is_own(arithmetic: Arithmetic, dtype: torch.dtype) -> bool:
    return arithmetic.storage == dtype and arithmetic.autocast is None and not arithmetic.tf32


def _projected(model: Invertible, x: Tensor) -> Tensor:
    """F^-1(F(x)), computed in float64 where the model can."""
    with torch.no_grad():
        try:
            twin = model.in_dtype(torch.float64)
            return twin.inverse(twin(x.double())).to(x.dtype)
        except (NotApplicable, ModelRaised):
            return model.inverse(model(x))


def _scattered(values: Tensor, rows: Tensor, batch: int) -> Tensor:
    """One number per sample of x, NaN for those left out."""
    whole = torch.full((batch,), math.nan, dtype=torch.float64)
    whole[rows.cpu()] = values
    return whole


class _Forecaster:
    """The forecast of each arithmetic, from one linearisation in float32 or float64."""

    def __init__(self, model: Invertible, x: Tensor, *, probes: int, seed: int) -> None:
        self._probes, self._seed = probes, seed
        self._log_scale = _log_length(x)
        self.reason = "" if model.bijective else "no forecast: the map is injective only"
        self._linearization: Linearization | None = None
        self._plain: RoundingForecast | None = None
        if not model.bijective:
            return
        try:
            if x.dtype in HALF:
                model, x = model.in_dtype(torch.float32), x.float()
            self._linearization = Linearization(model, x)
            self._plain = self._forecast(None)
        except (NotApplicable, RuntimeError) as error:
            self.reason = f"no forecast: {error}"

    def relative(self, arithmetic: Arithmetic) -> tuple[Tensor, Tensor] | None:
        """Forecast error in units of |x|, least and most, (B,) each, inf where a state overflows; None without one.

        Where a state is so small that the dtype resolves it worse than its roundoff says, or the forecast itself is
        not finite although the states are, anything is possible: 0 and inf.
        """
        if self._linearization is None or self._plain is None:
            return None
        least = most = self._plain
        if arithmetic.autocast is not None:
            try:
                least = self._forecast(_layer_roundoff(self._linearization, arithmetic))
            except (NotApplicable, RuntimeError):
                return None
        held = torch.finfo(arithmetic.autocast or arithmetic.storage)
        overflow = ~(most.largest_state <= held.max)
        logs = [forecast.log_error + math.log(arithmetic.roundoff) - self._log_scale for forecast in (least, most)]
        coarse = most.smallest_scale < held.tiny
        unknown = logs[0].isnan() | logs[1].isnan()
        low = torch.where(coarse | unknown, 0.0, logs[0].exp())
        high = torch.where(coarse | unknown, math.inf, logs[1].exp())
        return torch.where(overflow, math.inf, low).cpu(), torch.where(overflow, math.inf, high).cpu()

    def _forecast(self, layer_roundoff: list[float] | None) -> RoundingForecast:
        if self._linearization is None:
            raise NotApplicable(self.reason)
        generator = torch.Generator().manual_seed(self._seed)
        with torch.no_grad():
            return rounding_forecast(
                self._linearization, probes=self._probes, generator=generator, layer_roundoff=layer_roundoff
            )


def _layer_roundoff(linearization: Linearization, arithmetic: Arithmetic) -> list[float]:
    """Unit roundoff of each layer's output under autocast, relative to the autocast dtype's."""
    relative = []
    for layer, state in zip(linearization.layers, linearization.states, strict=False):
        with torch.no_grad(), _autocast(state.device.type, arithmetic):
            relative.append(unit_roundoff(layer(state).dtype) / arithmetic.roundoff)
    return relative


@dataclass(frozen=True)
class _Measured:
    """One round trip: errors in units of |x|, what the dtype lost of the data before, and what the model raised."""

    error: Tensor
    lost: Tensor
    problem: str = ""


def _row(arithmetic: Arithmetic, measurement: _Measured, forecaster: _Forecaster, usable: float) -> dict[str, Any]:
    forecast = forecaster.relative(arithmetic)
    measured = _with_losses(measurement, usable)
    finite = measured[measured.isfinite()]
    outside = int((measurement.lost > usable).sum())
    remark = f"{outside} samples do not fit the range of the dtype" if outside else forecaster.reason
    refused = measurement.problem.startswith("refused")
    return {
        "arithmetic": arithmetic.name,
        "unit roundoff": arithmetic.roundoff,
        "forecast": math.nan if forecast is None else _quantile(forecast[1]),
        "forecast verdict": "none" if forecast is None else _forecast_verdict(*forecast, usable),
        "measured": math.nan if refused else _quantile(measured),
        "measured median": finite.median().item() if len(finite) else math.nan,
        "non-finite samples": len(measured) - len(finite),
        "measured verdict": "refused" if refused else _measured_verdict(measured, usable),
        "remark": measurement.problem or remark,
    }


def _with_losses(measurement: _Measured, usable: float) -> Tensor:
    """The errors; where the dtype cannot hold a sample, at least what it loses of it."""
    error, lost = measurement.error, measurement.lost
    return torch.where(lost > usable, torch.maximum(error, lost), error)


def _relative(model: Invertible, x: Tensor, arithmetic: Arithmetic) -> _Measured:
    """Measured |F^-1(F(x)) - x| / |x| per sample, and what came instead, '' if the model ran.

    It may have refused (no such operation in this dtype: nan) or raised (its own check of its numbers failed: inf).
    """
    cast = x.to(arithmetic.storage)
    lost = _ratio(cast.double() - x.double(), x).cpu()
    try:
        with torch.no_grad(), _tf32(arithmetic), _autocast(x.device.type, arithmetic):
            own = cast.dtype == x.dtype
            twin = model if own else model.in_dtype(arithmetic.storage)
            rebuilt = twin.inverse(twin(cast.clone()))
    except (NotApplicable, ModelRaised) as error:
        cause = error.__cause__ or error
        if isinstance(cause, NUMERIC):
            return _Measured(_failed(x, math.inf), lost, f"raised: {_one_line(cause)}")
        return _Measured(_failed(x, math.nan), lost, f"refused: {_one_line(cause)}")
    return _Measured(_ratio(rebuilt.double() - cast.double(), cast).cpu(), lost)


def _failed(x: Tensor, value: float) -> Tensor:
    return torch.full((len(x),), value, dtype=torch.float64)


def _one_line(error: BaseException) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])


@contextmanager
def _tf32(arithmetic: Arithmetic) -> Iterator[None]:
    """TF32 products on CUDA inside the block if the arithmetic wants them, none if not; the old setting afterwards."""
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arithmetic.tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _autocast(device: str, arithmetic: Arithmetic) -> Any:
    # no cache: weights cast without a graph, kept in it, would lose their gradients in a training step around this
    if arithmetic.autocast is None:
        return nullcontext()
    return torch.autocast(device, dtype=arithmetic.autocast, cache_enabled=False)


def _ratio(difference: Tensor, reference: Tensor) -> Tensor:
    """|difference| / |reference| per sample in float64, also where a square overflows; |difference| where that is 0."""
    peak = _peak(reference)
    length = (reference.double().flatten(1) / peak).norm(dim=1)
    return (difference.flatten(1) / peak).norm(dim=1) / torch.where(length > 0, length, torch.ones_like(length))


def _log_length(x: Tensor) -> Tensor:
    """ln |x| per sample; 0 where x is."""
    peak = _peak(x)
    length = (x.double().flatten(1) / peak).norm(dim=1)
    return torch.where(length > 0, length.log() + peak[:, 0].log(), torch.zeros_like(length))


def _peak(x: Tensor) -> Tensor:
    """The largest entry of every sample, (B, 1) float64; 1 where it is 0 or not finite."""
    peak = x.double().flatten(1).abs().amax(1, keepdim=True)
    return torch.where((peak > 0) & peak.isfinite(), peak, torch.ones_like(peak))


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


def _verdict(row: dict[str, Any], usable: float, *, own: bool) -> tuple[Verdict, str]:
    where = f"In {row['arithmetic']}," + (" the dtype of the data," if own else "")
    if row["measured verdict"] == "refused":
        return Verdict.UNSTABLE, f"{where} the model refuses to run ({row['remark']})."
    if row["non-finite samples"]:
        why = f" ({row['remark']})" if row["remark"] else ""
        return Verdict.NON_FINITE, f"{where} {row['non-finite samples']} samples do not come back finite{why}."
    if row["measured verdict"] == "breaks":
        return Verdict.UNSTABLE, f"{where} 5 % of the samples come back more than {row['measured']:.1e} |x| off."
    return (
        Verdict.STABLE,
        f"{where} 95 % of the samples come back within {row['measured']:.1e} |x| ({usable:g} is usable).",
    )


def _advice(works: list[str], own: str) -> str:
    if works:
        return f"Run the inverse in {works[0]} instead of {own}, or train with a regularizer."
    return "No dtype saves this inverse: train with a regularizer, or bound the layers' scales."

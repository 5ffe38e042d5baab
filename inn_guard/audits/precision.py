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
from inn_guard.invertible import Invertible, NotApplicable
from inn_guard.linearization import Linearization
from inn_guard.rounding_forecast import RoundingForecast, rounding_forecast, unit_roundoff

__all__ = ["Arithmetic", "arithmetics", "precision"]

USABLE = 1e-2  #: l2 error of a reconstruction, in units of |x|, up to which an inverse is called usable
MARGIN = 5.0  #: a forecast this far below USABLE is decided; most samples lie within a factor of 3 of their forecast
BROKEN = 1.0  #: a forecast error of the size of x itself: first order says nothing more, and nothing is left of x
DRAWS = 128  #: realisations of the rounding errors, over all samples together, that the quantile is taken of
QUANTILE = 0.95  #: of the samples; the few beyond it do not decide


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
    larger forecast is printed. The measurement runs the model. The verdict is that of the model's own dtype.

    Args:
        model: the map.
        x: data, (B, *data).
        candidates: what to try; ``arithmetics(x.device)`` unless given.
        usable: error in units of |x| up to which an inverse is usable.
        probes: sweeps of the forecast; as many as give 128 of them over all samples unless given.
        seed: of the forecast's random errors.

    Returns:
        AuditResult with the table ``arithmetic``, one row each, and per_sample errors of the model's own dtype.

    References:
        see ``inn_guard.rounding_forecast``.
    """
    candidates = arithmetics(x.device) if candidates is None else candidates
    probes = math.ceil(DRAWS / len(x)) if probes is None else probes
    forecaster = _Forecaster(model, x, probes=probes, seed=seed)
    rows = [_row(model, x, arithmetic, forecaster, usable) for arithmetic in candidates]
    own = str(x.dtype).removeprefix("torch.")
    mine = next((row for row in rows if row["arithmetic"] == own), rows[0])
    verdict, reason = _verdict(mine, usable)
    works = [row["arithmetic"] for row in rows if row["measured verdict"] == "works"]
    return AuditResult(
        name="precision",
        verdict=verdict,
        reason=f"{reason} Works in: {', '.join(works) or 'none of those tried'}.",
        values={f"{row['arithmetic']}_error": row["measured"] for row in rows}
        | {f"{row['arithmetic']}_forecast": row["forecast"] for row in rows},
        units={f"{row['arithmetic']}_{key}": "|x|" for row in rows for key in ("error", "forecast")},
        per_sample={"error": _relative(model, x, Arithmetic(own, x.dtype))[0]},
        tables={"arithmetic": tuple(rows)},
        settings={
            "usable": usable,
            "margin": MARGIN,
            "quantile": QUANTILE,
            "probes": probes,
            "seed": seed,
            "samples": len(x),
            "device": str(x.device),
        },
        advice="" if verdict is Verdict.STABLE else _advice(works, own),
    )


class _Forecaster:
    """The forecast of each arithmetic, from one linearisation in the model's dtype."""

    def __init__(self, model: Invertible, x: Tensor, *, probes: int, seed: int) -> None:
        self._probes, self._seed = probes, seed
        self.scale = _length(x)
        self.reason = ""
        self._linearization: Linearization | None = None
        self._plain: RoundingForecast | None = None
        try:
            self._linearization = Linearization(model, x)
            self._plain = self._forecast(None)
        except (NotApplicable, NotImplementedError, RuntimeError, ValueError) as error:
            self.reason = f"{type(error).__name__}: {error}"

    def relative(self, arithmetic: Arithmetic) -> tuple[Tensor, Tensor] | None:
        """Forecast error in units of |x|, least and most, (B,) each, inf where a state overflows; None without one."""
        if self._linearization is None or self._plain is None:
            return None
        most = self._plain
        least = most
        if arithmetic.autocast is not None:
            least = self._forecast(_layer_roundoff(self._linearization, arithmetic))
        overflow = most.largest_state > torch.finfo(arithmetic.autocast or arithmetic.storage).max
        errors = [forecast.error(arithmetic.roundoff) / self.scale for forecast in (least, most)]
        return tuple(torch.where(overflow, math.inf, error).cpu() for error in errors)  # type: ignore[return-value]

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
        with torch.no_grad(), torch.autocast(state.device.type, dtype=arithmetic.autocast):
            relative.append(unit_roundoff(layer(state).dtype) / arithmetic.roundoff)
    return relative


def _row(
    model: Invertible, x: Tensor, arithmetic: Arithmetic, forecaster: _Forecaster, usable: float
) -> dict[str, Any]:
    forecast = forecaster.relative(arithmetic)
    measured, problem = _relative(model, x, arithmetic)
    finite = measured[measured.isfinite()]
    return {
        "arithmetic": arithmetic.name,
        "unit roundoff": arithmetic.roundoff,
        "forecast": math.nan if forecast is None else _quantile(forecast[1]),
        "forecast verdict": "none" if forecast is None else _forecast_verdict(*forecast, usable),
        "measured": _quantile(measured),
        "measured median": finite.median().item() if len(finite) else math.nan,
        "non-finite samples": len(measured) - len(finite),
        "measured verdict": "refused" if problem.startswith("refused") else _measured_verdict(measured, usable),
        "remark": problem or forecaster.reason,
    }


def _relative(model: Invertible, x: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, str]:
    """Measured |F^-1(F(x)) - x| / |x| per sample, and what came instead, '' if the model ran.

    It may have refused (no such operation in this dtype: nan) or raised (its own check of its numbers failed: inf).
    """
    cast = x.to(arithmetic.storage)
    try:
        with torch.no_grad(), _tf32(arithmetic), _autocast(x.device.type, arithmetic):
            own = cast.dtype == x.dtype
            twin = model if own else model.in_dtype(arithmetic.storage)
            rebuilt = twin.inverse(twin(cast.clone()))
    except (NotImplementedError, RuntimeError, TypeError) as error:
        return _failed(x, math.nan), f"refused: {_one_line(error)}"
    except (ValueError, AssertionError, ArithmeticError) as error:
        return _failed(x, math.inf), f"raised: {_one_line(error)}"
    return ((rebuilt.double() - cast.double()).flatten(1).norm(dim=1) / _length(cast)).cpu(), ""


def _failed(x: Tensor, value: float) -> Tensor:
    return torch.full((len(x),), value, dtype=torch.float64)


def _one_line(error: Exception) -> str:
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
    return nullcontext() if arithmetic.autocast is None else torch.autocast(device, dtype=arithmetic.autocast)


def _length(x: Tensor) -> Tensor:
    length = x.double().flatten(1).norm(dim=1)
    return torch.where(length > 0, length, torch.ones_like(length))


def _quantile(values: Tensor) -> float:
    """The 95 % quantile, a NaN counting as worse than any number."""
    ordered = values.double().nan_to_num(nan=math.inf, posinf=math.inf).sort().values
    return ordered[max(0, math.ceil(QUANTILE * len(ordered)) - 1)].item()


def _forecast_verdict(least: Tensor, most: Tensor, usable: float) -> str:
    if _quantile(most) <= usable / MARGIN:
        return "works"
    return "breaks" if _quantile(least) >= BROKEN else "uncertain"


def _measured_verdict(measured: Tensor, usable: float) -> str:
    return "works" if _quantile(measured) <= usable else "breaks"


def _verdict(row: dict[str, Any], usable: float) -> tuple[Verdict, str]:
    where = f"In {row['arithmetic']}, the dtype of the data,"
    if row["measured verdict"] == "refused":
        return Verdict.UNSTABLE, f"{where} the model refuses to run ({row['remark']})."
    if row["non-finite samples"]:
        return Verdict.NON_FINITE, f"{where} {row['non-finite samples']} samples do not come back finite."
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

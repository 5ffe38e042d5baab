"""The forecast of the round trip's error in every number format."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inn_guard.audits.context import AuditContext
from inn_guard.audits.precision.number_format import NumberFormat, autocast
from inn_guard.audits.thresholds import feature_scale
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.inverse_differences import InverseDifferences
from inn_guard.jacobian.rounding_error import (
    LinearizedModel,
    RoundingForecast,
    rounding_forecast,
    unit_roundoff,
)

__all__ = ["NUMERIC", "DtypeCopies", "RoundingForecaster"]

HALF = (torch.bfloat16, torch.float16)

#: what numbers that left their range make a model raise; anything else is an operation that the
#: dtype does not have
NUMERIC = (ValueError, AssertionError, ArithmeticError, torch.linalg.LinAlgError)


class DtypeCopies:
    """The model at some rows of the batch in other dtypes; its float64 copy is made once."""

    def __init__(self, context: AuditContext, rows: Tensor) -> None:
        self.model = context.model.select(rows)
        self._context, self._rows = context, rows
        self._precise: Invertible | None = None

    def of(self, dtype: torch.dtype) -> Invertible:
        """The model itself if it is of that dtype, else a copy.

        Raises:
            NotApplicable, ModelError: if it cannot be copied.
        """
        if dtype == self._context.x.dtype:
            return self.model
        if dtype != torch.float64:
            return self._context.in_dtype(dtype).select(self._rows)
        if self._precise is None:
            self._precise = self._context.in_dtype(dtype).select(self._rows)
        return self._precise


class RoundingForecaster:
    """The forecast of each number format.

    It is made from one forward pass and its differences in float64, or from its linearization.
    """

    def __init__(self, copies: DtypeCopies, x: Tensor, *, probes: int, seed: int) -> None:
        self._copies, self._x, self._probes, self._seed = copies, x, probes, seed
        self._unit = feature_scale(x)
        self._smallest = math.inf
        self.reason = "" if copies.model.bijective else "no forecast: the map is injective only"
        self._linearized: LinearizedModel | None = None
        self._plain: RoundingForecast | None = None
        if not copies.model.bijective:
            return
        for way in (self._by_differences, self._by_derivatives):
            try:
                self._linearized = way()
                self._plain = self._forecast(None)
                self._smallest = _smallest_feature(self._linearized.states)
                return
            except (NotApplicable, RuntimeError, *NUMERIC) as error:
                self.reason = f"no forecast: {error}"
        self._linearized = None

    def _by_differences(self) -> LinearizedModel:
        self.reason = ""
        return InverseDifferences(self._copies.of(torch.float64), self._x.double())

    def _by_derivatives(self) -> LinearizedModel:
        self.reason = ""
        dtype = torch.float32 if self._x.dtype in HALF else self._x.dtype
        return Linearization(self._copies.of(dtype), self._x.to(dtype))

    def relative(self, number_format: NumberFormat) -> tuple[Tensor, Tensor] | None:
        """Forecast error of the feature, least and most, (B,) each; None without a forecast.

        It is that of the entry which is worst in units of its feature, as in
        `RoundTrip.by_feature`. Infinite where a state overflows.

        Where a feature of a state is so small that the dtype resolves it worse than its roundoff
        says, or the forecast itself is not finite although the states are, anything is possible: 0
        and inf.
        """
        if self._linearized is None or self._plain is None:
            return None
        least = most = self._plain
        if number_format.autocast is not None:
            try:
                least = self._forecast(
                    _layer_roundoff(self._copies, self._linearized.states, number_format)
                )
            except (NotApplicable, RuntimeError):
                return None
        held = torch.finfo(number_format.coarsest)
        overflow = ~(most.largest_state <= held.max)
        logs = [forecast.log_error + math.log(number_format.roundoff) for forecast in (least, most)]
        unknown = logs[0].isnan() | logs[1].isnan()
        if self._smallest < held.tiny:
            unknown = torch.ones_like(unknown)
        low = torch.where(unknown, 0.0, logs[0].exp())
        high = torch.where(unknown, math.inf, logs[1].exp())
        return torch.where(overflow, math.inf, low).cpu(), torch.where(
            overflow, math.inf, high
        ).cpu()

    def _forecast(self, layer_roundoff: list[float] | None) -> RoundingForecast:
        if self._linearized is None:
            raise NotApplicable(self.reason)
        generator = torch.Generator().manual_seed(self._seed)
        with torch.no_grad():
            return rounding_forecast(
                self._linearized,
                probes=self._probes,
                generator=generator,
                layer_roundoff=layer_roundoff,
                unit=self._unit,
            )


def _layer_roundoff(
    copies: DtypeCopies, states: Sequence[Tensor], number_format: NumberFormat
) -> list[float]:
    """Unit roundoff of each layer's output under autocast, relative to the autocast dtype's."""
    relative = []
    model = copies.of(number_format.storage)
    for layer, state in zip(model.layers() or (model,), states, strict=False):
        with torch.no_grad(), autocast(state.device.type, number_format):
            output = layer(state.to(number_format.storage))
        relative.append(unit_roundoff(output.dtype) / number_format.roundoff)
    return relative


def _smallest_feature(states: Sequence[Tensor]) -> float:
    """The smallest scale of a feature in any state."""
    return min(feature_scale(state).min().item() for state in states)

"""The lowest precision in which a model still passes each use, measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.audited_model import ModelError
from inn_guard.audits.context import AuditContext
from inn_guard.audits.precision.number_format import NumberFormat, autocast, tf32
from inn_guard.audits.round_trip import RoundTrip, draw_error
from inn_guard.audits.sampling import context_rows
from inn_guard.audits.thresholds import worst
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import Missing, NotApplicable
from inn_guard.execution.time_limit import TimedOut, time_limit

__all__ = ["FiguresByUse", "lowest_by_use"]

BASE_DRAWS = 256  #: of the base; none may be lost

CopyIn = Callable[[torch.dtype], Invertible]


class FiguresByUse:
    """The deciding figures of density, reconstruction and sampling in any number format.

    Error of log p(x) in nats, of round trips by feature, and lost draws of 256:

    inf where the model raises, hangs or returns NaN; NaN where the model has no such figure at all.

    Args:
        context: model and data.
        copy_in: dtype -> the model in it, for these rows of the batch.
        rows: of x, finite ones.
        seconds: limit of each figure.
    """

    def __init__(
        self, context: AuditContext, copy_in: CopyIn, rows: Tensor, seconds: float
    ) -> None:
        self._context, self._copy_in, self._seconds = context, copy_in, seconds
        self._x = context.x[rows]
        self._latents = _latents(context)
        self._precise: Tensor | None = None

    def of(self, number_format: NumberFormat, trip: RoundTrip | None) -> dict[str, Any]:
        """The figures in one number format.

        Args:
            number_format: how the model is run.
            trip: x -> z -> x in this format, if it has been run.
        """

        def measured(figure: Callable[[torch.dtype], float]) -> float:
            try:
                with (
                    torch.no_grad(),
                    tf32(number_format),
                    autocast(self._x.device.type, number_format),
                    time_limit(self._seconds),
                ):
                    return figure(number_format.storage)
            except NotApplicable:
                return math.nan
            except (ModelError, TimedOut):
                return math.inf

        def reconstruction(dtype: torch.dtype) -> float:
            if trip is not None and self._context.model.bijective:
                return worst(trip.by_feature)
            return self._reconstruction(dtype)

        def lost_draws(dtype: torch.dtype) -> float:
            limit = self._context.limits.returned_draw(number_format.coarsest)
            return self._lost_draws(dtype, limit)

        return {
            "density error": measured(self._density),
            "reconstruction error": measured(reconstruction),
            f"lost of {BASE_DRAWS} draws": measured(lost_draws),
        }

    def _density(self, dtype: torch.dtype) -> float:
        if self._precise is None:
            self._precise = self._copy_in(torch.float64).log_prob(self._x.double())
        precise = self._precise
        coarse = self._copy_in(dtype).log_prob(self._x.to(dtype))
        outside = (coarse == -math.inf) & (precise == -math.inf)
        apart = (coarse.double() - precise).abs()
        return worst(torch.where(outside, torch.zeros_like(apart), apart))

    def _reconstruction(self, dtype: torch.dtype) -> float:
        model = self._copy_in(dtype)
        start = self._x.to(dtype)
        z = model(start.clone())
        if not model.bijective:
            start, z = z, z.clone()
            return worst(RoundTrip(start, z, model(model.inverse(z))).by_feature)
        return worst(RoundTrip(start, z, model.inverse(z)).by_feature)

    def _lost_draws(self, dtype: torch.dtype, limit: float) -> float:
        context, latents = self._context, self._latents
        if isinstance(latents, Missing):
            raise NotApplicable(latents.reason)
        z = latents.to(dtype)
        positions = context_rows(context, torch.arange(len(z), device=z.device))
        model = context.model
        if dtype != context.x.dtype:
            model = context.in_dtype(dtype)
        model = model.select(positions)
        again = model(model.inverse(z.clone()))
        off = draw_error(z, again, context.base.deviation.double())
        return float((~(off <= limit)).sum())


def _latents(context: AuditContext) -> Tensor | Missing:
    """Draws from the base, in the model's own dtype and without autocast."""
    try:
        return context.base.draw(BASE_DRAWS, seed=context.seed)
    except (ModelError, NotApplicable) as error:
        return Missing(str(error))


def lowest_by_use(context: AuditContext, table: Sequence[Mapping[str, Any]]) -> str:
    """The coarsest number format that passes each use and every finer one passes, too, in words.

    Args:
        context: for its limits.
        table: one row per number format, with the figures of `FiguresByUse`, its unit roundoff and
            its limit for round trips.
    """
    columns = {
        "density": "density error",
        "reconstruction": "reconstruction error",
        "sampling": f"lost of {BASE_DRAWS} draws",
    }
    finest_first = sorted(table, key=lambda row: row["unit roundoff"])
    parts = []
    for use, column in columns.items():
        if all(math.isnan(row[column]) for row in finest_first):
            continue
        lowest = "none"
        for row in finest_first:
            # no draw may be lost; a coarse format is held to no more than it holds
            allowed = {
                "density": context.limits.density,
                "reconstruction": row["usable"],
                "sampling": 0.0,
            }
            if not row[column] <= allowed[use]:
                break
            lowest = row["number format"]
        parts.append(f"{use} {lowest}")
    return ", ".join(parts)

"""Guarded round trips with their log-determinants, for inputs on which a model may do anything."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.guarded import Guarded
from inn_guard.audits.limits import data_scale
from inn_guard.audits.round_trip import finite_rows

__all__ = ["Trip", "trip_from_data", "trip_from_latents"]


@dataclass(frozen=True)
class Trip:
    """There and back. All (B,) tensors are float64 on the CPU.

    Attributes:
        start: where it began.
        x: the data side; where the trip ended, if it began with data.
        end: what came back.
        error: largest entry of end - start over the start's scale; inf where not finite.
        bits: |log|det J| + log|det J^-1||, which ought to be 0, in bits per dimension; inf where not finite, None
            where the model has no log-determinants.
        log_det: the forward log-determinant in nats, None likewise.
    """

    start: Tensor
    x: Tensor
    end: Tensor
    error: Tensor
    bits: Tensor | None
    log_det: Tensor | None


def trip_from_data(guarded: Guarded, x: Tensor, *, log_det: bool, bijective: bool = True) -> Trip:
    """x -> z -> x; for a map that is injective only, z -> x -> z from the latents of x."""
    z, forward = guarded.forward_and_log_det(x) if log_det else (guarded.forward(x), None)
    if not bijective:
        return trip_from_latents(guarded, z, log_det=False)
    back, backward = guarded.inverse_and_log_det(z) if log_det else (guarded.inverse(z), None)
    return _trip(x, x, back, forward, backward)


def trip_from_latents(guarded: Guarded, z: Tensor, *, log_det: bool) -> Trip:
    """z -> x -> z."""
    x, backward = guarded.inverse_and_log_det(z) if log_det else (guarded.inverse(z), None)
    back, forward = guarded.forward_and_log_det(x) if log_det else (guarded.forward(x), None)
    return _trip(z, x, back, forward, backward)


def _trip(start: Tensor, x: Tensor, end: Tensor, forward: Tensor | None, backward: Tensor | None) -> Trip:
    off = (end.double() - start.double()).flatten(1).abs().amax(1) / data_scale(start)
    whole = finite_rows(start) & finite_rows(end)
    error = torch.where(whole, off, torch.full_like(off, math.inf)).cpu()
    if forward is None or backward is None:
        return Trip(start, x, end, error, None, None)
    gap = (forward.double() + backward.double()).abs() / (start[0].numel() * math.log(2))
    bits = gap.nan_to_num(math.inf, posinf=math.inf).cpu()
    return Trip(start, x, end, error, bits, forward.double().cpu())

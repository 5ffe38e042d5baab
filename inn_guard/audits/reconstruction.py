"""Does the inverse invert: x -> z -> x on data, z -> x -> z on encoded and on prior latents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.base import AuditResult, Verdict
from inn_guard.audits.limits import data_scale, usable_error
from inn_guard.audits.watched import polite
from inn_guard.invertible import Invertible

__all__ = ["reconstruction"]


@dataclass(frozen=True)
class _RoundTrip:
    """Errors of one round trip, per sample, float64 on the CPU; NaN where the start is not finite."""

    start: Tensor
    middle: Tensor
    end: Tensor

    @property
    def difference(self) -> Tensor:
        return (self.end.double() - self.start.double()).flatten(1)

    @property
    def largest(self) -> Tensor:
        return self.difference.abs().amax(1).cpu()

    @property
    def l2(self) -> Tensor:
        return self.difference.norm(dim=1).cpu()

    @property
    def relative(self) -> Tensor:
        return (self.difference.abs().amax(1) / data_scale(self.start)).cpu()

    @property
    def usable_start(self) -> Tensor:
        return self.start.flatten(1).isfinite().all(1).cpu()


@polite
def reconstruction(model: Invertible, x: Tensor, *, batch_size: int = 128, seed: int = 0) -> AuditResult:
    """Error of the round trips, in units of the data."""
    with torch.no_grad():
        trip = _there_and_back(model, x, batch_size)
    finite = trip.relative.isfinite()[trip.usable_start]
    worst = trip.relative[trip.usable_start].max().item() if bool(trip.usable_start.any()) else math.nan
    limit = usable_error(x.dtype)
    if not bool(finite.all()):
        verdict, reason = Verdict.NON_FINITE, f"{int((~finite).sum())} of {len(finite)} reconstructions are not finite"
    elif worst > limit:
        verdict, reason = Verdict.UNSTABLE, f"the worst reconstruction is off by {worst:.1e} of the data's scale"
    else:
        verdict, reason = Verdict.STABLE, f"every reconstruction is right to {worst:.1e} of the data's scale"
    return AuditResult(
        "reconstruction",
        verdict,
        reason,
        values={"max_error": trip.largest.max().item(), "relative_error": worst},
        per_sample={"max_error": trip.largest, "l2_error": trip.l2, "relative_error": trip.relative},
        settings={"usable": limit, "batch_size": batch_size, "seed": seed},
    )


def _there_and_back(model: Invertible, x: Tensor, batch_size: int) -> _RoundTrip:
    rows = torch.arange(len(x), device=x.device).split(batch_size)
    parts = [model.select(row) for row in rows]
    z = [part(x[row]) for part, row in zip(parts, rows, strict=True)]
    back = [part.inverse(latent) for part, latent in zip(parts, z, strict=True)]
    return _RoundTrip(x, torch.cat(z), torch.cat(back))

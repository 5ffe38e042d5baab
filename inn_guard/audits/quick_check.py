"""glance: the error of the round trip on a few samples, from one forward and one inverse pass."""

from __future__ import annotations

import torch
from torch import Tensor

from inn_guard.audits.audited_model import polite
from inn_guard.audits.round_trip import RoundTrip, latent_trip, round_trip
from inn_guard.audits.thresholds import max_usable_error
from inn_guard.core.invertible import Invertible
from inn_guard.core.tensors import finite_rows
from inn_guard.report.result import AuditResult, Verdict

__all__ = ["quick_round_trip"]


@polite
def quick_round_trip(model: Invertible, x: Tensor, *, samples: int = 8) -> AuditResult:
    """Largest error of F^-1(F(x)) - x in units of each sample's root mean square: cheap enough for every training run.

    What ``reconstruction`` measures, without its explanation: no float64 copy, no latents from the prior, no condition
    number. A map that is injective only is judged by F(F^-1(z)) - z at z = F(x).

    Args:
        model: the map.
        x: data, (B, *data).
        samples: the first so many finite samples are used.

    Returns:
        relative_error, the largest and per sample, unstable above ``max_usable_error``.
    """
    rows = finite_rows(x).nonzero()[:samples, 0]
    if not len(rows):
        reason = "every sample of x contains NaN or Inf already: there is nothing to reconstruct"
        return AuditResult(
            "glance", Verdict.NON_FINITE, reason, advice="Clean the data, then audit again."
        )
    trip = _trip(model.select(rows), x[rows])
    errors, limit = trip.relative, max_usable_error(x.dtype)
    verdict, reason = _judged(errors, limit)
    return AuditResult(
        "glance",
        verdict,
        reason,
        values={"relative_error": errors.amax().item()},
        units={"relative_error": "of the data's scale"},
        per_sample={"relative_error": errors},
        settings={"samples": len(rows), "of": len(x), "limit": limit},
        advice="Audit with level='standard' to see why." if verdict.failed else "",
    )


def _trip(model: Invertible, x: Tensor) -> RoundTrip:
    if model.bijective:
        return round_trip(model, x, batch_size=len(x))
    with torch.no_grad():
        z = model(x)
    return latent_trip(model, z, batch_size=len(x))


def _judged(errors: Tensor, limit: float) -> tuple[Verdict, str]:
    lost = int((~errors.isfinite()).sum())
    if lost:
        return Verdict.NON_FINITE, f"{lost} of {len(errors)} samples come back as NaN or Inf"
    worst = errors.amax().item()
    figures = f"the worst of {len(errors)} samples comes back {worst:.1e} of its scale off ({limit:g} is usable)"
    return Verdict.UNSTABLE if worst > limit else Verdict.STABLE, figures

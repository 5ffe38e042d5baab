"""quick_round_trip: the error of the round trip on a few samples, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from inn_guard.audits.audited_model import AuditedModel
from inn_guard.audits.context import AuditContext
from inn_guard.audits.round_trip import RoundTrip, latent_round_trip, round_trip
from inn_guard.audits.spec import audit_check
from inn_guard.audits.thresholds import worst
from inn_guard.report.formatting import brief
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict

__all__ = ["quick_round_trip"]

NAME = "quick_round_trip"


@audit_check(question="Do a few samples come back?")
def quick_round_trip(context: AuditContext, *, samples: int = 8) -> AuditResult:
    """Largest error of F^-1(F(x)) - x in units of its features: cheap enough for training runs.

    What ``reconstruction`` measures, without its explanation: no float64 copy, no layer, no
    condition number. A map that is injective only is judged by F(F^-1(z)) - z at z = F(x).

    Args:
        context: model and data.
        samples: how many of the finite samples are used, the first ones.

    Returns:
        relative_error, the largest and per sample, unstable above ``limits.reconstruction``.
    """
    rows = context.finite_rows()[:samples]
    if not len(rows):
        reason = "every sample of x contains NaN or Inf already: there is nothing to reconstruct"
        return AuditResult(NAME, Verdict.NON_FINITE, reason)
    errors = _round_trip(*context.at(rows)).by_feature
    limit = context.limits.round_trip(context.x.dtype)
    lost = int((~errors.isfinite()).sum())
    if lost:
        verdict = Verdict.NON_FINITE
        reason = f"{lost} of {len(errors)} samples come back as NaN or Inf"
    else:
        verdict = context.limits.verdict(worst(errors), limit)
        error, count = worst(errors), len(errors)
        reason = f"worst of {count} round trips {brief(error)} of its feature (limit {limit:g})"
    return AuditResult(
        NAME,
        verdict,
        reason,
        headline=("relative_error",),
        values={"relative_error": worst(errors)},
        units={"relative_error": "of the feature"},
        per_sample={"relative_error": errors},
        settings={"samples": len(rows), "of": len(context.x), "limit": limit},
        advice="Audit with level='standard' to see why." if verdict.failed else "",
    )


def _round_trip(model: AuditedModel, x: Tensor) -> RoundTrip:
    if model.bijective:
        return round_trip(model, x, batch_size=len(x))
    with torch.no_grad():
        z = model(x)
    return latent_round_trip(model, z, batch_size=len(x))

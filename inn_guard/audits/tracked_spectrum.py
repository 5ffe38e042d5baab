"""tracked_spectrum: lower bounds of both ends of the spectrum, one step better at every look."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.context import AuditContext
from inn_guard.audits.spec import audit_check
from inn_guard.audits.thresholds import format_log10
from inn_guard.core.tensors import dtype_name, norms, per_sample
from inn_guard.jacobian.chain import Linearization, LogScaledVector
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict

__all__ = ["tracked_spectrum"]

NAME = "tracked_spectrum"
LN10 = math.log(10)
#: Length of the random part of each start, relative to what is tracked. It lowers the bounds by
#: about its square, and a direction that stretches more grows out of it from look to look.
MIXED = 0.01
TRACKED = 0.1  #: residual up to which the vectors count as singular vectors
LOOK_SEED = 1_000_003  #: from one look to the next

Product = Callable[[Tensor], LogScaledVector]


@audit_check(question="How do the ends of the spectrum move from look to look?")
def tracked_spectrum(context: AuditContext, *, samples: int = 1) -> AuditResult:
    """Lower bounds of sigma_max(J), sigma_max(J^-1) and the condition number: cheap in training.

    For each of the two one step of the power method, from the vector v of the last look:

        sigma = |J v|,  u = J v / sigma,  bound = |J^T u| <= sigma_max(J),  v' = J^T u / |J^T u|

    and likewise with J^-1. The bounds hold at every look. They are near the singular values only
    after some looks, while training changes the weights slowly: ``residual``, which is
    |J^T u - sigma v| / sigma, tells how near. A singular value lies within that share of sigma, and
    it need not be the largest one: `jacobian_spectrum` measures that, at many times the cost.

    Without ``starts``, in which an AuditHook keeps the vectors, every look is a first one.

    Args:
        context: a bijective model, and data.
        samples: how many of the finite samples are looked at, the first ones.

    Returns:
        log10 of the bounds and of their product, the worst of the samples; residuals; the number of
        looks and samples. It is unstable where the bound of the condition number is too large
        already, undecided where the residuals say that the vectors are not found yet.

    Raises:
        NotApplicable: if the map is injective only, or a layer's inverse has no correct derivative.
    """
    if samples < 1:
        raise ValueError(f"expected at least 1 sample; got {samples}")
    rows = context.finite_rows()[:samples]
    if not len(rows):
        reason = "every sample of x contains NaN or Inf already: there is no Jacobian to measure"
        return AuditResult(NAME, Verdict.NON_FINITE, reason)
    linearization = Linearization(*context.at(rows))
    look, near = context.starts.get(NAME, (0, (None, None)))
    generator = torch.Generator().manual_seed((context.seed + LOOK_SEED * look) % 2**63)
    x, z = linearization.states[0], linearization.output
    forward = _step(linearization.jvp, linearization.vjp, _start(near[0], x, generator))
    backward = _step(
        linearization.inverse_jvp, linearization.inverse_vjp, _start(near[1], z, generator)
    )
    context.starts[NAME] = (look + 1, (forward.vector, backward.vector))
    log_condition = (forward.log_bound + backward.log_bound).cpu()
    residual = torch.maximum(forward.residual, backward.residual)
    verdict, reason = _judged(context, log_condition, residual)
    return AuditResult(
        NAME,
        verdict,
        reason,
        headline=("log10_condition_number",),
        values={
            "log10_condition_number": log_condition.max().item() / LN10,
            "log10_sigma_max": forward.log_bound.max().item() / LN10,
            "log10_sigma_min": -backward.log_bound.max().item() / LN10,
            "sigma_max_residual": forward.residual.max().item(),
            "sigma_min_residual": backward.residual.max().item(),
            "looks": float(look + 1),
            "samples": float(len(rows)),
        },
        units={
            "log10_condition_number": "log10, at least",
            "log10_sigma_max": "log10, at least",
            "log10_sigma_min": "log10, at most",
            "sigma_max_residual": "of sigma",
            "sigma_min_residual": "of sigma",
        },
        settings={
            "samples": len(rows),
            "of": len(context.x),
            "method": "one step of the power method",
            "seed": context.seed,
            "limit": context.limits.round_trip(context.x.dtype),
        },
        advice="Measure again with jacobian_spectrum." if verdict.failed else "",
    )


@dataclass(frozen=True)
class _Step:
    """One step of the power method.

    Attributes:
        log_bound: natural logarithm of |A^T u|, (B,) float64.
        residual: |A^T u - sigma v| / sigma, (B,).
        vector: where the next step begins, (B, *), of length one.
    """

    log_bound: Tensor
    residual: Tensor
    vector: Tensor


def _start(near: Tensor | None, like: Tensor, generator: torch.Generator) -> Tensor:
    """Where a step begins, of length one: near the last vector, if that has the shape."""
    noise = torch.randn(like.shape, generator=generator, device="cpu", dtype=torch.float64)
    noise = _unit(noise.to(like))
    if near is None or near.shape != like.shape or near.device != like.device:
        return noise
    return _unit(near.to(like) + MIXED * noise)


def _unit(v: Tensor) -> Tensor:
    return v / per_sample(norms(v).to(v.dtype), v)


def _step(product: Product, adjoint: Product, v: Tensor) -> _Step:
    image = product(v)
    back = adjoint(image.vector)
    growth = (back.log_scale - image.log_scale).exp()
    left = per_sample(growth, back.vector) * back.vector.double() - v.double()
    # the next look begins at a vector of its own, not at a part of this graph
    return _Step(back.log_scale, left.flatten(1).norm(dim=1).cpu(), back.vector.detach().clone())


def _judged(context: AuditContext, log_condition: Tensor, residual: Tensor) -> tuple[Verdict, str]:
    count, of = len(log_condition), len(context.x)
    seen = f"in {count} of {of} samples"
    if not bool(log_condition.isfinite().all()):
        return Verdict.NON_FINITE, f"the Jacobian is singular or not finite {seen}"
    dtype = context.x.dtype
    worst = log_condition.max().item() / LN10
    log_error = worst + math.log10(torch.finfo(dtype).eps)
    left = residual.max().item()
    reason = (
        f"the condition number {seen} is at least {format_log10(worst)} (residual {left:.1g}): a "
        f"rounding error in {dtype_name(dtype)} can grow to {format_log10(log_error)} relative to x"
    )
    if log_error > math.log10(context.limits.round_trip(dtype)):
        return Verdict.UNSTABLE, reason
    if not left <= TRACKED:
        return Verdict.UNDECIDED, f"{reason}; its vectors are not found yet"
    return Verdict.STABLE, reason

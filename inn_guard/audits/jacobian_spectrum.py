"""jacobian_spectrum: extreme singular values of the Jacobian, and the condition number."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from inn_guard.audits.context import AuditContext
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.level import Level
from inn_guard.audits.spec import audit_check
from inn_guard.audits.thresholds import feature_deviation, format_log10
from inn_guard.core.random import SampleNoise
from inn_guard.core.tensors import dtype_name
from inn_guard.jacobian.chain import Linearization, ScaledLinearization
from inn_guard.jacobian.lanczos import LargestSingularValue
from inn_guard.jacobian.singular_values import (
    ExtremeSingularValues,
    extreme_singular_values,
    full_jacobian,
    spectrum,
)
from inn_guard.report.result import AuditResult, to_full_batch
from inn_guard.report.verdict import Verdict

__all__ = ["jacobian_spectrum"]

LN10 = math.log(10)
LOOK_SEED = 1_000_003  #: from one look to the next
_FIELDS = tuple(field.name for field in dataclasses.fields(LargestSingularValue))


def _cost(task: Task) -> Cost:
    allowed = int(task.settings["max_steps"])
    extremes = Passes(linearize=1, product=4 * task.steps(allowed))
    passes = Passes(forward=1) * task.samples + extremes * task.chosen
    return Cost(passes, task.chosen, linearized=True, vectors=2 * min(task.dimension, allowed))


@audit_check(
    question="How far can a rounding error grow, forwards and backwards?",
    level=Level.STANDARD,
    cost=_cost,
    shares_samples=True,
)
def jacobian_spectrum(
    context: AuditContext, *, samples: int = 32, tolerance: float = 1e-2, max_steps: int = 60
) -> AuditResult:
    """sigma_max and sigma_min of J = dF/dx and cond = sigma_max / sigma_min, per sample, no unit.

    Lanczos on J and on J^-1, both chained layer by layer at the states of one forward pass: neither
    is a Jacobian formed nor the inverse run, so the smallest value is right also where a dense
    decomposition cannot resolve it and where the round trip is not finite. A map that is injective
    only has two rectangular Jacobians, the encoder's (d x D) and the decoder's (D x d); both are
    formed and decomposed densely.

    The verdict is unstable where one rounding, eps cond, exceeds ``limits.reconstruction`` in the
    worst direction. Of a table (B, features) whose features have deviations s, this is the
    condition number of J diag(s), which does not depend on their units. It is measured where it
    could have another verdict than that of J. It explains; no use depends on it.

    Args:
        context: model and data.
        samples: how many of the samples with finite latents are measured, the first ones.
        tolerance: relative error of sigma to reach.
        max_steps: bound of the steps of the iteration.

    Returns:
        the values as powers of ten (log10_...), which fit where the numbers do not; per sample
        sigma_max, sigma_min and condition_number, error estimates, and the gap-free error bar that
        holds with 99 % probability. condition_number_in_units is that of J diag(s), if it decides.

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), section 4. This differs from the paper in: no Jacobian
        is formed.
    """
    x = context.x
    rows = context.usable_rows()[:samples]
    if not len(rows):
        reason = "no sample has a finite latent: there is no Jacobian to measure"
        return AuditResult("jacobian_spectrum", Verdict.NON_FINITE, reason)
    settings: dict[str, object] = {
        "samples": len(rows),
        "of": len(x),
        "tolerance": tolerance,
        "seed": context.seed,
        "max_steps": max_steps,
        "limit": context.limits.round_trip(x.dtype),
    }
    if not context.model.bijective:
        return _rectangular(context, rows, settings)
    ends = _extremes(context, rows, tolerance, max_steps)
    log_condition = ends.log_condition
    values: dict[str, float] = {}
    in_units = ""
    if context.x.dim() == 2:
        # a feature in other units is the same feature, and rounding is relative to its size
        unit = feature_deviation(context.x[context.finite_rows()])
        if _units_decide(context, log_condition.cpu(), unit):
            scaled = _extremes(context, rows, tolerance, max_steps, unit=unit)
            log_condition = scaled.log_condition
            values["condition_number_in_units"] = log_condition.max().exp().item()
            in_units = " with every feature in units of its deviation"
    logs = {
        "sigma_max": ends.log_max,
        "sigma_min": ends.log_min,
        "condition_number": ends.log_condition,
    }
    sides = {"sigma_max": ends.forward, "sigma_min": ends.backward}
    verdict, reason, advice = _judged(context, log_condition.cpu(), in_units)
    return AuditResult(
        "jacobian_spectrum",
        verdict,
        reason,
        headline=("condition_number", "sigma_max", "sigma_min"),
        values=_values(logs, sides) | values,
        units={name: "log10" for name in _values(logs, sides) if name.startswith("log10")},
        **to_full_batch(_per_sample(logs, sides), rows, len(x)),
        settings=settings | {"method": "Lanczos on J and J^-1"},
        advice=advice,
    )


def _units_decide(context: AuditContext, log_condition: Tensor, unit: Tensor) -> bool:
    """Whether the condition number of J diag(s) could have another verdict than that of J.

    They differ by no more than the condition number of diag(s).
    """
    widest = (unit.max() / unit.min()).log().item()
    verdicts = {_judged(context, log_condition + sign * widest)[0] for sign in (-1, 1)}
    return len(verdicts) > 1


def _extremes(
    context: AuditContext,
    rows: Tensor,
    tolerance: float,
    max_steps: int,
    unit: Tensor | None = None,
) -> ExtremeSingularValues:
    """Extreme singular values at these rows, in parts if shared out or if memory is short."""
    alone = context.parallel.size == 1 and context.parallel.memory is None
    name = "spectrum" if unit is None else "spectrum in units"
    look, vectors = _last_look(context, name, len(rows))
    # every look mixes other random vectors in: what one has overlooked, the next one may see
    seed = (context.seed + LOOK_SEED * look) % 2**63

    def measure(part: Tensor) -> tuple[Tensor, ...]:
        noise = SampleNoise(torch.Generator().manual_seed(seed), part, len(rows))
        linearization: Linearization | ScaledLinearization
        if alone:
            linearization = context.linearization(rows)
        else:
            linearization = Linearization(*context.at(rows[part]))
        if unit is not None:
            linearization = ScaledLinearization(linearization, unit)
        guess = None
        if vectors is not None:
            guess = (vectors[0][part], vectors[1][part])
        ends = extreme_singular_values(
            linearization,
            generator=noise,
            tolerance=tolerance,
            max_steps=max_steps,
            guess=guess,
        )
        sides = (ends.forward, ends.backward)
        return tuple(getattr(side, name) for side in sides for name in _FIELDS)

    at_most = context.max_linearized(2 * min(max_steps, context.x[0].numel()))
    positions = torch.arange(len(rows), device=rows.device)
    found = context.parallel.map(positions, measure, at_most=at_most)
    half = len(_FIELDS)
    forward, backward = LargestSingularValue(*found[:half]), LargestSingularValue(*found[half:])
    context.starts[name] = (look + 1, (forward.right.detach(), backward.right.detach()))
    return ExtremeSingularValues(forward, backward)


def _last_look(
    context: AuditContext, name: str, count: int
) -> tuple[int, tuple[Tensor, Tensor] | None]:
    """How many looks there were, and the singular vectors of the last one, if they fit."""
    look, vectors = context.starts.get(name, (0, None))
    x = context.x
    if vectors is not None:
        (right, _) = vectors
        if right.shape != (count, *x.shape[1:]) or right.device != x.device:
            vectors = None
    return look, vectors


def _judged(
    context: AuditContext, log_condition: Tensor, in_units: str = ""
) -> tuple[Verdict, str, str]:
    """Verdict, reason and advice: is eps times cond still usable.

    Args:
        context: for dtype and limits.
        log_condition: natural logarithms of condition numbers, (B,).
        in_units: in which units they are, in words.
    """
    count, of = len(log_condition), len(context.x)
    if not bool(log_condition.isfinite().all()):
        lost = int((~log_condition.isfinite()).sum())
        reason = f"the Jacobian of {lost} of {count} samples is singular or not finite"
        return Verdict.NON_FINITE, reason, ""
    dtype = context.x.dtype
    worst = log_condition.max().item() / LN10
    log_error = worst + math.log10(torch.finfo(dtype).eps)
    seen = f"in {count} samples" if count == of else f"in {count} of {of} samples"
    reason = (
        f"the largest condition number {seen}{in_units} is {format_log10(worst)}: a rounding error "
        f"in {dtype_name(dtype)} can grow to {format_log10(log_error)} relative to x"
    )
    if log_error <= math.log10(context.limits.round_trip(dtype)):
        return Verdict.STABLE, reason, ""
    advice = (
        "Train with FiniteDifferences or NormalizingFlowLoss, or bound the scales of the worst "
        "layers."
    )
    return Verdict.UNSTABLE, reason, advice


def _values(logs: dict[str, Tensor], sides: dict[str, LargestSingularValue]) -> dict[str, float]:
    worst = {
        "condition_number": logs["condition_number"].max(),
        "sigma_max": logs["sigma_max"].max(),
        "sigma_min": logs["sigma_min"].min(),
    }
    values = {name: value.exp().item() for name, value in worst.items()}
    values |= {f"log10_{name}": value.item() / LN10 for name, value in worst.items()}
    for name, side in sides.items():
        values[f"{name}_error_estimate"] = side.relative_error.max().item()
        values[f"{name}_error_99"] = side.gap_free_error.max().item()
        values[f"{name}_steps"] = float(side.steps.max())
    return values


def _per_sample(
    logs: dict[str, Tensor], sides: dict[str, LargestSingularValue]
) -> dict[str, Tensor]:
    named = {f"log10_{name}": log / LN10 for name, log in logs.items()}
    named |= {name: log.exp() for name, log in logs.items()}
    return named | {f"{name}_error_estimate": side.relative_error for name, side in sides.items()}


def _rectangular(context: AuditContext, rows: Tensor, settings: dict[str, object]) -> AuditResult:
    """Encoder and decoder of a map that is injective only, each with a Jacobian of its own."""
    model, x = context.at(rows)
    with torch.no_grad():
        z = model(x)
    values: dict[str, float] = {}
    worst = x.new_zeros((), dtype=torch.float64).cpu()
    for name, function, point in (("encoder", model.forward, x), ("decoder", model.inverse, z)):
        found = spectrum(full_jacobian(function, point))
        top, bottom = found.values[:, 0], found.values[:, -1]
        values[f"{name}_sigma_max"] = top.max().item()
        values[f"{name}_sigma_min"] = bottom.min().item()
        values[f"{name}_condition_number"] = (top / bottom).max().item()
        worst = torch.maximum(worst, (top / bottom).max().log())
    verdict, reason, advice = _judged(context, worst.reshape(1).expand(len(rows)))
    return AuditResult(
        "jacobian_spectrum",
        verdict,
        f"encoder and decoder are rectangular; {reason}",
        headline=("encoder_condition_number", "decoder_condition_number"),
        values=values,
        settings=settings | {"method": "dense, float64 decomposition"},
        advice=advice,
    )

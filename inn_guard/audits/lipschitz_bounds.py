"""lipschitz_bounds: how much map and inverse can stretch at most, certified, and at least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inn_guard.audits.context import AuditContext
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.level import Level
from inn_guard.audits.spec import audit_check
from inn_guard.core.invertible import Invertible
from inn_guard.execution.deadline import Deadline
from inn_guard.jacobian.chain import Linearization
from inn_guard.numerics.intervals import Box
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict

if TYPE_CHECKING:
    from inn_guard.lipschitz.bounds import LipschitzBounds
    from inn_guard.lipschitz.whole_network import LayerBound

__all__ = ["lipschitz_bounds"]

#: A layer is named as a cause if its bound is this far above the geometric mean, or infinite.
DOMINANT = 1.5
NAMED = 6  #: layers that an advice names
SAMPLED = 16  #: rows of the data at which layers are measured, too
ON_IMAGES = (
    "On a box, the inverse's bound is that of sup ||J^-1||: Lip(F^-1) on the box's image only "
    "where that is convex."
)


def _cost(task: Task) -> Cost:
    return Cost(Passes(), 1, seconds=float(task.settings["seconds"]))


@audit_check(
    question="How much can the map and its inverse stretch at most, certified?",
    level=Level.FULL,
    cost=_cost,
)
def lipschitz_bounds(
    context: AuditContext,
    *,
    domain: Box | None = None,
    margin: float = 0.0,
    seconds: float = 10.0,
) -> AuditResult:
    """Certified upper and witnessed lower bounds of sup ||J|| and sup ||J^-1|| over a box, no unit.

    Stable: the product of both upper bounds, which bounds the condition number at every point of
    the box, times the rounding unit of x's dtype stays below ``limits.reconstruction``. Unstable: a
    witnessed lower bound alone exceeds that. Undecided: neither is proved, because the certificate
    is too loose, or no finite bound is known. It explains; no use depends on it.

    Args:
        context: model and data; the witnesses' search begins at x.
        domain: the box. Default: the smallest one that holds the finite samples of x.
        margin: widens that box on every side, in units of its largest width.
        seconds: budget of work, in seconds of one slow core: operations are counted, so that the
            result is the same on every machine. A larger budget makes tighter bounds.

    Returns:
        values: upper and lower bounds, their ratios, Table 3's product; per_layer: the same for
        every layer.

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), Table 3.
    """
    # certified bounds are a large part of the package: they are loaded where they are asked for
    from inn_guard.lipschitz.bounds import lipschitz_bounds as certify

    rows = context.finite_rows()
    if not len(rows):
        reason = "no sample is finite: there is no point to search from and no box around the data"
        return AuditResult("lipschitz_bounds", Verdict.NOT_APPLICABLE, reason)
    model, x = context.at(rows)
    box = _box(x, margin) if domain is None else domain
    deadline = Deadline.after(seconds)
    bounds = certify(model, box, data=x.detach().cpu(), seconds=0.9 * seconds)
    precise = context.in_dtype(torch.float64).select(rows)
    usable = context.limits.round_trip(x.dtype) / torch.finfo(x.dtype).eps
    verdict, reason = _judged(bounds, usable)
    return AuditResult(
        "lipschitz_bounds",
        verdict,
        reason,
        headline=("upper_forward", "upper_inverse"),
        values=_values(bounds),
        units={name: "log10" for name in _values(bounds) if name.startswith("log10")},
        per_layer=tuple(_rows(_sampled(precise, x, deadline), bounds)),
        settings={
            "scope": bounds.scope,
            "seconds": seconds,
            "method forward": bounds.method[0],
            "method inverse": bounds.method[1],
            "weights": bounds.certificate.weights,
            "remark": ON_IMAGES,
        },
        advice=_advice(bounds),
    )


def _box(x: Tensor, margin: float) -> Box:
    box = Box.around(x.detach().cpu().double())
    width = margin * float((box.hi - box.lo).max())
    return Box(box.lo - width, box.hi + width)


def _judged(bounds: LipschitzBounds, usable: float) -> tuple[Verdict, str]:
    """A condition number of ``usable`` turns rounding into the largest usable relative error."""
    upper, lower = bounds.forward * bounds.inverse, bounds.lower_forward * bounds.lower_inverse
    bracket = (
        f"Lip(F) in [{bounds.lower_forward:.4g}, {bounds.forward:.4g}], "
        f"Lip(F^-1) in [{bounds.lower_inverse:.4g}, {bounds.inverse:.4g}] ({bounds.scope})"
    )
    if max(bounds.lower_forward, bounds.lower_inverse) > usable:
        return (
            Verdict.UNSTABLE,
            f"{bracket}: a witness alone is beyond {usable:.2g}, where rounding is no longer "
            "usable.",
        )
    if not math.isfinite(upper):
        return Verdict.UNDECIDED, (
            f"{bracket}: no finite bound is known; the largest product measured is {lower:.3g}, "
            f"the limit {usable:.2g}. {bounds.reason}"
        )
    if upper <= usable:
        return (
            Verdict.STABLE,
            f"{bracket}: certified below {usable:.2g}, so rounding stays usable everywhere there.",
        )
    return Verdict.UNDECIDED, (
        f"{bracket}: the largest product measured is {lower:.3g}, the limit {usable:.2g}, and the "
        f"certificate, {upper:.3g}, is too loose to exclude more."
    )


def _values(bounds: LipschitzBounds) -> dict[str, float]:
    values: dict[str, float] = {}
    for k, side in enumerate(("forward", "inverse")):
        upper, lower = getattr(bounds, side), getattr(bounds, f"lower_{side}")
        values |= {f"upper_{side}": upper, f"lower_{side}": lower}
        values[f"upper/lower_{side}"] = upper / lower if lower > 0 else math.inf
        values[f"log10_table3_{side}"] = math.log10(bounds.paper_bound[k])
    return values


def _rows(lower: list[tuple[float, float]], bounds: LipschitzBounds) -> list[Mapping[str, Any]]:
    dominant = _dominant(bounds.per_layer)
    rows: list[Mapping[str, Any]] = []
    for k, layer in enumerate(bounds.per_layer):
        row: dict[str, Any] = {"index": k, "name": layer.name}
        for side, low in zip(("forward", "inverse"), lower[k], strict=True):
            upper = getattr(layer.bounds, side)
            row |= {
                f"upper_{side}": upper,
                f"lower_{side}": low,
                f"upper/lower_{side}": upper / low if low > 0 else math.inf,
            }
        row |= {
            "table3_forward": layer.paper_bound.forward,
            "table3_inverse": layer.paper_bound.inverse,
        }
        row |= {
            "makes_it_large": k in dominant,
            "method": layer.bounds.method,
            "reason": layer.bounds.reason,
        }
        rows.append(row)
    return rows


def _sampled(
    model: Invertible, x: Tensor, deadline: Deadline, probes: int = 8
) -> list[tuple[float, float]]:
    """Per layer the largest ||J v|| / ||v|| and ||v|| / ||J v|| over data and random directions.

    One direction where time has run out.
    """
    few = torch.arange(min(len(x), SAMPLED), device=x.device)
    line = Linearization(model.select(few), x[few].double())
    generator = torch.Generator().manual_seed(0)
    result = []
    for tangent, state in zip(line.jacobians, line.states, strict=False):
        most, least = 0.0, math.inf
        v = torch.randn(state.shape, generator=generator, device="cpu", dtype=torch.float64)
        for _ in range(probes):
            v = v / v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.dim() - 1))
            u = tangent.jvp(v)
            stretch = u.flatten(1).norm(dim=1)
            most, least = max(most, float(stretch.max())), min(least, float(stretch.min()))
            if deadline.passed:
                break
            v = tangent.vjp(u)
        result.append((most, 1 / least if least > 0 else math.inf))
    return result


def _dominant(layers: tuple[LayerBound, ...]) -> set[int]:
    """Layers whose bound, in one direction, is far above the geometric mean of all layers'."""
    found = set()
    for side in ("forward", "inverse"):
        logs = [
            math.log(getattr(layer.bounds, side)) if getattr(layer.bounds, side) > 0 else 0.0
            for layer in layers
        ]
        finite = [value for value in logs if math.isfinite(value)]
        mean = sum(finite) / len(finite) if finite else 0.0
        found |= {k for k, value in enumerate(logs) if value > mean + math.log(DOMINANT)}
    return found


def _advice(bounds: LipschitzBounds) -> str:
    reasons = [layer.bounds.reason for layer in bounds.per_layer]
    advice = []
    if any("local bounds only" in reason or "close to zero" in reason for reason in reasons):
        advice.append(
            "affine couplings: a scale in (0.5, 1) bounds the inverse, additive couplings are "
            "bounded everywhere"
        )
    if any("not below one" in reason for reason in reasons):
        advice.append(
            "residual layers: certified spectral normalisation below one makes the inverse exist"
        )
    if not advice and max(bounds.forward, bounds.inverse) > 10 * len(bounds.per_layer):
        dominant = sorted(_dominant(bounds.per_layer))
        culprits = "all layers make the product large alike"
        if dominant:
            named = [f"{k} ({bounds.per_layer[k].name})" for k in dominant[:NAMED]]
            if len(dominant) > NAMED:
                named.append(f"{len(dominant) - NAMED} more")
            culprits = f"layers that make the product large: {', '.join(named)}"
        advice.append(
            f"{culprits}; spectral normalisation of the subnetworks lowers both directions, a "
            "scale in (0.5, 1) the inverse of affine couplings, and additive couplings have no "
            "scale to bound"
        )
    return "; ".join(advice)

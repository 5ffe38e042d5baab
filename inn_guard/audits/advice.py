"""What to do, in one list over all checks: the most effective first, nothing twice."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from inn_guard.audits.audited_model import ModelError
from inn_guard.audits.context import AuditContext
from inn_guard.core.missing import NotApplicable
from inn_guard.core.tensors import finite_rows
from inn_guard.execution.state import preserve_state
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.uses import USES, UseVerdict
from inn_guard.report.verdict import Verdict

__all__ = ["advise"]

#: Features are far from standardised if a deviation or a mean is above this, or a deviation below
#: its inverse.
UNUSUAL_SCALE = 30.0
ROWS = 2  #: samples at which it is tried whether there are gradients

INITIALISE = (
    "Initialise the model first, on one batch of training data:\n"
    "flow.train(); ig.wrap(flow)(x); flow.eval()"
)
STANDARDISE = "Standardise the data, {what}: train and audit on (x - x.mean(0)) / x.std(0) instead."
RANDOM_DENSITY = (
    "log p(x) differs from call to call. Where it is compared or reported, let the model compute "
    "the exact trace (trace=ExactTrace() of inn_guard.layers.ode, exact=True in zuko, "
    'divergence_fn="brute_force" in FFJORD), or average over calls; train with the estimate.'
)
DENSITY_FLOAT64 = (
    "Evaluate log p with the layers that need it in float64, against which it was measured:\n"
    'flow = ig.raise_precision(flow, x, uses=["density"])'
)
BOUND_SAMPLING = (
    "If the flow will be trained again, bound the scales of {layer}: exp(s) becomes exp(tanh(s)), "
    "or a sigmoid that stays above 1/2."
)
REPAIR_SAMPLING = (
    "Else fine-tune it until its draws come back, on the batches that it was trained on{by}:\n"
    '{first}flow = ig.stabilize(flow, batches, {loss}uses=["sampling"]).model'
)
SAMPLING_FLOAT64 = (
    "Draw with the layers that need it in float64, where the lost draws were measured to come "
    "back:\n"
    'flow = ig.raise_precision(flow, x, uses=["sampling"])'
)
RECONSTRUCTION_FLOAT64 = (
    "Invert with the layers that need it in float64, where the round trips were measured to come "
    "back:\n"
    'flow = ig.raise_precision(flow, x, uses=["reconstruction"])'
)
PENALISE_INVERSE = (
    "Fine-tune it until its inverse comes back, on the batches that it was trained on{by}; bound "
    "the scales of {layer} if it will be trained again:\n"
    '{first}flow = ig.stabilize(flow, batches, {loss}uses=["reconstruction"]).model'
)
NO_GRADIENT = (
    "No gradient comes through its {directions} (torch.no_grad, detach or an operation in place): "
    "nothing can be trained. Let gradients through, then fine-tune it:\n"
    '{first}flow = ig.stabilize(flow, batches, {loss}uses=["{use}"]).model'
)
BY_LIKELIHOOD = ", by likelihood under N(0, I) (pass loss= if it was trained otherwise)"
REPLACE = "There is nothing to train in the model: replace {layer} by a map that can be inverted."
WRONG_INVERSE = "Compare the inverse with the forward formula: it is the inverse of another map."
ITERATIONS = (
    "Bound the Lipschitz constant of the iterated layers below 1: no setting of the iteration was "
    "found that lowers the error of the inverse."
)
STORED = (
    "Train with stored activations, or let wrong layers be noticed and recomputed: "
    "ig.memory_saving(flow, guard=1e-3)"
)
DENSITY_HOLDS = "Densities are right: only the inverse is lost. Use log_prob; do not use {lost}."
#: use -> what it gives
GIVES = {
    "sampling": "samples",
    "reconstruction": "reconstructions",
    "gradients": "memory-saving gradients",
    "other_inputs": "the inverse outside of the data",
}


def advise(report: AuditReport, context: AuditContext) -> tuple[str, ...]:
    """Advice for the counted uses that fail, or whose density is random; () where there is none.

    Which advice follows from what, in this order: a model that was never initialised; data that are
    far from standardised; a wrong log-determinant; log p(x) that float32 cannot hold; lost draws,
    by their cause; round trips, by theirs; gradients; and that densities hold where only the
    inverse is lost.
    """
    if not (report.verdict.failed or _never_initialised(report) or _is_random(report)):
        return ()
    return tuple(dict.fromkeys(_advice(report, context)))


def _advice(report: AuditReport, context: AuditContext) -> Iterator[str]:
    failing = {use.use for use in report.failed if _is_measured(report, use)}
    for use in report.failed:
        # the model raised, or there was nothing to measure: the check itself says what to do
        if use.use not in failing and use.check and report[use.check].advice:
            yield report[use.check].advice
    if _never_initialised(report):
        yield INITIALISE
    unusual = _unusual_scale(context.x)
    if unusual:
        yield STANDARDISE.format(what=unusual)
    yield from _density(report, fails="density" in failing)
    if "sampling" in failing:
        yield from _sampling(report, context)
    if "reconstruction" in failing:
        yield from _reconstruction(report, context)
    if "gradients" in failing:
        yield STORED
    lost = failing & {"sampling", "reconstruction", "gradients"}
    density = report.uses.get("density")
    if lost and density is not None and density.verdict.passed:
        yield DENSITY_HOLDS.format(lost=" or ".join(use for use in USES if use in lost))
    yield from _other(report)


def _density(report: AuditReport, *, fails: bool) -> Iterator[str]:
    if not fails:
        if _is_random(report):
            yield RANDOM_DENSITY
        return
    if _failed(report, "log_det"):
        yield report["log_det"].advice
        return
    if "not the base's" in report["density"].reason:
        yield report["density"].advice
        return
    if report["density"].settings.get("float64_suffices"):
        yield DENSITY_FLOAT64
    else:
        yield report["density"].advice


def _sampling(report: AuditReport, context: AuditContext) -> Iterator[str]:
    cause = report["sampling"].settings.get("cause")
    if cause == "not onto":
        yield report["sampling"].advice
        return
    if cause == "rounding":
        yield SAMPLING_FLOAT64
        return
    if not _can_be_trained(context):
        yield REPLACE.format(layer=_layer(report))
        return
    yield BOUND_SAMPLING.format(layer=_layer(report))
    yield _fine_tuned(REPAIR_SAMPLING, "sampling", report, context)


def _reconstruction(report: AuditReport, context: AuditContext) -> Iterator[str]:
    cause = report["reconstruction"].settings.get("cause")
    if cause == "tolerance":
        yield report["reconstruction"].advice
        return
    if cause in ("wrong inverse", "unconverged"):
        yield WRONG_INVERSE if cause == "wrong inverse" else ITERATIONS
        return
    if cause == "rounding":
        yield RECONSTRUCTION_FLOAT64
    if not _can_be_trained(context):
        yield REPLACE.format(layer=_layer(report))
        return
    yield _fine_tuned(PENALISE_INVERSE, "reconstruction", report, context)


def _can_be_trained(context: AuditContext) -> bool:
    return next(context.model.parameters(), None) is not None


def _fine_tuned(text: str, use: str, report: AuditReport, context: AuditContext) -> str:
    """The advice to fine-tune, with what `stabilize` needs for this model."""
    declared, has_log_det = context.model.base() is not None, _has_log_det(context)
    needed = ["forward"]  # of the likelihood
    if use == "sampling" or not has_log_det:
        needed.append("inverse")
    frozen = not any(parameter.requires_grad for parameter in context.model.parameters())
    words = {
        "use": use,
        "layer": _layer(report),
        "loss": "" if declared or has_log_det else "loss=loss, ",
        "by": BY_LIKELIHOOD if has_log_det and not declared else "",
        "first": "flow.requires_grad_(True)\n" if frozen else "",
    }
    without = [direction for direction in needed if not _gives_gradient(direction, context)]
    if without:
        return NO_GRADIENT.format(directions=" and ".join(without), **words)
    return text.format(**words)


def _has_log_det(context: AuditContext) -> bool:
    model, x = context.at(context.usable_rows()[:ROWS])
    try:
        with preserve_state(model), torch.no_grad():
            model.eval()
            model.forward_and_log_det(x)
    except (NotApplicable, ModelError):
        return False
    return model.bijective


def _gives_gradient(direction: str, context: AuditContext) -> bool:
    """Whether a gradient comes back through a direction at the first samples."""
    model, x = context.at(context.usable_rows()[:ROWS])
    if not len(x):
        return True  # of no sample can it be told
    try:
        with preserve_state(model), torch.enable_grad():
            model.eval()
            start = x if direction == "forward" else model(x)
            start = start.detach().requires_grad_()
            end = model(start) if direction == "forward" else model.inverse(start)
            torch.autograd.grad(end.sum(), start)
    except (RuntimeError, ModelError):
        return False
    return True


def _other(report: AuditReport) -> Iterator[str]:
    """What checks advise that decide no use above, or whose model raised."""
    known = ("preflight", "density", "log_det", "sampling", "reconstruction", "gradient_angle")
    for result in report.results:
        explains = not result.uses and result.name not in (report.asked or ())
        if result.verdict.failed and result.name not in known and not explains:
            counted = not result.uses or any(
                use in report.uses and report.uses[use].counted for use in result.uses
            )
            if counted and result.advice:
                yield result.advice


def _failed(report: AuditReport, check: str) -> bool:
    return check in report and report[check].verdict.failed


def _is_measured(report: AuditReport, use: UseVerdict) -> bool:
    return use.check != "" and len(report[use.check].values) > 0


def _is_random(report: AuditReport) -> bool:
    """Whether the density counts and is undecided because log p of one z and x is random."""
    use = report.uses.get("density")
    if use is None or not use.counted or use.verdict is not Verdict.UNDECIDED:
        return False
    if "density" not in report:
        return False  # decided by log_det alone
    random_map = "log_det" in report and "the map is random" in report["log_det"].reason
    return bool(report["density"].settings.get("random")) and not random_map


def _never_initialised(report: AuditReport) -> bool:
    if "preflight" not in report:
        return False
    reason = report["preflight"].reason
    return "never initialised" in reason or "in eval mode rewrites" in reason


def _layer(report: AuditReport) -> str:
    """The layer to bound, by name if one was found."""
    if "layer_blame" in report and report["layer_blame"].verdict is not Verdict.NOT_APPLICABLE:
        worst = report["layer_blame"].settings.get("worst_layer")
        if worst:
            return str(worst).partition(":")[0]
    if "sampling" in report and report["sampling"].settings.get("layer"):
        return str(report["sampling"].settings["layer"]).removeprefix("the inverse of ")
    return "the layers"


def _unusual_scale(x: Tensor) -> str:
    """What is unusual about the features of a table; "" if nothing is, or if x is no table."""
    if x.dim() != 2 or len(x) < 2:
        return ""
    rows = x[finite_rows(x)].double()
    if len(rows) < 2:
        return ""
    deviation, mean = rows.std(0), rows.mean(0)
    varying = deviation[deviation > 0]
    if not len(varying):
        return ""
    least, most = varying.min().item(), varying.max().item()
    if most > UNUSUAL_SCALE or least < 1 / UNUSUAL_SCALE:
        return f"whose features deviate by {least:.2g} to {most:.2g}"
    if (mean.abs() / deviation.clamp(min=least)).max().item() > UNUSUAL_SCALE:
        return "whose means are far from 0"
    return ""

"""preflight: does the model behave as a map at all, measured before anything else is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inn_guard.audits.audited_model import AuditedModel, InputRejected, ModelError
from inn_guard.audits.context import AuditContext, same_up_to_rounding
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.level import Level
from inn_guard.audits.spec import audit_check
from inn_guard.core.mismatch import shapes_of, why_rejected
from inn_guard.core.missing import MissingContextError, NotApplicable
from inn_guard.core.tensors import finite_rows
from inn_guard.execution.state import changed_state, preserve_state
from inn_guard.report.formatting import brief
from inn_guard.report.result import AuditResult
from inn_guard.report.uses import USES, Finding
from inn_guard.report.verdict import Verdict

__all__ = ["preflight"]

SAMPLES = 8
#: Two runs of the same computation may differ by this many eps of the largest entry: by the order
#: of sums.
SAME = 100.0
#: Relative difference up to which samples may depend on each other, as they do in adaptive solvers:
#: a tenth of the usual limit of a reconstruction.
COUPLED = 1e-3
ALL_USES = tuple(USES)
INITIALISE = (
    "Initialise the model before an audit: call it once, in training mode, on a batch of training "
    "data."
)


@dataclass
class _Findings:
    """What was found, with advice, worst first; remarks do not decide the verdict.

    ``unmeasurable`` holds the uses whose figures mean nothing, because calls are not of one and the
    same map.
    """

    serious: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    unmeasurable: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, advice: str, *, unmeasurable: tuple[str, ...] = ()) -> None:
        self.serious.append((what, advice))
        for use in unmeasurable:
            self.unmeasurable.setdefault(use, what)

    def result(self, settings: dict[str, object]) -> AuditResult:
        texts = [what for what, _ in self.serious] + self.remarks
        nothing = "the model behaves as one map, sample by sample, and leaves everything as it was"
        nan = float("nan")
        uses = {
            use: Finding(Verdict.UNDECIDED, nan, nan, "", f"cannot be measured: {why}", 0, 0)
            for use, why in self.unmeasurable.items()
        }
        tables = {"findings": tuple({"finding": text} for text in texts)} if texts else {}
        return AuditResult(
            "preflight",
            Verdict.UNSTABLE if self.serious else Verdict.STABLE,
            "; ".join(texts) or nothing,
            uses=uses,
            tables=tables,
            settings=settings,
            advice=" ".join(dict.fromkeys(advice for _, advice in self.serious)),
        )


def _cost(task: Task) -> Cost:
    few = min(SAMPLES, task.samples)
    return Cost(Passes(forward=6, inverse=2) * few, few)


@audit_check(
    question="Does the model behave as one map, sample by sample?",
    level=Level.QUICK,
    cost=_cost,
)
def preflight(context: AuditContext) -> AuditResult:
    """Findings about how the model behaves when it is called, on a few samples; nothing has a unit.

    Measured, never recognised by a class name: a call in eval mode that rewrites parameters or
    buffers (uninitialised data-dependent layers, running statistics), a forward that differs from
    call to call, an output that depends on the other samples of the batch, an input written in
    place, an inverse that is missing or raises, layers that do not compose to the model, latents
    that differ with and without the log-determinant, parameters of several dtypes or devices. Where
    calls are not of one and the same map, the uses that other checks measure are undecided.

    Raises:
        InputRejected: if the model's forward refuses every batch of this shape and dtype.
    """
    model, x = context.model, context.x
    rows = context.finite_rows()[:SAMPLES]
    if not len(rows):
        reason = "every sample of x contains NaN or Inf"
        advice = "Remove NaN and Inf from the data, then audit again."
        return AuditResult("preflight", Verdict.NON_FINITE, reason, advice=advice)
    chosen, batch = context.at(rows)
    findings = _Findings()
    _modes_and_weights(model, findings)
    _layers(model, findings)
    settings: dict[str, object] = {"samples": len(rows), "of": len(x)}
    with torch.no_grad():
        try:
            z = _forward(chosen, batch, findings)
        except ModelError as error:
            _refused(chosen, batch, error)
            advice = "Other values of this shape are accepted: check the range of the data."
            findings.add(str(error), advice)
            return findings.result(settings)
        _initialised(chosen, batch, findings)
        if _is_one_map(chosen, batch, z, findings):
            _agrees(chosen, batch, z, findings)
            _coupled(model, x, rows, findings)
        _inverted(chosen, batch, z, findings)
    return findings.result(settings)


def _layers(model: AuditedModel, findings: _Findings) -> None:
    composition = model.composition
    if composition.other_map:
        findings.add(
            f"{composition.other_map}, so that the model is taken as one opaque layer",
            "Give wrap(...) the layers in the order in which they are applied, or none.",
        )
    if composition.log_det:
        findings.remarks.append(f"{composition.log_det}: see log_det for which of them is wrong")


def _modes_and_weights(model: AuditedModel, findings: _Findings) -> None:
    if model.trained:
        findings.remarks.append("the model was in training mode; audited in eval mode and restored")
    floating = [p for p in model.parameters() if p.is_floating_point()]
    dtypes, devices = {str(p.dtype) for p in floating}, {str(p.device) for p in floating}
    for kind, found in (("dtypes", dtypes), ("devices", devices)):
        if len(found) > 1:
            findings.remarks.append(
                f"its parameters are of several {kind}: {', '.join(sorted(found))}"
            )
    broken = sum(int((~p.detach().isfinite()).sum()) for p in floating)
    if broken:
        advice = (
            "Go back to a checkpoint from before they appeared; lower the learning rate or clip "
            "gradients."
        )
        findings.add(f"{broken} entries of its parameters are NaN or Inf", advice)


def _forward(model: AuditedModel, x: Tensor, findings: _Findings) -> Tensor:
    z, changed, harmless = _called(model, x, lambda part, t: part(t))
    if harmless:
        remark = f"a forward call writes {_names(harmless)}, which changes no result"
        findings.remarks.append(remark)
    if changed:
        what = (
            f"a forward call in eval mode rewrites {len(changed)} parameters or buffers "
            f"({_names(changed)})"
        )
        findings.add(what, INITIALISE, unmeasurable=ALL_USES)
    _, writes = model.call_on(x.clone())
    if writes:
        findings.add(
            "forward writes into its input", "Pass clones, or make the layer out-of-place."
        )
    return z


def _called(
    model: AuditedModel, x: Tensor, call: Callable[[AuditedModel, Tensor], Tensor]
) -> tuple[Tensor, list[str], list[str]]:
    """The result; what the call rewrites and others depend on; what it rewrites without effect.

    Models count their calls in buffers. What is rewritten has no effect if half of the samples,
    with the same random numbers, have the same results before and after.
    """
    old = {name: tensor.detach().clone() for name, tensor in _state(model).items()}
    with changed_state(model) as changed:
        value = call(model, x)
    half = torch.arange(len(x) // 2, device=x.device)
    if not changed or not len(half) or not old.keys() >= set(changed):
        return value, changed, []

    def again(tensors: Mapping[str, Tensor]) -> Tensor | None:
        with preserve_state(model), contextlib.suppress(ModelError, NotApplicable, RuntimeError):
            now = _state(model)
            for name in changed:
                now[name].copy_(tensors[name])
            return call(model.select(half), x[half])
        return None

    before, after = again(old), again(dict(_state(model)))
    if before is None or after is None or not _same(before, after):
        return value, changed, []
    return value, [], changed


def _state(model: AuditedModel) -> dict[str, Tensor]:
    """Parameters and buffers by their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def _initialised(model: AuditedModel, x: Tensor, findings: _Findings) -> None:
    """Whether a first batch in training mode would set parameters, which nothing has set yet."""
    modes = {module: module.training for module in model.modules()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    try:
        with preserve_state(model), changed_state(model) as changed:
            model.train()
            with contextlib.suppress(ModelError, NotApplicable):
                model(x)
            for module, mode in modes.items():
                module.training = mode
    except RuntimeError:  # a layer that is meant for inference only
        return
    fresh = [name for name in changed if name in parameters]
    if fresh:
        what = (
            f"a first batch in training mode sets {len(fresh)} parameters ({_names(fresh)}): the "
            "layers were never initialised"
        )
        findings.add(what, INITIALISE)


def _names(changed: list[str]) -> str:
    shown = ", ".join(name.removeprefix("inner.") for name in changed[:3])
    return f"{shown}, ..." if len(changed) > 3 else shown


def _refused(model: AuditedModel, x: Tensor, error: ModelError) -> None:
    """Raise if no batch of this shape is accepted by a model whose parameters are sound."""
    if isinstance(error.__cause__, (MissingContextError, TypeError)):
        # says itself what is wrong, which is not the shape of x
        raise InputRejected(str(error)) from error
    floating = [p.detach() for p in model.parameters() if p.is_floating_point()]
    if any(not bool(p.isfinite().all()) for p in floating):
        return
    dtypes = sorted({str(p.dtype) for p in floating})
    if len(dtypes) > 1 and "dtype" in str(error):
        raise InputRejected(
            f"expected a model of one dtype, got parameters of {' and '.join(dtypes)}: call "
            f"model.to({x.dtype}); {error}"
        ) from error
    if error.__cause__ is None:
        # it ran, and what it returned is no latent
        raise InputRejected(str(error))
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(x.shape, generator=generator, device="cpu", dtype=torch.float64)
    for other in (torch.zeros_like(x), normal.to(x), (0.05 + 0.9 * torch.sigmoid(normal)).to(x)):
        try:
            model(other)
        except (ModelError, NotApplicable):
            continue
        return
    why = why_rejected(model, x, model.context)
    if why:
        raise InputRejected(f"{why}; {error}") from error
    shape = f"{tuple(x.shape[1:])} per sample in {x.dtype}"
    if model.context is None:
        raise InputRejected(f"expected x that the model accepts, got {shape}: {error}")
    raise InputRejected(
        f"expected x and context that the model accepts, got x {shape} and context "
        f"{shapes_of(model.context)}: {error}"
    )


def _is_one_map(model: AuditedModel, x: Tensor, z: Tensor, findings: _Findings) -> bool:
    """Whether a second call gives the same, without which nothing else can be compared."""
    again = model(x)
    if _same(z, again):
        return True
    what = f"forward is random: two calls on the same x differ by {brief(_difference(z, again))}"
    advice = "Switch off what is random (dropout, noise), or pass the noise in as data."
    findings.add(what, advice)
    return False


def _agrees(model: AuditedModel, x: Tensor, z: Tensor, findings: _Findings) -> None:
    """Whether ``forward_and_log_det`` returns the latents that ``forward`` does."""
    try:
        other = model.forward_and_log_det(x)[0]
    except (ModelError, NotApplicable):
        return  # the checks that need a log-determinant say so
    if z.shape == other.shape and same_up_to_rounding(z, other, torch.finfo(z.dtype).eps ** 0.5):
        return
    findings.add(
        "forward_and_log_det returns other latents than forward, so that log p(x) is that of "
        "another map",
        "Override both of them, or neither.",
        unmeasurable=("density",),
    )


def _coupled(model: AuditedModel, x: Tensor, rows: Tensor, findings: _Findings) -> None:
    """Whether the first sample's output moves when the other samples of its batch do."""
    rows = rows if len(rows) > 1 else rows.repeat(2)
    part, batch = model.select(rows), x[rows]
    halved, repeated = batch.clone(), batch.clone()
    halved[1:] = 0.5 * batch[1:].flip(0)
    repeated[1:] = batch[:1]
    try:
        z = part(batch)[:1]
        try:
            moved = part(halved)[:1]
        except ModelError:  # half of the data may lie where there can be no data
            moved = part(repeated)[:1]
    except ModelError as error:
        findings.remarks.append(f"whether samples are independent could not be measured: {error}")
        return
    if _same(z, moved):
        return
    by = brief(_difference(z, moved))
    what = f"the output of a sample depends on the others in its batch, by {by}"
    if same_up_to_rounding(z, moved, COUPLED):
        findings.remarks.append(f"{what}, as in adaptive solvers")
        return
    advice = (
        "Jacobians per sample do not exist for such a map: put its batch statistics into eval mode."
    )
    findings.add(what, advice, unmeasurable=("density", "gradients"))


def _inverted(model: AuditedModel, x: Tensor, z: Tensor, findings: _Findings) -> None:
    rows = finite_rows(z).nonzero()[:, 0]
    if not len(rows):
        findings.add("no latent is finite", "See reconstruction for the layer where it begins.")
        return
    part, latents = model.select(rows), z[rows]
    try:
        part(x[rows])
        first, changed, _ = _called(part, latents, lambda some, t: some.inverse(t))
        with contextlib.suppress(ModelError):  # may lie where there can be no data
            part(x[rows].flip(0))
        again, writes = part.call_on(latents.clone(), inverse=True)
    except (ModelError, NotApplicable) as error:
        findings.add(f"it cannot be inverted: {error}", "See the error message of its inverse.")
        return
    if changed:
        what = f"an inverse call in eval mode rewrites {len(changed)} parameters or buffers"
        findings.add(what, INITIALISE, unmeasurable=ALL_USES)
    if writes:
        findings.add(
            "inverse writes into its input", "Pass clones, or make the layer out-of-place."
        )
    elif not _same(first, again):
        _two_inverses(part, latents, first, again, findings)


def _two_inverses(
    model: AuditedModel, z: Tensor, first: Tensor, again: Tensor, findings: _Findings
) -> None:
    """Why two inverses of the same latents differ, with a forward call of other data between."""
    by = f"by {brief(_difference(first, again))}"
    if _same(again, model.inverse(z)):
        findings.add(
            "the inverse depends on the forward call before it: after another x, F^-1(z) differs "
            f"{by}",
            "Compute from z alone what the inverse keeps from the last forward call.",
            unmeasurable=("sampling", "reconstruction"),
        )
        return
    what = f"the inverse is random: two calls on the same z differ {by}"
    advice = "Switch off what is random (dropout, noise), or keep what was drawn in z."
    findings.add(what, advice)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of sums; NaN equals NaN."""
    return same_up_to_rounding(a, b, SAME * torch.finfo(a.dtype).eps)


def _difference(a: Tensor, b: Tensor) -> float:
    gap = (a.double() - b.double()).abs()
    return gap[gap.isfinite()].max().item() if bool(gap.isfinite().any()) else 0.0

"""preflight: does the model behave as a map at all, measured before anything else is."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inn_guard.audits.audited_model import AuditedModel, InputRejected, ModelError, polite
from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.core.tensors import finite_rows
from inn_guard.execution.state import changed_state, preserve_state
from inn_guard.report.result import AuditResult, Verdict

__all__ = ["preflight"]

SAMPLES = 8
SAME = 100.0  #: eps relative to the largest entry: two runs of the same computation may differ by the order of sums


@dataclass
class _Findings:
    """What was found, with advice, worst first; remarks do not decide the verdict."""

    serious: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def result(self, settings: dict[str, object]) -> AuditResult:
        texts = [what for what, _ in self.serious] + self.remarks
        return AuditResult(
            "preflight",
            Verdict.UNSTABLE if self.serious else Verdict.STABLE,
            "; ".join(texts)
            or "the model behaves as one map, sample by sample, and leaves everything as it was",
            tables={"findings": tuple({"finding": text} for text in texts)} if texts else {},
            settings=settings,
            advice=" ".join(dict.fromkeys(advice for _, advice in self.serious)),
        )


@polite
def preflight(model: Invertible, x: Tensor) -> AuditResult:
    """Findings about how the model behaves when it is called, on a few samples; nothing has a unit.

    Measured, never recognised by a class name: a call in eval mode that rewrites parameters or buffers
    (uninitialised data-dependent layers, running statistics), a forward that differs from call to call, an output
    that depends on the other samples of the batch, an input written in place, an inverse that is missing or raises,
    layers that do not compose to the model, parameters of several dtypes or devices.

    Raises:
        InputRejected: if the model's forward refuses every batch of this shape and dtype.
    """
    rows = finite_rows(x).nonzero()[:SAMPLES, 0]
    if not len(rows):
        reason = "every sample of x contains NaN or Inf"
        return AuditResult(
            "preflight", Verdict.NON_FINITE, reason, advice="Clean the data, then audit again."
        )
    chosen, batch = model.select(rows), x[rows]
    findings = _Findings()
    _modes_and_weights(model, findings)
    settings: dict[str, object] = {"samples": len(rows), "of": len(x)}
    with torch.no_grad():
        try:
            z = _forward(chosen, batch, findings)
        except ModelError as error:
            _refused(chosen, batch, error)
            findings.serious.append(
                (str(error), "Other values of this shape are accepted: look at the data's range.")
            )
            return findings.result(settings)
        _initialised(chosen, batch, findings)
        _repeated(chosen, batch, z, findings)
        _coupled(model, x, rows, findings)
        _inverted(chosen, z, findings)
        _composed(chosen, batch, z, findings)
    return findings.result(settings)


def _modes_and_weights(model: Invertible, findings: _Findings) -> None:
    if getattr(model, "trained", ()):
        findings.remarks.append(
            "the model was in training mode; it is audited in eval mode and gets its flags back"
        )
    floating = [p for p in model.parameters() if p.is_floating_point()]
    dtypes, devices = {str(p.dtype) for p in floating}, {str(p.device) for p in floating}
    for kind, found in (("dtypes", dtypes), ("devices", devices)):
        if len(found) > 1:
            findings.remarks.append(
                f"its parameters are of several {kind}: {', '.join(sorted(found))}"
            )
    broken = sum(int((~p.detach().isfinite()).sum()) for p in floating)
    if broken:
        advice = "Go back to a checkpoint from before they appeared; lower the learning rate or clip gradients."
        findings.serious.append((f"{broken} entries of its parameters are NaN or Inf", advice))


def _forward(model: Invertible, x: Tensor, findings: _Findings) -> Tensor:
    with changed_state(model) as changed:
        z = model(x)
    if changed:
        names = ", ".join(name.removeprefix("model.") for name in changed[:3]) + (
            ", ..." if len(changed) > 3 else ""
        )
        what = (
            f"a forward call in eval mode rewrites {len(changed)} parameters or buffers ({names})"
        )
        advice = "Layers that initialise themselves must see one training batch, as data, before an audit."
        findings.serious.append((what, advice))
    if isinstance(model, AuditedModel) and model.overwrites(x):
        findings.serious.append(
            ("forward writes into its input", "Hand it clones, or make the layer out-of-place.")
        )
    return z


def _initialised(model: Invertible, x: Tensor, findings: _Findings) -> None:
    """Whether a first batch in training mode would set parameters: then no layer that needs one has seen one."""
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
    fresh = [name.removeprefix("model.") for name in changed if name in parameters]
    if fresh:
        what = (
            f"a first batch in training mode sets {len(fresh)} parameters ({', '.join(fresh[:3])})"
        )
        advice = "Layers that initialise themselves must see one training batch, as data, before an audit."
        findings.serious.append((what, advice))


def _refused(model: Invertible, x: Tensor, error: ModelError) -> None:
    """Raise if no batch of this shape is accepted by a model whose parameters are sound."""
    if any(
        not bool(p.detach().isfinite().all()) for p in model.parameters() if p.is_floating_point()
    ):
        return
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(x.shape, generator=generator, device="cpu", dtype=torch.float64)
    for other in (torch.zeros_like(x), normal.to(x), (0.05 + 0.9 * torch.sigmoid(normal)).to(x)):
        try:
            model(other)
        except (ModelError, NotApplicable):
            continue
        return
    shape = f"{tuple(x.shape[1:])} per sample in {x.dtype}"
    raise InputRejected(f"expected x of a shape that the model accepts, got {shape}: {error}")


def _repeated(model: Invertible, x: Tensor, z: Tensor, findings: _Findings) -> None:
    again = model(x)
    if not _same(z, again):
        what = f"forward is random: two calls on the same x differ by {_difference(z, again):.1e}"
        findings.serious.append(
            (what, "Switch off what is random (dropout, noise), or hand the noise in as data.")
        )


def _coupled(model: Invertible, x: Tensor, rows: Tensor, findings: _Findings) -> None:
    """Whether the first sample's output moves when the other samples do, in a batch of the same shape."""
    rows = rows if len(rows) > 1 else rows.repeat(2)
    part, batch = model.select(rows), x[rows]
    others = batch.clone()
    others[1:] = 0.5 * batch[1:].flip(0)
    try:
        z, moved = part(batch)[:1], part(others)[:1]
    except ModelError as error:
        findings.remarks.append(f"whether samples are independent could not be measured: {error}")
        return
    if not _same(z, moved):
        what = f"the output of a sample depends on the others in its batch, by {_difference(z, moved):.1e}"
        advice = "Jacobians per sample do not exist for such a map: put its batch statistics into eval mode."
        findings.serious.append((what, advice))


def _inverted(model: Invertible, z: Tensor, findings: _Findings) -> None:
    rows = finite_rows(z).nonzero()[:, 0]
    if not len(rows):
        findings.serious.append(
            ("no latent is finite", "See reconstruction for the layer where it begins.")
        )
        return
    part, latents = model.select(rows), z[rows]
    try:
        with changed_state(part) as changed:
            part.inverse(latents)
        writes = isinstance(part, AuditedModel) and part.overwrites(latents, inverse=True)
    except (ModelError, NotApplicable) as error:
        findings.serious.append(
            (f"it cannot be inverted: {error}", "Give the inverse: wrap(encode=f, decode=g).")
        )
        return
    if changed:
        what = f"an inverse call in eval mode rewrites {len(changed)} parameters or buffers"
        findings.serious.append((what, "Initialise the model on a batch of data before an audit."))
    if writes:
        findings.serious.append(
            ("inverse writes into its input", "Hand it clones, or make the layer out-of-place.")
        )


def _composed(model: Invertible, x: Tensor, z: Tensor, findings: _Findings) -> None:
    layers = model.layers()
    if not layers:
        return
    composed = functools.reduce(lambda state, layer: layer(state), layers, x)
    if composed.shape != z.shape or not _same(
        z, composed, tolerance=torch.finfo(z.dtype).eps ** 0.5
    ):
        what = "its layers do not compose to its forward: what is measured layer by layer is of another map"
        findings.serious.append(
            (what, "Give wrap(...) the layers in the order in which they are applied, or none.")
        )


def _same(a: Tensor, b: Tensor, tolerance: float | None = None) -> bool:
    """Equal up to the order of sums; NaN equals NaN."""
    allowed = SAME * torch.finfo(a.dtype).eps if tolerance is None else tolerance
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    if not bool(finite.any()):
        return True
    return _difference(a, b) <= allowed * a[finite].abs().max().double().item()


def _difference(a: Tensor, b: Tensor) -> float:
    gap = (a.double() - b.double()).abs()
    return gap[gap.isfinite()].max().item() if bool(gap.isfinite().any()) else 0.0

"""What users run on a GPU: each path as a function of the device, with numbers that are compared.

Run as a script with names of paths, it runs each on the CPU and on the pretended device and prints
what went wrong as JSON. It is a script because torch takes a device of one's own for good: other
tests are to run without.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import inn_guard as ig
from inn_guard.audits.registry import checks_of_level
from inn_guard.audits.spec import Level
from inn_guard.core.context import map_tensors
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.dense import composed_jacobian
from inn_guard.jacobian.log_det import layer_log_det
from inn_guard.jacobian.singular_values import extreme_singular_values, full_jacobian
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.models.glow import GlowConfig, glow_classifier
from tests.cases.all import CASES
from tests.devices import pretended

Device = torch.device


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def flow(device: Device, *, dropout: float = 0.0) -> Chain:
    """Affine couplings of six features; with dropout they are in training mode."""

    def network(kept: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(kept, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, out))

    torch.manual_seed(0)
    layers = [AffineCoupling.on_halves(6, network, swapped=bool(k % 2)) for k in range(3)]
    return Chain(*layers).double().to(device).train(dropout > 0)


def callables(device: Device) -> ig.Invertible:
    """The same map as two functions."""
    inner = flow(device)
    return ig.wrap(encode=inner.forward_and_log_det, decode=inner.inverse_and_log_det)


def images(device: Device) -> Chain:
    """A small Glow on 3 x 8 x 8 pixels."""
    torch.manual_seed(0)
    net = glow_classifier((3, 8, 8), config=GlowConfig(levels=2, blocks=1, hidden=8)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        net(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    return net.to(device).eval()


def data(device: Device, *shape: int) -> Tensor:
    return torch.randn(shape or (8, 6), generator=generator(), dtype=torch.float64).to(device)


def hook_and_step(device: Device) -> Any:
    """RegularizerHook with every kind of regularizer, and its step."""
    model, x = flow(device), data(device)
    regularizers = [
        ig.FiniteDifferences(1e-2),
        ig.FiniteDifferences(1e-2, fraction=0.5),
        ig.FiniteDifferences(1e-2, direction="inverse", at="prior", form="log"),
        ig.FiniteDifferences.published(1e-2),
        ig.NormalizingFlowLoss(1e-3),
        ig.AdaptiveCoefficient(ig.FiniteDifferences(1.0), target=2.0),
    ]
    hook = ig.RegularizerHook(model, regularizers, every=2)
    optimizer = torch.optim.Adam(model.parameters())
    losses = []
    for _ in range(3):
        z = model(x)
        loss = z.square().mean() + hook(x, z=z)
        losses.append(loss.detach())
        hook.step(loss, optimizer, clip=1.0)
    return losses, hook.last, [p.detach() for p in model.parameters()]


def memory_saving(mode: dict[str, Any], make: Callable[[Device], Any], *shape: int) -> Any:
    def path(device: Device) -> Any:
        model, x = make(device), data(device, *shape).requires_grad_()
        lean = ig.memory_saving(model, **mode)
        torch.manual_seed(3)
        z, log_det = lean.forward_and_log_det(x)
        (z.square().mean() + log_det.mean()).backward()
        return z, log_det, x.grad, [p.grad for p in lean.parameters()]

    return path


def dropout_replayed(device: Device) -> Any:
    """Memory saving and checks of a net that draws on the device: its draws are repeated there."""
    model, x = flow(device, dropout=0.3), data(device)
    seed = torch.manual_seed
    seed(5)
    plain = model(x)
    plain.square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    seed(5)
    z = ig.memory_saving(model)(x)
    z.square().mean().backward()
    for gradient, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    return (z - plain).abs().max()


def stochastic_net_is_refused(device: Device) -> Any:
    """FD of a net with dropout compares two maps: its draws on the device are noticed."""
    model, x = flow(device, dropout=0.3), data(device)
    try:
        ig.FiniteDifferences(1e-2)(model, x)
    except ValueError as error:
        return "expected the same map" in str(error)
    return False


def products(make: Callable[[Device], Any], *shape: int) -> Any:
    def path(device: Device) -> Any:
        model, x = make(device), data(device, *shape)
        linearization = Linearization(model, x)
        z = linearization.output
        found = [
            linearization.jvp(x),
            linearization.vjp(z),
            linearization.inverse_jvp(z),
            linearization.inverse_vjp(x),
        ]
        half = linearization.select(torch.tensor([0, 2], device=x.device))
        if half is not None:
            found.append(half.jvp(x[[0, 2]]))
        return [product.value() for product in found]

    return path


def extremes(make: Callable[[Device], Any], *shape: int) -> Any:
    def path(device: Device) -> Any:
        linearization = Linearization(make(device), data(device, *shape))
        found = extreme_singular_values(linearization, generator=generator())
        return found.log_max, found.log_min, found.forward.relative_error

    return path


def dense(device: Device) -> Any:
    model, x = flow(device), data(device)
    layer = model.layers()[0]
    log_det = layer_log_det(layer, x, max_dense=64)
    return composed_jacobian(model, x), full_jacobian(model, x), log_det.log_abs


def exact(device: Device) -> Any:
    model, x = flow(device), data(device).float()
    coder = ig.exact(model.float())
    z, kept = coder.encode(x)
    assert torch.equal(coder.decode(z, kept), x)
    return z


def audit(checks: str | list[str], make: Callable[[Device], Any], *shape: int) -> Any:
    """An audit of a level, or with these checks."""
    which = {"level": checks} if isinstance(checks, str) else {"checks": checks}

    def path(device: Device) -> Any:
        report = ig.audit(make(device), data(device, *shape), **which)
        return _without_time(report.to_dict())

    return path


def dry_run(device: Device) -> Any:
    return [result.name for result in ig.audit(flow(device), data(device), dry_run=True)]


def stabilize(device: Device) -> Any:
    model, x = flow(device), data(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    steady = ig.stabilize(model, [x], steps=4, every=2, uses=["sampling"], progress=False)
    return [p.detach() for p in steady.model.parameters()]


def raise_precision(device: Device) -> Any:
    model, x = flow(device).float(), data(device).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    limits = ig.Limits(reconstruction=1e-6)
    mixed = ig.raise_precision(model, x, uses=["reconstruction"], limits=limits)
    return mixed(x), mixed.inverse(mixed(x))


def audit_hook(device: Device) -> Any:
    watch = ig.AuditHook(flow(device), data(device), every=1)
    return [_without_time(watch().to_dict()) for _ in range(2)]


def of_case(case: Any) -> Callable[[Device], Any]:
    """What the contract asks of every model: both directions, log-determinants, products, FD."""

    def path(device: Device) -> Any:
        model, x = case.make()
        model = copy.deepcopy(model).to(device)
        if model.context is not None:
            model = model.with_context(map_tensors(model.context, lambda t: t.to(device)))
        x = x.to(device)
        torch.manual_seed(1)
        z = model(x)
        v, u = torch.ones_like(x), torch.ones_like(z)
        linearization = Linearization(model, x)
        found = [
            z,
            attempt(lambda: model.inverse(z)),
            attempt(lambda: model.forward_and_log_det(x)[1]),
            attempt(lambda: model.inverse_and_log_det(z)[1]),
            attempt(lambda: linearization.jvp(v).value()),
            attempt(lambda: linearization.vjp(u).value()),
            attempt(lambda: linearization.inverse_jvp(u).value()),
            attempt(lambda: ig.memory_saving(model)(x)),
            attempt(lambda: penalty_gradients(model, x)),
        ]
        return [map_tensors(tensor, Tensor.detach) for tensor in found]

    return path


def penalty_gradients(model: ig.Invertible, x: Tensor) -> list[Tensor]:
    penalty = ig.FiniteDifferences(1e-2)(model, x)
    if penalty.requires_grad:
        penalty.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def attempt(call: Callable[[], Any]) -> Any:
    """What a call returns, or the name of its error: what fails on the CPU may fail elsewhere."""
    try:
        return call()
    except Exception as error:
        if "at least two devices" in str(error) or "type for generator" in str(error):
            raise
        return type(error).__name__


_ENDS = "torch ends the process on the pretended device (signal 11), for a reason not found"

#: cases that do not run, and why: mostly the libraries' own code fails on a GPU, too
LEFT_OUT = {
    "torch-affine": "its location is a tensor that no module moves",
    "nflows-Sigmoid": "its temperature is a tensor that no module moves",
    "nflows-Logit": "its temperature is a tensor that no module moves",
    "nflows-CompositeCDFTransform": "its temperature is a tensor that no module moves",
    "nflows-PiecewiseLinearCouplingTransform": "its spline makes its bins on the CPU",
    "nflows-PiecewiseLinearCouplingTransform-tails": "its spline makes its bins on the CPU",
    "nflows-PiecewiseLinearCouplingTransform-unconditional": "its spline makes bins on the CPU",
    "nflows-PiecewiseLinearCDF": "its spline makes its bins on the CPU",
    "nflows-PiecewiseLinearCDF-tails": "its spline makes its bins on the CPU",
    "nflows-MaskedPiecewiseLinearAutoregressiveTransform": "its spline makes bins on the CPU",
    "normflows-Composite": "it makes its log-determinant on the CPU",
    "zuko-FFJTransform": "its solver differentiates in torch's device thread, which ends there",
    "zuko-CNF": "its solver differentiates in torch's device thread, which ends there",
    "zuko-CNF-context": "its solver differentiates in torch's device thread, which ends there",
    "zuko-SOSPF": _ENDS,
    "zuko-UNAF": _ENDS,
    "freia-IRevNetDownsampling-legacy": _ENDS,
    "freia-IRevNetUpsampling-legacy": _ENDS,
}

STANDARD = [check.name for check in checks_of_level(Level.STANDARD)]

PATHS: dict[str, Callable[[Device], Any]] = {
    "a CPU tensor by mistake": lambda device: data(device) * torch.ones(6),
    "a CPU generator by mistake": lambda device: torch.rand(
        3, device=device, generator=generator()
    ),
    "RegularizerHook and its step": hook_and_step,
    "FiniteDifferences refuses dropout": stochastic_net_is_refused,
    "memory saving, float": memory_saving({}, flow),
    "memory saving, images": memory_saving({}, images, 4, 3, 8, 8),
    "memory saving, guard": memory_saving({"guard": 1e-3}, flow),
    "memory saving, exact": memory_saving({"exact": True}, flow),
    "memory saving, dropout": dropout_replayed,
    "Jacobian products": products(flow),
    "Jacobian products of callables": products(callables),
    "Jacobian products, images": products(images, 4, 3, 8, 8),
    "Lanczos": extremes(flow),
    "Lanczos, images": extremes(images, 4, 3, 8, 8),
    "dense Jacobians and log-determinants": dense,
    "exact": exact,
    "AuditHook": audit_hook,
    "dry run": dry_run,
    "stabilize": stabilize,
    "raise_precision": raise_precision,
    "audit, quick": audit("quick", flow),
    "audit, standard": audit("standard", flow),
    "audit of callables": audit("standard", callables),
    "audit, images": audit("standard", images, 4, 3, 8, 8),
}
#: what only a full audit runs, each check by itself
PATHS |= {f"audit, {name}": audit([name], flow) for name in ig.AUDITS if name not in STANDARD}
PATHS |= {f"case {case.id}": of_case(case) for case in CASES if case.id not in LEFT_OUT}


def _without_time(value: Any) -> Any:
    """Nested figures without those that differ between two runs or say where the model was.

    The pretended device has no autocast: its figures are left out, too.
    """
    if isinstance(value, dict):
        left_out = ("second", "device", "peak", "memory", "date", "autocast", "spent")
        kept = {k: v for k, v in value.items() if not any(part in str(k) for part in left_out)}
        return {k: _without_time(v) for k, v in kept.items()}
    if isinstance(value, (list, tuple)):
        kept = [part for part in value if "autocast" not in str(part)[:200]]
        return [_without_time(part) for part in kept]
    return value


def on_cpu(value: Any) -> Any:
    """Nested tensors on the CPU, as plain tensors."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {k: on_cpu(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [on_cpu(part) for part in value]
    return value


def what_differs(a: Any, b: Any, where: str = "") -> str | None:
    """The first place where two nested results differ by more than rounding; None if nowhere."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        parts = [(a[k], b[k], f"{where}/{k}") for k in a]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        parts = [(p, q, f"{where}/{k}") for k, (p, q) in enumerate(zip(a, b, strict=True))]
    else:
        if isinstance(a, float) and isinstance(b, float):
            a, b = torch.tensor(a), torch.tensor(b)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            same = (
                a.shape == b.shape
                and a.dtype == b.dtype
                and torch.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)
            )
        else:
            same = a == b
        return None if same else f"{where}: {a!r:.200} on the CPU, {b!r:.200} on the device"
    for part in parts:
        found = what_differs(*part)
        if found is not None:
            return found
    return None


def failure(name: str) -> str | None:
    """Why a path does not give the same on the device as on the CPU; None if it does."""
    try:
        expected = on_cpu(PATHS[name](torch.device("cpu")))
    except Exception:
        return f"on the CPU: {traceback.format_exc(limit=-3)}"
    try:
        with pretended.pretended_device() as device:
            found = on_cpu(PATHS[name](device))
    except Exception:
        return _shortened(traceback.format_exc(limit=-14))
    return what_differs(expected, found)


def _shortened(text: str) -> str:
    """Without torch's list of backends that an operation has."""
    kept = [f"{line:.300}" for line in text.splitlines() if ": registered at" not in line]
    return "\n".join(line for line in kept if ": fallthrough registered" not in line)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    pretended.device()  # before the first backward pass, which counts the devices
    for name in names:
        print(json.dumps({name: failure(name)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

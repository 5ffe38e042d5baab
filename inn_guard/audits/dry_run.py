"""dry_run: what an audit would cost, from a few timed passes, before it runs."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from inn_guard.audits.context import AuditContext, same_up_to_rounding
from inn_guard.audits.cost_model import Cost, Task
from inn_guard.audits.spec import AuditSpec
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable
from inn_guard.core.tensors import finite_rows
from inn_guard.execution.memory import Footprint, forward_footprint, linearized_footprint
from inn_guard.jacobian.chain import Linearization
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict

__all__ = ["dry_run"]

Answer = TypeVar("Answer")

TIMED = 8  #: samples in one timed pass
KINDS = ("forward", "inverse", "linearize", "product")


def dry_run(
    context: AuditContext, *, checks: Sequence[AuditSpec], processes: int = 1
) -> AuditResult:
    """Estimated time in seconds and memory in bytes of each check, of which none is run.

    One forward and one inverse are timed on a few samples. Of layers of the same class, shape and
    number of parameters one is linearized and stands for all: its products are timed. A layer
    without parameters, beside others that have some, takes as long for a product as for a pass. The
    memory of a layer is what autograd keeps of a pass and its inverse, measured on one and two
    samples. Time is the number of passes that a check declares, times the time of a pass per
    sample. That is an estimate: too high where large batches run faster, and blind to what
    iterations depend on. The work that processes share is divided by their number. Where the memory
    is bounded, a pass and a linearization of the whole model are metered.

    Args:
        context: model and data.
        checks: with their settings.
        processes: that would share the samples.

    Returns:
        seconds and bytes of all, a row per check in the table ``cost``.
    """
    rows = context.finite_rows()[:TIMED]
    memory = context.parallel.memory
    prints = None
    if memory is not None:
        rows = context.usable_rows()[:TIMED]
    if memory is not None and len(rows):
        # a bound is kept by what was measured of the whole
        model, x = context.at(rows)
        prints = {
            False: forward_footprint(model, x, within=float(memory)),
            True: linearized_footprint(model, x, within=float(memory)),
        }
        rows = rows[: prints[True].samples_within(memory)]
    timed = _first_pass(context, rows)
    if not len(timed.x):
        timed = _first_pass(context, context.usable_rows()[:TIMED])
    if not len(timed.x):
        reason = "no sample has a finite latent: nothing could be timed"
        return AuditResult("dry_run", Verdict.NON_FINITE, reason)
    if prints is None:
        prints = _footprints(timed.kinds)
    seconds, missing = _timed(timed)
    estimate = _Estimate(context, seconds, prints, timed.layers, processes)
    table = tuple(estimate.row(check) for check in checks)
    total = sum(row["seconds"] for row in table if math.isfinite(row["seconds"]))
    most = max((row["bytes"] for row in table if math.isfinite(row["bytes"])), default=math.nan)
    return AuditResult(
        "dry_run",
        Verdict.NOT_APPLICABLE,
        _reason(table, total, most, missing),
        headline=("seconds", "bytes"),
        values={"seconds": total, "bytes": most}
        | {f"seconds_per_{kind}": seconds[kind] for kind in KINDS},
        units={"seconds": "s", "bytes": "bytes"}
        | {f"seconds_per_{kind}": "s per sample" for kind in KINDS},
        tables={"cost": table},
        settings={
            "timed_samples": len(timed.x),
            "dimension": timed.x[0].numel(),
            "layers": timed.layers,
            "processes": processes,
        },
    )


def _reason(
    table: Sequence[Mapping[str, Any]],
    total: float | int,
    most: float | int,
    missing: Mapping[str, str],
) -> str:
    parts = [
        f"nothing was measured; estimate: {_time(total)} and {_size(most)} on top of model and data"
    ]
    parts += [f"{row['check']} {_time(row['seconds'])}, {_size(row['bytes'])}" for row in table]
    unknown = [row["check"] for row in table if math.isnan(row["seconds"])]
    if unknown:
        parts.append(f"not in the total, since they declare no cost: {', '.join(unknown)}")
    parts += [f"{kind} could not be timed: {why}" for kind, why in missing.items()]
    return "; ".join(parts)


@dataclass(frozen=True)
class _Estimate:
    """What estimates are made from: the audit, seconds and footprints of a pass of one sample."""

    context: AuditContext
    seconds: Mapping[str, float]
    prints: Mapping[bool, Footprint]  #: of a forward pass, and linearized
    layers: int
    processes: int

    def row(self, check: AuditSpec) -> dict[str, Any]:
        """The estimate for one check."""
        if check.cost is None:
            return {"check": check.name, "seconds": math.nan, "bytes": math.nan}
        x = self.context.x
        settings = check.all_settings()
        task = Task(len(x), x[0].numel(), self.layers, settings, self.context.level)
        cost = check.cost(task)
        counts = asdict(cost.passes)
        seconds = cost.seconds
        for kind in KINDS:
            if counts[kind]:
                seconds += counts[kind] * self.seconds[kind]
        ranks = self.processes if check.is_shared else 1
        size = self._bytes(cost, ranks)
        return {"check": check.name, "seconds": seconds / ranks, "bytes": size, **counts}

    def _bytes(self, cost: Cost, ranks: int) -> float | int:
        x, memory = self.context.x, self.context.parallel.memory
        width = torch.promote_types(x.dtype, torch.float32).itemsize
        held = self.prints[cost.linearized].plus(cost.vectors * x[0].numel() * width)
        samples = math.ceil(cost.at_once / ranks)
        if memory is not None:
            samples = min(samples, held.samples_within(memory))
        return held.of(samples)


@dataclass(frozen=True)
class _Kind:
    """Layers that cost the same.

    Attributes:
        layer: one of them.
        x: its input.
        size: entries of its parameters.
        seconds: of its pass, per sample.
        count: how many there are.
    """

    layer: Invertible
    x: Tensor
    size: int
    seconds: float
    count: int = 1


@dataclass(frozen=True)
class _Passes:
    """One pass through the layers and one through the model.

    Attributes:
        model: at the rows whose latents are finite.
        x: these rows.
        z: their latents.
        seconds: of the model's pass, per sample.
        kinds: the layers by what they cost; the model itself if it has none.
    """

    model: Invertible
    x: Tensor
    z: Tensor
    seconds: float
    kinds: Sequence[_Kind]

    @property
    def layers(self) -> int:
        return sum(kind.count for kind in self.kinds)


@torch.no_grad()
def _first_pass(context: AuditContext, rows: Tensor) -> _Passes:
    model, x = context.at(rows)
    if not len(rows):
        return _Passes(model, x, x, math.nan, ())
    # first layer by layer, so that the model's own pass is not the very first one
    kinds, composed = _kinds(model, x)
    seconds, z = _clocked(lambda: model(x), x)
    finite = finite_rows(z)
    if not bool(finite.all()):
        return _first_pass(context, rows[finite])
    if not same_up_to_rounding(composed, z, torch.finfo(x.dtype).eps ** 0.5):
        size = sum(parameter.numel() for parameter in model.parameters())
        kinds = [_Kind(model, x, size, seconds)]  # its layers are another map
    return _Passes(model, x, z, seconds, kinds)


def _kinds(model: Invertible, x: Tensor) -> tuple[list[_Kind], Tensor]:
    """One layer for each class, shape and number of parameters, and what they make of x."""
    found: dict[Any, _Kind] = {}
    layers = model.layers()
    for layer in layers or (model,):
        size = sum(parameter.numel() for parameter in layer.parameters())
        key = (type(layer.block), x.shape, size)
        seconds, z = _clocked(functools.partial(layer, x), x)
        if key in found:
            found[key] = replace(found[key], count=found[key].count + 1, seconds=seconds)
        else:
            found[key] = _Kind(layer, x, size, seconds)
        x = z
    return list(found.values()), x


def _footprints(kinds: Sequence[_Kind]) -> dict[bool, Footprint]:
    """Of a pass, and linearized: the graphs of all layers are held together."""
    graphs = [(kind.count, _graph_footprint(kind)) for kind in kinds]
    return {
        # a pass holds what one layer computes at a time
        False: Footprint(max(one.fixed for _, one in graphs), max(one.each for _, one in graphs)),
        True: Footprint(
            sum(count * one.fixed for count, one in graphs),
            sum(count * one.each for count, one in graphs),
        ),
    }


def _graph_footprint(kind: _Kind) -> Footprint:
    """What autograd keeps of a pass and its inverse of one such layer, with its states."""
    layer = kind.layer

    def kept(count: int) -> int:
        """Bytes at this many samples."""
        rows = torch.zeros(count, dtype=torch.long, device=kind.x.device)
        part, x = layer.select(rows), kind.x[rows].requires_grad_()
        with _KeptForBackward(layer.parameters()) as graph:
            z = part(x)
            with contextlib.suppress(NotApplicable):
                part.inverse(z.detach().requires_grad_())
        return graph.bytes + 2 * (x.numel() + z.numel()) * x.element_size()

    one = kept(1)
    each = max(kept(2) - one, kind.x[0].numel() * kind.x.element_size())
    return Footprint(max(0, one - each), each)


class _KeptForBackward:
    """A block that adds up the tensors that graphs recorded in it keep, the parameters aside."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.bytes = 0
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._kept: list[Tensor] = []  # else the memory of one could become that of another
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept)

    def __enter__(self) -> _KeptForBackward:
        self._hooks.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._hooks.__exit__(*raised)
        self._kept.clear()

    def _keep(self, tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
            self._kept.append(tensor.detach())
        return tensor


def _timed(timed: _Passes) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds per sample of each kind of pass, NaN where there is none, and why."""
    seconds, missing = dict.fromkeys(KINDS, math.nan), {}
    seconds["forward"] = timed.seconds
    try:
        with torch.no_grad():
            seconds["inverse"], _ = _clocked(lambda: timed.model.inverse(timed.z), timed.x)
    except NotApplicable as error:
        missing["inverse"] = str(error)
    seconds["linearize"] = seconds["product"] = 0.0
    for kind in timed.kinds:
        if not kind.size and len(timed.kinds) > 1:
            # a permutation or the like, whose products do what a pass does
            seconds["linearize"] += kind.count * kind.seconds
            seconds["product"] += kind.count * kind.seconds
            continue
        each, linearization = _clocked(functools.partial(Linearization, kind.layer, kind.x), kind.x)
        seconds["linearize"] += kind.count * each
        try:
            seconds["product"] += kind.count * _seconds_of_a_product(kind, linearization)
        except NotApplicable as error:
            missing["product"] = str(error)
            seconds["product"] = math.nan
    return seconds, missing


def _seconds_of_a_product(kind: _Kind, linearization: Linearization) -> float:
    """The mean of the four products with one layer's Jacobian."""
    linearization.inverse_checked(0)  # so that no product is timed with its check
    pairs = (
        (linearization.jvp, kind.x),
        (linearization.vjp, linearization.output),
        (linearization.inverse_jvp, linearization.output),
        (linearization.inverse_vjp, kind.x),
    )
    each = [_clocked(functools.partial(product, vector), kind.x)[0] for product, vector in pairs]
    return sum(each) / len(each)


def _clocked(call: Callable[[], Answer], x: Tensor) -> tuple[float, Answer]:
    """Seconds of a call per sample of x, and what it returned."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    answer = call()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return (time.perf_counter() - start) / len(x), answer


def _time(seconds: float | int) -> str:
    if math.isnan(seconds):
        return "no estimate"
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _size(count: float | int) -> str:
    if math.isnan(count):
        return "memory unknown"
    return f"{count / 2**30:.2g} GiB" if count >= 2**29 else f"{count / 2**20:.2g} MiB"

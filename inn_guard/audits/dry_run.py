"""dry_run: what an audit would cost, from a few timed passes, before it runs."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from inn_guard.audits.context import AuditContext
from inn_guard.audits.cost_model import Cost, Task
from inn_guard.audits.spec import AuditSpec
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable
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
    number of parameters one is linearized and stands for all: its products are timed, its memory
    is metered on one and two samples. Time is the number of passes that a check declares, times the
    time of a pass per sample: an estimate, too high where large batches run faster, and blind to
    what iterations depend on. Where the memory is bounded, or processes share the work, that is
    taken into account.

    Args:
        context: model and data.
        checks: with their settings.
        processes: that would share the samples.

    Returns:
        seconds and bytes of all, a row per check in the table ``cost``.
    """
    rows = context.usable_rows()[:TIMED]
    if not len(rows):
        reason = "no sample has a finite latent: nothing could be timed"
        return AuditResult("dry_run", Verdict.NON_FINITE, reason)
    memory = context.parallel.memory
    within = math.inf if memory is None else float(memory)
    model, x = context.at(rows)
    kinds = _kinds(model, x)
    prints = _footprints(kinds, within)
    if memory is not None:
        # a bound is kept by what was measured of the whole
        prints = {
            False: forward_footprint(model, x, within=within),
            True: linearized_footprint(model, x, within=within),
        }
        rows = rows[: prints[True].samples_within(memory)]
        model, x = context.at(rows)
        kinds = _kinds(model, x)
    seconds, missing = _timed(model, x, kinds)
    estimate = _Estimate(context, seconds, prints, processes)
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
            "timed_samples": len(rows),
            "dimension": x[0].numel(),
            "layers": estimate.layers,
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
    processes: int

    @functools.cached_property
    def layers(self) -> int:
        return len(self.context.model.layers()) or 1

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
        count: how many there are.
    """

    layer: Invertible
    x: Tensor
    count: int


@torch.no_grad()
def _kinds(model: Invertible, x: Tensor) -> list[_Kind]:
    """One layer for each class, shape and number of parameters; a model without layers is one."""
    found: dict[Any, _Kind] = {}
    layers = model.layers()
    for layer in layers or (model,):
        size = sum(parameter.numel() for parameter in layer.parameters())
        key = (type(layer.block), x.shape, size)
        known = found.get(key)
        if known is None:
            found[key] = _Kind(layer, x, 1)
        else:
            found[key] = replace(known, count=known.count + 1)
        if layers:
            x = layer(x)
    return list(found.values())


def _footprints(kinds: Sequence[_Kind], within: float) -> dict[bool, Footprint]:
    """Of a pass, and linearized: the graphs of all layers are held together."""
    plain, linearized = [], []
    for kind in kinds:
        plain.append(forward_footprint(kind.layer, kind.x, within=within))
        one = linearized_footprint(kind.layer, kind.x, within=within)
        linearized.append(Footprint(kind.count * one.fixed, kind.count * one.each))
    return {
        False: Footprint(max(one.fixed for one in plain), max(one.each for one in plain)),
        True: Footprint(sum(one.fixed for one in linearized), sum(one.each for one in linearized)),
    }


def _timed(
    model: Invertible, x: Tensor, kinds: Sequence[_Kind]
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds per sample of each kind of pass, NaN where there is none, and why."""
    seconds, missing = dict.fromkeys(KINDS, math.nan), {}
    with torch.no_grad():
        # both have been called before, when layers were compared with their model
        seconds["forward"], z = _clocked(lambda: model(x), x)
        try:
            seconds["inverse"], _ = _clocked(lambda: model.inverse(z), x)
        except NotApplicable as error:
            missing["inverse"] = str(error)
    seconds["linearize"] = 0.0
    products = 0.0
    for kind in kinds:
        seconds["linearize"] += kind.count * _clock(
            functools.partial(Linearization, kind.layer, kind.x), kind.x
        )
        try:
            products += kind.count * _seconds_of_a_product(kind)
        except NotApplicable as error:
            missing["product"] = str(error)
            products = math.nan
    seconds["product"] = products
    return seconds, missing


def _seconds_of_a_product(kind: _Kind) -> float:
    """The mean of the four products with one layer's Jacobian."""
    linearization = Linearization(kind.layer, kind.x)
    pairs = (
        (linearization.jvp, kind.x),
        (linearization.vjp, linearization.output),
        (linearization.inverse_jvp, linearization.output),
        (linearization.inverse_vjp, kind.x),
    )
    each = [_clock(functools.partial(product, vector), kind.x) for product, vector in pairs]
    return sum(each) / len(each)


def _clock(call: Callable[[], Any], x: Tensor) -> float:
    """Seconds of a call per sample of x; the first call prepares what later ones find ready."""
    call()
    return _clocked(call, x)[0]


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

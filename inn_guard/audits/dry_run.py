"""dry_run: what an audit would cost, from a few timed passes, before it runs."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

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

TIMED = 8  #: samples in one timed pass
KINDS = ("forward", "inverse", "linearize", "product")


def dry_run(
    context: AuditContext, *, checks: Sequence[AuditSpec], processes: int = 1
) -> AuditResult:
    """Estimated time in seconds and memory in bytes of each check, of which none is run.

    One forward, one inverse, one linearization and its products are timed on a few samples, their
    memory is metered on one and two. Time is the number of passes that a check declares, times the
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
    prints = {
        False: forward_footprint(model, x, within=within),
        True: linearized_footprint(model, x, within=within),
    }
    if memory is not None:
        rows = rows[: prints[True].samples_within(memory)]
        model, x = context.at(rows)
    seconds, missing = _timed(model, x)
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

    @property
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


def _timed(model: Invertible, x: Tensor) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds per sample of each kind of pass, NaN where there is none, and why."""
    seconds, missing = dict.fromkeys(KINDS, math.nan), {}
    with torch.no_grad():
        seconds["forward"] = _clock(lambda: model(x), x)
        z = model(x)
        try:
            seconds["inverse"] = _clock(lambda: model.inverse(z), x)
        except NotApplicable as error:
            missing["inverse"] = str(error)
    seconds["linearize"] = _clock(lambda: Linearization(model, x), x)
    linearization = Linearization(model, x)
    products = (
        linearization.jvp,
        linearization.vjp,
        linearization.inverse_jvp,
        linearization.inverse_vjp,
    )
    vectors = (x, linearization.output, linearization.output, x)
    try:
        each = [
            _clock(functools.partial(product, v), x)
            for product, v in zip(products, vectors, strict=True)
        ]
        seconds["product"] = sum(each) / len(each)
    except NotApplicable as error:
        missing["product"] = str(error)
    return seconds, missing


def _clock(call: Callable[[], Any], x: Tensor) -> float:
    """Seconds of a call per sample of x; the first call prepares what later ones find ready."""
    call()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    call()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return (time.perf_counter() - start) / len(x)


def _time(seconds: float | int) -> str:
    if math.isnan(seconds):
        return "no estimate"
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _size(count: float | int) -> str:
    if math.isnan(count):
        return "memory unknown"
    return f"{count / 2**30:.2g} GiB" if count >= 2**29 else f"{count / 2**20:.2g} MiB"

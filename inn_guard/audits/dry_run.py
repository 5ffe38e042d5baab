"""dry_run: what an audit would cost, from a few timed passes, before it runs."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inn_guard.audits.audited_model import is_shared, polite, shares_of
from inn_guard.audits.cost_model import COSTS, Cost, Task
from inn_guard.audits.jacobian_spectrum import usable_rows
from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.execution.memory import Footprint, forward_footprint, linearized_footprint
from inn_guard.jacobian.chain import Linearization
from inn_guard.report.result import AuditResult, Verdict

__all__ = ["dry_run"]

TIMED = 8  #: samples in one timed pass
FOOTPRINTS: tuple[Callable[..., Footprint], ...] = (forward_footprint, linearized_footprint)
KINDS = ("forward", "inverse", "linearize", "product")


@polite
def dry_run(
    model: Invertible,
    x: Tensor,
    *,
    checks: Sequence[Callable[..., AuditResult]],
    processes: int = 1,
) -> AuditResult:
    """Estimated time in seconds and memory in bytes of each check, of which none is run.

    One forward, one inverse, one linearisation and its products are timed on a few samples, their memory is metered
    on one and two. Time is the number of passes that a check is known to need (`passes`), times the time of a pass per
    sample: an estimate, too high where large batches run faster, and blind to what iterations depend on. Where the
    memory is bounded, or processes share the work, that is reckoned with.

    Args:
        model: the map.
        x: data, (B, *data).
        checks: audits, with their settings.
        processes: that would share the samples.

    Returns:
        seconds and bytes of all, a row per check in the table ``cost``.
    """
    rows = usable_rows(model, x)[:TIMED]
    if not len(rows):
        return AuditResult(
            "dry_run", Verdict.NON_FINITE, "no sample has a finite latent: nothing could be timed"
        )
    memory = shares_of(model).memory
    within = math.inf if memory is None else float(memory)
    chosen, start = model.select(rows), x[rows]
    prints = {
        measure is linearized_footprint: measure(chosen, start, within=within)
        for measure in FOOTPRINTS
    }
    if memory is not None:
        rows = rows[: prints[True].samples_within(memory)]
        chosen, start = model.select(rows), x[rows]
    seconds, missing = _timed(chosen, start)
    size = (len(x), x[0].numel(), len(model.layers()) or 1)
    known = _Known(size, x.dtype, seconds, prints, Resources(processes, memory))
    table = tuple(known.row(check) for check in checks)
    total = sum(row["seconds"] for row in table if math.isfinite(row["seconds"]))
    most = max((row["bytes"] for row in table if math.isfinite(row["bytes"])), default=math.nan)
    each = "; ".join(
        f"{row['check']} {_time(row['seconds'])}, {_size(row['bytes'])}" for row in table
    )
    unknown = "".join(f"; {kind} could not be timed: {why}" for kind, why in missing.items())
    return AuditResult(
        "dry_run",
        Verdict.NOT_APPLICABLE,
        f"nothing was measured; estimate: {_time(total)} and {_size(most)} beside model and data. {each}{unknown}",
        values={"seconds": total, "bytes": most}
        | {f"seconds_per_{kind}": seconds[kind] for kind in KINDS},
        units={"seconds": "s", "bytes": "bytes"}
        | {f"seconds_per_{kind}": "s per sample" for kind in KINDS},
        tables={"cost": table},
        settings={
            "timed_samples": len(rows),
            "dimension": size[1],
            "layers": size[2],
            "processes": processes,
        },
    )


class Resources(NamedTuple):
    """How many processes share the work, and the bytes that each may hold."""

    processes: int
    memory: float | int | None


@dataclass(frozen=True)
class _Known:
    """All that an estimate is made from."""

    size: tuple[int, int, int]  #: samples, entries of a sample, layers
    dtype: torch.dtype
    seconds: Mapping[str, float]  #: per pass of one sample
    prints: Mapping[bool, Footprint]  #: of a forward pass, and linearised
    resources: Resources

    def row(self, check: Callable[..., AuditResult]) -> dict[str, Any]:
        """The estimate for one check."""
        name, settings, together = _asked(check)
        if name not in COSTS:
            return {"check": name, "seconds": math.nan, "bytes": math.nan}
        cost = COSTS[name](Task(*self.size, settings))
        counts = asdict(cost.passes)
        seconds = cost.seconds + sum(
            counts[kind] * self.seconds[kind] for kind in KINDS if counts[kind]
        )
        ranks = self.resources.processes if together else 1
        return {
            "check": name,
            "seconds": seconds / ranks,
            "bytes": self._bytes(cost, ranks),
            **counts,
        }

    def _bytes(self, cost: Cost, ranks: int) -> float | int:
        width = torch.promote_types(self.dtype, torch.float32).itemsize
        held = self.prints[cost.linearized].plus(cost.vectors * self.size[1] * width)
        samples = math.ceil(cost.at_once / ranks)
        memory = self.resources.memory
        return held.of(samples if memory is None else min(samples, held.samples_within(memory)))


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


def _asked(check: Callable[..., AuditResult]) -> tuple[str, dict[str, Any], bool]:
    """An audit's name, its settings with their defaults, and whether all processes run it together."""
    function: Any = check.func if isinstance(check, functools.partial) else check
    given = check.keywords if isinstance(check, functools.partial) else {}
    parameters = inspect.signature(function).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
    return function.__name__, defaults | given, is_shared(check)


def _time(seconds: float | int) -> str:
    return (
        "no estimate"
        if math.isnan(seconds)
        else f"{seconds:.2g} s"
        if seconds < 100
        else f"{seconds / 60:.1f} min"
    )


def _size(count: float | int) -> str:
    if math.isnan(count):
        return "memory unknown"
    return f"{count / 2**30:.2g} GiB" if count >= 2**29 else f"{count / 2**20:.2g} MiB"

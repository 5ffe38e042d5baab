"""audit(): any model, one batch, several checks, one report."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import numbers
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.audits.advice import advise
from inn_guard.audits.batch import (
    as_batch,
    checked_batch,
    checked_domain,
    first_batch,
)
from inn_guard.audits.context import AuditContext, audited_model, uncompared_model
from inn_guard.audits.dry_run import dry_run as estimate
from inn_guard.audits.level import Level
from inn_guard.audits.priors import base_of
from inn_guard.audits.registry import AUDITS, checks_of_level
from inn_guard.audits.spec import AuditSpec
from inn_guard.core.context import Context
from inn_guard.core.invertible import Invertible
from inn_guard.core.mismatch import check_rows
from inn_guard.core.tensors import dtype_name
from inn_guard.execution.parallel import Group, WorkSharing
from inn_guard.execution.progress import ProgressBar
from inn_guard.execution.state import real_default_device, without_autocast
from inn_guard.jacobian.allocator import freed_memory_returned
from inn_guard.memory_saving import MemorySaving
from inn_guard.report.audit_report import NAMED, AuditReport
from inn_guard.report.limits import Limits
from inn_guard.report.result import AuditResult
from inn_guard.report.uses import checked_uses

__all__ = ["PATIENCE", "Check", "audit", "is_watched", "resolve_check"]

PATIENCE = 3.0  #: seconds after which a progress bar appears
DECLARED = "every model declares it"  #: why density, reconstruction and gradients count
Check = AuditSpec | Callable[..., AuditResult]


@real_default_device()
@without_autocast()
@freed_memory_returned()
def audit(  # noqa: PLR0913
    model: Any,
    x: Any,
    *,
    uses: str | Iterable[str] | None = None,
    level: Level | str = Level.STANDARD,
    checks: Iterable[str | Check] | None = None,
    context: Context = None,
    prior: Any = None,
    domain: Any = None,
    limits: Limits | None = None,
    loss: Callable[..., Tensor] | None = None,
    name: str | None = None,
    seed: int = 0,
    memory: float | int | None = None,
    group: Group | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> AuditReport:
    """Measure what a model may be used for.

    Uses are density, sampling, reconstruction, memory-saving gradients and other inputs.

    The model is run in eval mode and comes out bit for bit as it went in, also after an error. What
    NaN, Inf or exceptions the model produces is found and reported, never raised.

    Args:
        model: anything ``wrap`` accepts.
        x: data: a batch (B, *data); a tuple of tensors for a model with several inputs; or a
            DataLoader or Dataset, of which the first 256 samples are used (the first entry of each
            item, if it yields tuples).
        uses: which uses the verdict counts. Default: those that the model declares, which are
            density, reconstruction and gradients, and sampling if it has a base distribution or
            ``prior`` is given. The others are measured and shown.
        level: which checks run: "quick", "standard" or "full".
        checks: names in AUDITS, or checks themselves, in place of those of the level; preflight
            runs before them. A check that decides no use counts in the verdict if it is named here.
        context: what the model is conditioned on, one row for each sample.
        prior: where latents are drawn from for sampling: a distribution with ``sample((n,))``, or a
            function n -> latents (n, *latent). Default: the model's own base, else N(0, I).
        domain: where data can lie, if not everywhere: a constraint of torch.distributions, such as
            ``constraints.simplex``, or a function x (B, *data) -> (B,) bool. Other inputs outside
            of it are left out.
        limits: up to which figure the model is fit for a use. Default: ``Limits()``.
        loss: z -> scalar or (z, log_det) -> scalar, whose gradient is compared. Default: the
            negative log-likelihood.
        name: what the report calls the model. Default: its class.
        seed: of everything random.
        memory: bytes that a check may hold at once on top of model, data and what has the data's
            size; samples are then measured in micro-batches that fit, and where a check takes
            samples all at once, fewer of them.
        group: a torch.distributed group, as ``torch.distributed.group.WORLD``, whose processes all
            make this call with the same model and data; they share the work, and each gets the
            whole report.
        dry_run: measure nothing, but estimate time and memory of every check from one timed pass of
            each kind.
        progress: whether to show a progress bar. Default: after three seconds, in terminals and
            notebooks.

    Returns:
        an AuditReport; print it.

    Raises:
        TypeError: if x is no floating-point tensor, tuple of tensors, DataLoader or Dataset, or
            another argument has the wrong type.
        ValueError: if x is empty, has the wrong shape, dtype or device, or a use, check or level is
            unknown; or processes of the group hold different data or weights.
    """
    start = time.perf_counter()
    level = _level(level)
    chosen = checks_of_level(level) if checks is None else _named_checks(checks)
    counted_uses = None if uses is None else checked_uses(uses)
    if not isinstance(dry_run, bool) or not isinstance(progress, (bool, type(None))):
        raise TypeError(
            f"expected dry_run and progress as True or False; got {dry_run!r:.60}, {progress!r:.60}"
        )
    if not isinstance(name, (str, type(None))):
        raise TypeError(f"expected name as text; got {name!r:.60}")
    if group is not None and not isinstance(group, getattr(dist, "ProcessGroup", object)):
        raise TypeError(
            f"expected group as a torch.distributed group, got {group!r}: pass "
            "torch.distributed.group.WORLD"
        )
    parallel = WorkSharing(group, _memory(memory))
    x = first_batch(model, x)
    wrapped = _inner_map(wrap(model, context=context, x=x))
    x = as_batch(wrapped, x)
    x = checked_batch(wrapped, x).detach().clone()
    check_rows(wrapped.context, x)
    parallel.check_agreement(wrapped, x)
    if loss is not None and (not callable(loss) or isinstance(loss, type)):
        raise TypeError(
            f"expected loss as a function z -> number or (z, log_det) -> number; got {loss!r:.60}: "
            "pass loss=lambda z, log_det: (z.square().sum(1) / 2 - log_det).mean()"
        )
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"expected limits as inn_guard.Limits(...); got {limits!r}")
    audited = uncompared_model(wrapped, x) if dry_run else audited_model(wrapped, x)
    audit_context = AuditContext(
        audited,
        x,
        base_of(audited, x, prior=prior),
        limits=limits or Limits(),
        domain=checked_domain(domain, x),
        loss=loss,
        seed=_seed(seed),
        parallel=parallel,
        level=level,
    )
    if dry_run:
        results = _estimated(audit_context, chosen)
    else:
        results = _run(
            audit_context, _with_deciding(chosen, counted_uses, checks), progress=progress
        )
    counted = _counted(audit_context, counted_uses)
    settings = _settings(wrapped, audit_context, named=checks is not None)
    if not dry_run:
        settings["weights"] = _checksum(wrapped)
    settings["seconds"] = round(time.perf_counter() - start, 2)
    asked = () if checks is None else tuple(check.name for check in chosen)
    report = AuditReport(results, name or wrapped.name, settings, counted, asked)
    return dataclasses.replace(report, advice=advise(report, audit_context))


def resolve_check(check: str | Check) -> AuditSpec:
    """The check of that name; a check itself, or a function (model, x) -> AuditResult, as a check.

    Raises:
        ValueError: if there is no check of that name.
        TypeError: if it is neither a name nor a function.
    """
    if not isinstance(check, str):
        return AuditSpec.of(check)
    if check not in AUDITS:
        raise ValueError(f"expected checks out of {', '.join(AUDITS)}; got {check!r}")
    return AUDITS[check]


def _level(level: Level | str) -> Level:
    checks_of_level(level)  # refuses what is none
    return Level(level)


def _named_checks(checks: Iterable[str | Check]) -> list[AuditSpec]:
    if isinstance(checks, str):
        raise TypeError(f'expected a list of checks, got a string: pass checks=["{checks}"]')
    if not isinstance(checks, Iterable) or isinstance(checks, Tensor):
        raise TypeError(f'expected a list of checks, got {checks!r}: pass checks=["density"]')
    first = AUDITS["preflight"]
    named = [resolve_check(check) for check in checks]
    return [first, *(check for check in named if check.name != first.name)]


def _with_deciding(
    chosen: list[AuditSpec], uses: tuple[str, ...] | None, checks: object
) -> list[AuditSpec]:
    """The checks of a level with those that decide a named use; named checks stay as they are."""
    if checks is not None or uses is None:
        return chosen
    names = {check.name for check in chosen}
    needed = {check.name for check in AUDITS.values() if set(check.uses) & set(uses)}
    return [check for check in AUDITS.values() if check.name in names | needed]


def _memory(memory: float | int | None) -> float | int | None:
    if memory is None:
        return None
    if not isinstance(memory, numbers.Real) or isinstance(memory, bool) or not 0 < memory < 1e300:
        raise ValueError(
            f"expected memory as a positive number of bytes, got {memory!r}: pass memory=2e9"
        )
    return memory


def _seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"expected seed as a whole number, at least 0; got {seed!r:.60}")
    if seed >= 2**63:
        raise ValueError(f"expected seed below 2**63; got a number of {len(str(seed))} digits")
    return int(seed)


def _inner_map(model: Invertible) -> Invertible:
    """The map inside a memory-saving model, whose gradients would be compared to themselves."""
    return model.inner if isinstance(model, MemorySaving) else model


def _counted(context: AuditContext, uses: tuple[str, ...] | None) -> dict[str, str]:
    """Use -> why the verdict counts it."""
    if uses is not None:
        return dict.fromkeys(uses, NAMED)
    counted = dict.fromkeys(("density", "reconstruction", "gradients"), DECLARED)
    if context.base.declared:
        counted["sampling"] = f"the model draws from its {context.base.description}"
    return counted


def _estimated(context: AuditContext, checks: Sequence[AuditSpec]) -> tuple[AuditResult, ...]:
    alone = context.within(context.parallel.local)
    spec = AuditSpec("dry_run", "What would the audit cost?", estimate)
    spec = spec.with_settings(checks=checks, processes=context.parallel.size)
    return tuple(context.parallel.map_items([spec], lambda one: one.run(alone)))


def _run(
    context: AuditContext, checks: Sequence[AuditSpec], *, progress: bool | None
) -> tuple[AuditResult, ...]:
    """The checks' results in their order.

    All processes run together the checks that share samples; each of the others runs in one.
    """
    parallel = context.parallel
    hidden = parallel.rank > 0 or not (is_watched() if progress is None else progress)
    delay = 0.0 if progress else PATIENCE
    results: dict[int, AuditResult] = {}
    with ProgressBar(
        total=len(checks), desc="audit", delay=delay, disable=hidden, leave=False
    ) as bar:

        def one(k: int, within: AuditContext) -> AuditResult:
            bar.set_postfix_str(checks[k].name, refresh=False)
            result = checks[k].run(within)
            bar.update()
            return result

        if parallel.group is not None:
            alone = context.within(parallel.local)
            # the first one refuses what no check can do anything with
            first, *rest = [k for k, check in enumerate(checks) if not check.is_shared]
            for part in ([first], rest):
                answers = parallel.map_items(part, functools.partial(one, within=alone))
                results |= dict(zip(part, answers, strict=True))
        for k in range(len(checks)):
            if k not in results:
                results[k] = one(k, context)
    return tuple(results[k] for k in range(len(checks)))


def is_watched() -> bool:
    """Whether somebody sees a progress bar: in a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _settings(wrapped: Invertible, context: AuditContext, *, named: bool) -> dict[str, Any]:
    x = context.x
    settings = {
        "library": _library(wrapped),
        "dimensions": x[0].numel(),
        "shape": tuple(x.shape),
        "dtype": dtype_name(x.dtype),
        "device": str(x.device),
        "samples": len(x),
        "level": "chosen checks" if named else context.level.value,
        "seed": context.seed,
        "base": context.base.description,
        "inn_guard": _version("inn-guard"),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    convention = getattr(wrapped, "convention", "")
    if convention:
        settings["convention"] = convention
    if context.parallel.size > 1:
        settings["processes"] = context.parallel.size
    return settings


def _library(model: Invertible) -> str:
    """The library that the model's class comes from; "" for none in particular."""
    root = type(model.block).__module__.partition(".")[0]
    return "" if root in ("__main__", "builtins", "torch") else root


@functools.cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _checksum(model: nn.Module) -> str:
    """Of all parameters and buffers, to tell whether two reports are of the same weights."""
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(key.encode())
        if isinstance(tensor, Tensor):
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]

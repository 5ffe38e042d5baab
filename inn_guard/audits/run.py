"""audit(): any model, one batch, several checks, one report."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from typing_extensions import Unpack

from inn_guard.adapters import wrap
from inn_guard.audits import AUDITS, LEVELS, Audit, AuditReport, AuditResult, Level, polite
from inn_guard.audits.audited_model import checked_batch, is_shared
from inn_guard.audits.dry_run import dry_run
from inn_guard.core.invertible import Context, Invertible
from inn_guard.execution.parallel import Group, WorkSharing
from inn_guard.execution.state import preserve_state
from inn_guard.memory_saving import MemorySaving

__all__ = ["Running", "audit", "resolve_check"]

MAX_SAMPLES = 256  #: taken from a DataLoader; a batch is used whole
PATIENCE = 3.0  #: seconds after which a progress bar appears, on a terminal


class Running(TypedDict, total=False):
    """How an audit is run.

    Attributes:
        dry_run: measure nothing, but estimate time and memory of every check from one timed pass of each kind.
        memory: bytes that a check may hold at once beside model, data and what has the data's size; samples are then
            measured in micro-batches that fit, and where a check takes samples all at once, fewer of them.
        group: a torch.distributed group, as ``torch.distributed.group.WORLD``, whose processes all make this call with
            the same model and data; they share the work, and each gets the whole report.
    """

    dry_run: bool
    memory: float | None
    group: Group | None


def audit(
    model: Any,
    x: Any,
    *,
    context: Context = None,
    checks: Iterable[str | Audit] | None = None,
    level: Level | str = Level.STANDARD,
    loss: Callable[..., Tensor] | None = None,
    **running: Unpack[Running],
) -> AuditReport:
    """Measure how stable a model and its inverse are in floating point, at the samples in x.

    The model is run in eval mode and comes out bit for bit as it went in, also after an error. What NaN, Inf or
    exceptions the model produces is found and reported, never raised.

    Args:
        model: anything ``wrap`` accepts.
        x: data: a batch (B, *data); a tuple of tensors for a model with several inputs; or a DataLoader, of which the
            first 256 samples are used (the first entry of each item, if it yields tuples).
        context: what the model is conditioned on, row-aligned with x.
        checks: names in AUDITS, or audits themselves (``functools.partial(reconstruction, batch_size=8)``); preflight
            runs before them in any case.
        level: which checks, where ``checks`` does not say: "quick", "standard" or "full".
        loss: z -> scalar, for the checks that need one.
        running: dry_run, memory, group; see ``Running``.

    Returns:
        an AuditReport; print it.

    Raises:
        TypeError: if x is no floating-point tensor, tuple of tensors or DataLoader.
        ValueError: if x is empty, has the wrong shape, dtype or device, or a check or level is unknown; or processes of
            the group hold different data or weights.
    """
    shares = _shares(running)
    wrapped = _map(wrap(model, context=context))
    with preserve_state(wrapped):  # a DataLoader draws from the global generators
        x = _batch(wrapped, x)
    x = checked_batch(wrapped, x)
    _check_context(wrapped.context, x)
    shares.check_agreement(wrapped, x)
    chosen = [polite(_with_loss(check, loss)) for check in _chosen(checks, level)]
    start = time.perf_counter()
    with preserve_state(wrapped):
        if running.get("dry_run"):
            results = tuple(
                shares.map_items([chosen], lambda checks: _estimate(wrapped, x, checks, shares))
            )
        else:
            results = _run(chosen, wrapped, x, shares)
    settings = {
        "shape": tuple(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": str(x.device),
        "samples": len(x),
        "level": "chosen checks" if checks is not None else Level(level).value,
        "seconds": round(time.perf_counter() - start, 2),
    }
    if shares.size > 1:
        settings["processes"] = shares.size
    return AuditReport(results, wrapped.name, settings)


def _estimate(
    model: Invertible, x: Tensor, checks: Sequence[Audit], shares: WorkSharing
) -> AuditResult:
    return dry_run(model, x, checks=checks, processes=shares.size, shares=shares.local)


def _shares(running: Running) -> WorkSharing:
    if unknown := set(running) - set(Running.__annotations__):
        raise TypeError(f"audit() got unexpected arguments: {', '.join(sorted(unknown))}")
    memory = running.get("memory")
    if memory is not None and not memory > 0:
        raise ValueError(
            f"expected memory as a positive number of bytes, got {memory!r}: type memory=2e9"
        )
    return WorkSharing(running.get("group"), memory)


def _run(
    checks: Sequence[Audit], model: Invertible, x: Tensor, shares: WorkSharing
) -> tuple[AuditResult, ...]:
    """The checks' results in their order: those that share samples by all processes, each of the others by one."""
    results: dict[int, AuditResult] = {}
    quiet = True if shares.rank else None
    with tqdm(total=len(checks), desc="audit", delay=PATIENCE, disable=quiet, leave=False) as bar:

        def one(k: int, within: WorkSharing) -> AuditResult:
            bar.set_postfix_str(_name(checks[k]))
            result = checks[k](model, x, shares=within)
            bar.update()
            return result

        if shares.group is not None:
            # the first one refuses what no check can do anything with
            first, *rest = [k for k, check in enumerate(checks) if not is_shared(check)]
            for apart in ([first], rest):
                answers = shares.map_items(apart, lambda k: one(k, shares.local))
                results |= dict(zip(apart, answers, strict=True))
        results |= {k: one(k, shares) for k in range(len(checks)) if k not in results}
    return tuple(results[k] for k in range(len(checks)))


def _map(model: Invertible) -> Invertible:
    """The map itself: of a memory-saving model the one inside, else its gradients would be compared to themselves."""
    return model.model if isinstance(model, MemorySaving) else model


def _batch(model: Invertible, x: Any) -> Any:
    if isinstance(x, DataLoader):
        return _from_loader(model, x)
    if isinstance(x, (tuple, list)):
        pack: Callable[..., Tensor] | None = getattr(model, "pack", None)
        if pack is None:
            raise TypeError(
                f"expected one tensor (B, *data) for {model.name}, got a {type(x).__name__} of {len(x)}"
            )
        if (
            not all(isinstance(part, Tensor) for part in x)
            or len({len(part) for part in x if part.dim()}) > 1
        ):
            got = ", ".join(
                str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__
                for part in x
            )
            raise TypeError(
                f"expected tensors with a row for every sample, got a {type(x).__name__} of {got}"
            )
        return pack(*x)
    return x


def _from_loader(model: Invertible, loader: DataLoader) -> Tensor:
    batches: list[Tensor] = []
    for item in loader:
        batch = item[0] if isinstance(item, (tuple, list)) and item else item
        if not isinstance(batch, Tensor):
            raise TypeError(
                f"expected batches of tensors (B, *data) from the DataLoader, or tuples that begin with one; got a "
                f"{type(batch).__name__}: audit a tensor of your own choice out of it instead"
            )
        batches.append(batch)
        if sum(map(len, batches)) >= MAX_SAMPLES:
            break
    if not batches:
        raise ValueError("expected at least one batch from the DataLoader, got none")
    x = torch.cat(batches)[:MAX_SAMPLES]
    parameter = next(model.parameters(), None)
    return x if parameter is None else x.to(parameter.device)


def _check_context(context: Context, x: Tensor) -> None:
    for tensor in _tensors(context):
        if tensor.dim() == 0 or len(tensor) != len(x):
            raise ValueError(
                f"expected a context with {len(x)} rows, one per sample; got shape {tuple(tensor.shape)}"
            )


def _tensors(context: Context) -> Iterator[Tensor]:
    if isinstance(context, Tensor):
        yield context
    elif isinstance(context, (dict, list, tuple)):
        for item in context.values() if isinstance(context, dict) else context:
            yield from _tensors(item)


def _chosen(checks: Iterable[str | Audit] | None, level: Level | str) -> list[Audit]:
    if checks is None:
        return list(LEVELS[_level(level)].values())
    first = AUDITS["preflight"]
    if isinstance(checks, str):
        raise TypeError(f'expected a list of checks, got a string: type checks=["{checks}"]')
    chosen = [resolve_check(check) for check in checks]
    return [first, *(check for check in chosen if check is not first)]


def _level(level: Level | str) -> Level:
    try:
        return Level(level)
    except ValueError:
        raise ValueError(
            f"expected a level out of {', '.join(k.value for k in Level)}; got {level!r}"
        ) from None


def resolve_check(check: str | Audit) -> Audit:
    """The audit of that name; an audit itself is returned as it is.

    Raises:
        ValueError: if there is no audit of that name.
        TypeError: if it is neither a name nor a function.
    """
    if not isinstance(check, str):
        if not callable(check) or isinstance(check, type):
            raise TypeError(f"expected checks by name or as functions; got {check!r}")
        return check
    if check not in AUDITS:
        raise ValueError(f"expected checks out of {', '.join(AUDITS)}; got {check!r}")
    return AUDITS[check]


def _with_loss(check: Audit, loss: Callable[..., Tensor] | None) -> Audit:
    wanted = loss is not None and "loss" in inspect.signature(check).parameters
    return functools.partial(check, loss=loss) if wanted else check


def _name(check: Audit) -> str:
    return check.func.__name__ if isinstance(check, functools.partial) else check.__name__

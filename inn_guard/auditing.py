"""audit(): any model, one batch, several checks, one report."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from inn_guard.adapters import wrap
from inn_guard.audits import AUDITS, LEVELS, Audit, AuditReport, Level, polite
from inn_guard.audits.watched import checked_batch
from inn_guard.invertible import Context, Invertible
from inn_guard.reversible import MemorySaving
from inn_guard.untouched import untouched

__all__ = ["audit", "known_check"]

MAX_SAMPLES = 256  #: taken from a DataLoader; a batch is used whole
PATIENCE = 3.0  #: seconds after which a progress bar appears, on a terminal


def audit(
    model: Any,
    x: Any,
    *,
    context: Context = None,
    checks: Iterable[str | Audit] | None = None,
    level: Level | str = Level.STANDARD,
    loss: Callable[..., Tensor] | None = None,
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

    Returns:
        an AuditReport; print it.

    Raises:
        TypeError: if x is no floating-point tensor, tuple of tensors or DataLoader.
        ValueError: if x is empty, has the wrong shape, dtype or device, or a check or level is unknown.
    """
    wrapped = _map(wrap(model, context=context))
    with untouched(wrapped):  # a DataLoader draws from the global generators
        x = _batch(wrapped, x)
    x = checked_batch(wrapped, x)
    _check_context(wrapped.context, x)
    chosen = _chosen(checks, level)
    start = time.perf_counter()
    results = []
    with untouched(wrapped), tqdm(chosen, desc="audit", delay=PATIENCE, disable=None, leave=False) as bar:
        for check in bar:
            bar.set_postfix_str(_name(check))
            results.append(polite(_with_loss(check, loss))(wrapped, x))
    settings = {
        "shape": tuple(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": str(x.device),
        "samples": len(x),
        "level": "chosen checks" if checks is not None else Level(level).value,
        "seconds": round(time.perf_counter() - start, 2),
    }
    return AuditReport(tuple(results), wrapped.name, settings)


def _map(model: Invertible) -> Invertible:
    """The map itself: of a memory-saving model the one inside, else its gradients would be compared to themselves."""
    return model.model if isinstance(model, MemorySaving) else model


def _batch(model: Invertible, x: Any) -> Any:
    if isinstance(x, DataLoader):
        return _from_loader(model, x)
    if isinstance(x, (tuple, list)):
        pack: Callable[..., Tensor] | None = getattr(model, "pack", None)
        if pack is None:
            raise TypeError(f"expected one tensor (B, *data) for {model.name}, got a {type(x).__name__} of {len(x)}")
        if not all(isinstance(part, Tensor) for part in x) or len({len(part) for part in x if part.dim()}) > 1:
            got = ", ".join(str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in x)
            raise TypeError(f"expected tensors with a row for every sample, got a {type(x).__name__} of {got}")
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
            raise ValueError(f"expected a context with {len(x)} rows, one per sample; got shape {tuple(tensor.shape)}")


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
    chosen = [known_check(check) for check in checks]
    return [first, *(check for check in chosen if check is not first)]


def _level(level: Level | str) -> Level:
    try:
        return Level(level)
    except ValueError:
        raise ValueError(f"expected a level out of {', '.join(k.value for k in Level)}; got {level!r}") from None


def known_check(check: str | Audit) -> Audit:
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

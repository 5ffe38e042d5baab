"""A training loop that looks at the model at given steps, and continues exactly where a kill left it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.checkpoint import load_checkpoint, save_checkpoint
from benchmarks.common.runner import Row

__all__ = ["Batch", "Plan", "exact_float32", "looks_until", "train", "unfinished"]

Rate = Callable[[int], float]  #: step -> factor of the learning rate


@dataclass(frozen=True)
class Plan:
    """How long and in what order.

    Attributes:
        steps: optimiser steps.
        batch_size: rows per step; the last, smaller batch of an epoch is left out.
        looks: numbers of steps after which the model is looked at, ascending.
        rate: factor of the optimiser's learning rate at a step.
        clip: largest norm of the gradient.
        seed: of the order of the rows and of the noise.
    """

    steps: int
    batch_size: int
    looks: tuple[int, ...]
    rate: Rate = lambda step: 1.0
    clip: float = math.inf
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Row numbers of this step and a generator that depends on (seed, step) alone."""

    rows: Tensor
    step: int
    generator: torch.Generator


def looks_until(steps: int, count: int) -> tuple[int, ...]:
    """``count`` numbers of steps up to ``steps``, their distances growing: training changes most at its beginning.

    >>> looks_until(100, 4)
    (6, 25, 56, 100)
    """
    return tuple(sorted({max(1, round(steps * (k / count) ** 2)) for k in range(1, count + 1)}))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Batch], Tensor],
    *,
    plan: Plan,
    look: Callable[[], Row],
    checkpoint: Path,
    examples: int,
) -> list[Row]:
    """One row per look: step, loss, seconds of training, steps left out, and what ``look()`` returns in eval mode.

    A step whose gradient is not finite is left out: a single image whose inverse overflows makes a penalty NaN, and
    Adam never forgets it. Training ends after a look before which no step was taken, or parameters are not finite.

    Args:
        model: is trained.
        optimizer: over its parameters.
        loss: Batch -> scalar.
        plan: how long.
        look: what is measured.
        checkpoint: written after every look; a run that finds it continues from there.
        examples: number of training rows.
    """
    base = [group["lr"] for group in optimizer.param_groups]
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "skipped": 0, "rows": []}
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, model, optimizer)
    rows: list[Row] = progress["rows"]
    seconds, skipped, started = progress["seconds"], progress["skipped"], _clock()
    model.train()
    for step in range(progress["step"], plan.steps):
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * plan.rate(step)
        optimizer.zero_grad(set_to_none=True)
        value = loss(Batch(_rows(plan, step, examples), step, _generator(plan.seed, 2 * step + 1)))
        value.backward()
        if _usable(model, plan.clip):
            optimizer.step()
        else:
            skipped += 1
        if step + 1 in plan.looks:
            seconds += _clock() - started
            model.eval()
            spent = {"training_seconds": seconds, "skipped_steps": skipped}
            rows.append({"step": step + 1, "loss": value.item(), **spent, **look()})
            model.train()
            taken = step + 1 - skipped - (progress["step"] - progress["skipped"])
            if not taken or not all(
                bool(parameter.isfinite().all()) for parameter in model.parameters()
            ):
                break
            progress = {"step": step + 1, "seconds": seconds, "skipped": skipped, "rows": rows}
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(checkpoint, model, optimizer, progress=progress)
            started = _clock()
    return rows


def unfinished(config: Any, key: str) -> Path:
    """Where the checkpoint of one case of this configuration lies while it is being trained."""
    digest = hashlib.sha256(f"{type(config).__module__} {config!r} {key}".encode()).hexdigest()[:16]
    return Path("runs") / f"{digest}.safetensors"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions on a GPU without TF32, whose ten bits of mantissa would be what is measured."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield


def decayed(epochs: Sequence[int], steps_per_epoch: int) -> Rate:
    """A learning rate divided by ten at the beginning of each of these epochs."""
    return lambda step: 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in epochs)


def warmed_up(steps: int) -> Rate:
    """A learning rate that rises linearly over so many steps."""
    return lambda step: min(1.0, (step + 1) / max(1, steps))


def _usable(model: nn.Module, clip: float) -> bool:
    """Clip the gradient; False if it is not finite."""
    return bool(nn.utils.clip_grad_norm_(model.parameters(), clip).isfinite())


def _rows(plan: Plan, step: int, examples: int) -> Tensor:
    per_epoch = examples // plan.batch_size
    if per_epoch < 1:
        raise ValueError(
            f"expected at least {plan.batch_size} training images (the batch size), got {examples}"
        )
    order = torch.randperm(examples, generator=_generator(plan.seed, 2 * (step // per_epoch)))
    return order[(step % per_epoch) * plan.batch_size :][: plan.batch_size]


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(
        (seed * 0x9E3779B97F4A7C15 + stream * 0xBF58476D1CE4E5B9) % 2**63
    )


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()

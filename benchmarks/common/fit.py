"""fit: minimise a loss, with a progress bar, early stopping, and exact resume after a kill."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.common.checkpoint import load_checkpoint, save_checkpoint

__all__ = ["Batch", "FitSettings", "History", "fit"]


@dataclass(frozen=True)
class FitSettings:
    """How to train.

    Attributes:
        steps: optimiser steps in all.
        batch_size: samples per step; the last, smaller batch of an epoch is left out.
        learning_rate: of Adam.
        clip: largest norm of the gradient of all parameters together; None does not clip.
        validate_every: steps between two calls of ``validate``.
        patience: stop after this many validations without a new best; None never stops early.
        checkpoint_every: steps between two checkpoints.
        seed: of the order of the data and of every generator handed to the loss.
    """

    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    clip: float | None = None
    validate_every: int = 500
    patience: int | None = None
    checkpoint_every: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """What a loss is given at one step.

    Attributes:
        tensors: the rows of this step, one tensor for each that was given to ``fit``.
        step: 0, 1, 2 ...
        generator: on the CPU, seeded by (seed, step) alone, so that a resumed run draws the same
            noise.
    """

    tensors: tuple[Tensor, ...]
    step: int
    generator: torch.Generator

    @property
    def x(self) -> Tensor:
        """The first tensor's rows."""
        return self.tensors[0]


@dataclass
class History:
    """Losses (step, value) and validations (step, value) of a run, and how it ended."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    stopped_early: bool = False

    @property
    def best(self) -> float:
        """The smallest validation value so far; inf if there is none."""
        finite = [value for _, value in self.validations if not math.isnan(value)]
        return min(finite, default=math.inf)

    def since_best(self) -> int:
        """Validations made after the best one."""
        values = [value for _, value in self.validations]
        if self.best not in values:
            return len(values)
        return len(values) - 1 - values.index(self.best)


def fit(
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    data: tuple[Tensor, ...],
    *,
    settings: FitSettings,
    validate: Callable[[int], float] | None = None,
    checkpoint: Path | None = None,
) -> History:
    """Train ``model`` by Adam on ``loss(batch)``.

    The order of the samples and all noise depend on (seed, step) only. With ``checkpoint`` the run
    continues from that file if it is there, and gives bit for bit the weights of a run that was
    never interrupted.

    Args:
        model: its parameters that require a gradient are trained.
        loss: Batch -> scalar.
        data: tensors (n, ...) with equal n, row-aligned.
        settings: how to train.
        validate: step -> number, smaller is better; called every ``settings.validate_every`` steps,
            in eval mode.
        checkpoint: a safetensors file to write, and to resume from.

    Returns:
        History of losses (one per 1/200 of the run) and validations.

    Raises:
        ValueError: if the tensors' lengths differ or are below the batch size.
        FloatingPointError: if the loss is not finite; the checkpoint still holds the last good
            state.
    """
    lengths = [len(tensor) for tensor in data]
    if len(set(lengths)) != 1 or lengths[0] < settings.batch_size:
        raise ValueError(
            f"expected tensors of one length of at least {settings.batch_size} (the batch size), "
            f"got lengths {lengths}"
        )
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=settings.learning_rate
    )
    history = _resumed(model, optimizer, checkpoint)
    model.train()
    with tqdm(total=settings.steps, initial=history.steps, unit="step", disable=None) as bar:
        for batch in _batches(data, settings, start=history.steps):
            if history.stopped_early:
                break
            value = _step(model, loss, batch, optimizer, settings)
            history.steps = batch.step + 1
            if batch.step % max(1, settings.steps // 200) == 0:
                history.losses.append((batch.step, value))
                bar.set_postfix(loss=f"{value:.4g}")
            _after_step(model, optimizer, history, settings, validate, checkpoint)
            bar.update()
    return history


def _step(
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    settings: FitSettings,
) -> float:
    optimizer.zero_grad(set_to_none=True)
    value = loss(batch)
    if not torch.isfinite(value):
        raise FloatingPointError(
            f"the loss is {value.item()} at step {batch.step}; lower the learning rate or clip"
        )
    value.backward()
    if settings.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimizer.step()
    return value.item()


def _after_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: History,
    settings: FitSettings,
    validate: Callable[[int], float] | None,
    checkpoint: Path | None,
) -> None:
    last = history.steps == settings.steps
    if validate is not None and (last or history.steps % settings.validate_every == 0):
        model.eval()
        history.validations.append((history.steps, float(validate(history.steps))))
        model.train()
        history.stopped_early = (
            settings.patience is not None and history.since_best() >= settings.patience
        )
    if checkpoint is not None and (
        last or history.stopped_early or history.steps % settings.checkpoint_every == 0
    ):
        save_checkpoint(checkpoint, model, optimizer, progress=vars(history))


def _resumed(
    model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path | None
) -> History:
    if checkpoint is None or not checkpoint.exists():
        return History()
    progress: dict[str, Any] = load_checkpoint(checkpoint, model, optimizer)
    return History(
        losses=list(map(tuple, progress["losses"])),
        validations=list(map(tuple, progress["validations"])),
        steps=progress["steps"],
        stopped_early=progress["stopped_early"],
    )


def _batches(data: tuple[Tensor, ...], settings: FitSettings, *, start: int) -> Iterator[Batch]:
    per_epoch = len(data[0]) // settings.batch_size
    order, epoch = torch.empty(0), -1
    for step in range(start, settings.steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = torch.randperm(
                len(data[0]), generator=_generator(settings.seed, 2 * epoch), device="cpu"
            )
        rows = order[(step % per_epoch) * settings.batch_size :][: settings.batch_size]
        tensors = tuple(tensor[rows.to(tensor.device)] for tensor in data)
        yield Batch(tensors, step, _generator(settings.seed, 2 * step + 1))


def _generator(seed: int, stream: int) -> torch.Generator:
    """An own stream of numbers for each (seed, stream)."""
    return torch.Generator().manual_seed(
        (seed * 0x9E3779B97F4A7C15 + stream * 0xBF58476D1CE4E5B9) % 2**63
    )

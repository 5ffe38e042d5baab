"""Training on images: common configuration, and a loop that resumes exactly after a kill."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.common.checkpoint import load_checkpoint, save_checkpoint
from benchmarks.common.runner import Row, stem
from benchmarks.exploding_inverses.image_data import DATA, LabelledImages

Net = TypeVar("Net", bound=nn.Module)

__all__ = [
    "Batch",
    "ImageConfig",
    "Plan",
    "checkpoint_of",
    "decayed",
    "evaluation_steps",
    "exact_float32",
    "train",
    "warmed_up",
]

Rate = Callable[[int], float]  #: step -> factor of the learning rate


def constant(step: int) -> float:
    """A learning rate that stays as it is."""
    return 1.0


@dataclass(frozen=True)
class Plan:
    """How long to train and in what order.

    Attributes:
        steps: optimiser steps.
        batch_size: rows per step; the last, smaller batch of an epoch is left out.
        evaluations: numbers of steps after which the model is evaluated, ascending.
        rate: factor of the optimiser's learning rate at a step.
        clip: largest norm of the gradient.
        seed: of the order of the rows and of the noise.
    """

    steps: int
    batch_size: int
    evaluations: tuple[int, ...]
    rate: Rate = constant
    clip: float = math.inf
    seed: int = 0


@dataclass(frozen=True)
class ImageConfig:
    """What all trainings on images need. The defaults are the paper's."""

    data: str = "cifar10"  # digits or cifar10
    data_root: str = "data"  # folder of the official files
    data_name: str = "CIFAR-10"  # name of the data in the results
    train_images: int = 50_000  # number of training images, the first of the data set
    levels: int = 3  # of the nets
    blocks: int = 16  # per level
    hidden: int = 128  # channels of the networks in couplings and residual layers
    batch_size: int = 64  # of training
    learning_rate: float = 1e-3  # of the optimiser
    clip: float = math.inf  # largest norm of the gradient; the paper prints none
    device: str = "cuda"  # cpu or cuda
    channels_last: bool = True  # memory format
    seed: int = 0  # of weights, batches and noise

    def load(self, *, test: int) -> LabelledImages:
        """The training images, and the first ``test`` test images."""
        whole = DATA[self.data](Path(self.data_root))
        return whole.first(train=self.train_images, test=test)

    def on_device(self, net: Net) -> Net:
        """The net on the device, in its memory format."""
        memory_format = None
        if self.channels_last:
            memory_format = torch.channels_last
        return net.to(self.device, memory_format=memory_format)

    def contiguous(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in the memory format."""
        if self.channels_last:
            return x.contiguous(memory_format=torch.channels_last)
        return x.contiguous()

    def plan(self, steps: int, *, evaluations: int, rate: Rate) -> Plan:
        """Training for that long, with that many evaluations."""
        return Plan(
            steps=steps,
            batch_size=self.batch_size,
            evaluations=evaluation_steps(steps, evaluations),
            rate=rate,
            clip=self.clip,
            seed=self.seed,
        )

    def origin(self, data: LabelledImages) -> Row:
        """Columns that say where the images come from."""
        return {"data": self.data_name, "files": data.checksum[:12]}


@dataclass(frozen=True)
class Batch:
    """Row numbers of this step and a generator that depends on (seed, step) alone."""

    rows: Tensor
    step: int
    generator: torch.Generator


def evaluation_steps(steps: int, count: int) -> tuple[int, ...]:
    """``count`` numbers of steps up to ``steps``, closer at the beginning, when most changes.

    >>> evaluation_steps(100, 4)
    (6, 25, 56, 100)
    """
    return tuple(sorted({max(1, round(steps * (k / count) ** 2)) for k in range(1, count + 1)}))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Batch], Tensor],
    *,
    plan: Plan,
    evaluate: Callable[[], Row],
    checkpoint: Path,
    examples: int,
) -> list[Row]:
    """One row per evaluation: step, loss, seconds of training, skipped steps, and ``evaluate()``.

    A step whose gradient is not finite is skipped: a single image whose inverse overflows makes the
    penalty NaN, which would stay in Adam's state. Training ends after an evaluation before which
    every step was skipped, or if parameters are not finite.

    Args:
        model: is trained; in eval mode during an evaluation.
        optimizer: over its parameters.
        loss: Batch -> scalar.
        plan: how long.
        evaluate: what is measured.
        checkpoint: written after every evaluation; a run that finds it continues from there.
        examples: number of training rows.
    """
    base_rates = [group["lr"] for group in optimizer.param_groups]
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "skipped": 0, "rows": []}
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, model, optimizer)
    rows: list[Row] = progress["rows"]
    seconds, skipped, started = progress["seconds"], progress["skipped"], _clock()
    model.train()
    for step in range(progress["step"], plan.steps):
        for group, base in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = base * plan.rate(step)
        optimizer.zero_grad(set_to_none=True)
        value = loss(Batch(_rows(plan, step, examples), step, _generator(plan.seed, 2 * step + 1)))
        value.backward()
        if _clip_gradient(model, plan.clip):
            optimizer.step()
        else:
            skipped += 1
        if step + 1 not in plan.evaluations:
            continue
        seconds += _clock() - started
        model.eval()
        spent = {"training_seconds": seconds, "skipped_steps": skipped}
        rows.append({"step": step + 1, "loss": value.item(), **spent, **evaluate()})
        model.train()
        taken = step + 1 - skipped - (progress["step"] - progress["skipped"])
        if not taken or not _has_finite_parameters(model):
            break
        progress = {"step": step + 1, "seconds": seconds, "skipped": skipped, "rows": rows}
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(checkpoint, model, optimizer, progress=progress)
        started = _clock()
    return rows


def checkpoint_of(config: Any, key: str) -> Path:
    """Where the checkpoint of one case of this configuration lies while it is being trained."""
    name = f"{stem(type(config).__module__)} {config!r} {key}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
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
    """A learning rate that rises linearly over these steps."""
    return lambda step: min(1.0, (step + 1) / max(1, steps))


def _clip_gradient(model: nn.Module, clip: float) -> bool:
    """Clip the gradient; False if it is not finite."""
    return bool(nn.utils.clip_grad_norm_(model.parameters(), clip).isfinite())


def _has_finite_parameters(model: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


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

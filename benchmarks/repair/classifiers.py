r"""Classifiers whose inverse training has exploded, repaired by ``ig.stabilize``.

    inn-guard bench repair.classifiers --preset cpu
    inn-guard bench repair.classifiers --preset cpu --images "affine conv" --data-root FOLDER

The nets of the demo (three libraries' affine couplings on scikit-learn's digits) and affine nets on
CIFAR-10 are trained without a regularizer, which explodes their inverses
(``exploding_inverses.digits_classifier`` and ``exploding_inverses.cifar10_classifiers``). Then
they are fine-tuned for reconstruction and gradients, for at most a tenth of the steps of their
training, on the training's loss and batches. Held-out images are audited and classified before and
after. The goal is that both uses pass at no more than 0.5 points of accuracy. A second fine-tuning
of the same length without a penalty is the control of the accuracy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import inn_guard as ig
from benchmarks.common.digits import digits
from benchmarks.common.fit import Batch, FitSettings, fit
from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses import cifar10_classifiers as cifar10
from benchmarks.exploding_inverses import digits_nets
from benchmarks.exploding_inverses.image_classifiers import Run
from benchmarks.exploding_inverses.image_training import Batch as ImageBatch
from benchmarks.exploding_inverses.image_training import exact_float32

__all__ = ["PRESETS", "Config", "run"]

GOAL = 0.005  #: of the accuracy
USES = ("reconstruction", "gradients")


@dataclass(frozen=True)
class Config:
    """Which nets are trained, how long, and how they are repaired."""

    digits: tuple[str, ...] = tuple(digits_nets.NETS)
    images: tuple[str, ...] = ("affine conv", "affine shuffle")  # couplings and mixing on CIFAR-10
    seeds: int = 1
    epochs: int = 60  # on digits; the demo's are 120
    blocks: int = 16  # of the nets for digits
    width: int = 128
    image_preset: str = "cpu"  # of exploding_inverses.cifar10_classifiers, for the training
    data: str = "cifar10"
    data_root: str = "data"  # folder of the official files
    share: float = 0.1  # of the training's steps, at most as many for the repair
    looks: int = 6  # audits during a repair
    audited: int = 128  # held-out images
    learning_rate: float = 1e-3  # of training and repair


PRESETS = {
    "smoke": {
        "digits": ("plain",), "images": ("affine conv",), "seeds": 1, "epochs": 1, "blocks": 2,
        "width": 8, "image_preset": "smoke", "data": "digits", "data_root": "", "audited": 8,
        "looks": 1,
    },
    # A few minutes, digits alone; the second command above adds a net on CIFAR-10
    "cpu": {"images": (), "data_root": ""},
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A trained classifier with what its repair needs.

    Attributes:
        net: with an invertible part ``inn`` and a ``head``.
        batches: (images, labels) of the training, without end.
        test: held-out images.
        labels: of them.
        steps: of the training.
    """

    net: nn.Module
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    test: Tensor
    labels: Tensor
    steps: int


def on_digits(config: Config, name: str, seed: int) -> Trained:
    """One of the demo's nets."""
    data = digits(seed=seed)
    images, labels = data.train_images, data.train_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = digits_nets.Classifier(digits_nets.NETS[name](config.blocks, config.width))

    def loss(batch: Batch) -> Tensor:
        return cross_entropy(net(batch.tensors[0]), batch.tensors[1])

    steps = config.epochs * (len(images) // 128)
    settings = FitSettings(
        steps, 128, config.learning_rate, clip=100.0, validate_every=steps + 1, seed=seed
    )
    fit(net, loss, (images, labels), settings=settings)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(len(images), (128,), generator=generator)
            yield images[rows], labels[rows]

    return Trained(net, batches, data.test_images, data.test_labels, steps)


def on_images(config: Config, name: str, seed: int) -> Trained:
    """An unregularized net of ``exploding_inverses.cifar10_classifiers``."""
    own: dict[str, Any] = {**cifar10.PRESETS[config.image_preset], "seed": seed}
    own |= {"data": config.data, "data_root": config.data_root or "digits"}
    training = cifar10.Training.of(cifar10.Config(**own), Run.parse(f"{name} none"))
    size, examples = training.config.batch_size, len(training.data.train)
    steps = training.config.epochs * (examples // size)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        step = 0
        while True:
            rows = torch.randint(examples, (size,), generator=generator)
            yield training.inputs(ImageBatch(rows, step, generator))
            step += 1

    fine_tune(training.net, batches(), steps, training.config.learning_rate)
    test = training.normalised(training.data.test)
    return Trained(training.net, batches, test, training.data.test_labels, steps)


def fine_tune(
    net: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, learning_rate: float
) -> None:
    """Adam on the cross entropy alone, with clipped gradients."""
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    net.train()
    for _ in range(steps):
        images, labels = next(batches)
        optimizer.zero_grad()
        cross_entropy(net(images), labels).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizer.step()


@torch.no_grad()
def accuracy(net: nn.Module, trained: Trained) -> float:
    """Share of the held-out images that are classified correctly."""
    net.eval()
    correct = 0
    for images, labels in zip(trained.test.split(256), trained.labels.split(256), strict=True):
        correct += int((net(images).argmax(1) == labels).sum())
    net.train()
    return correct / len(trained.labels)


def measure(config: Config, case: tuple[str, str, int]) -> list[Row]:
    """Train one net, repair it; one row."""
    data, name, seed = case
    with exact_float32():
        make = on_digits if data == "digits" else on_images
        trained = make(config, name, seed)
        steps = max(1, round(config.share * trained.steps))
        before = accuracy(trained.net, trained)
        trained.net.train()
        steady = ig.stabilize(
            trained.net,
            trained.batches(),
            loss=lambda net, batch: cross_entropy(net(batch[0]), batch[1]),
            part=lambda net: net.inn,
            uses=USES,
            x=trained.test[: config.audited],
            steps=steps,
            every=max(1, steps // config.looks),
            learning_rate=config.learning_rate,
            seed=seed,
        )
        control = copy.deepcopy(trained.net)
        fine_tune(control, trained.batches(), steps, config.learning_rate)
        after = accuracy(steady.model, trained)
    failed = not steady.before.verdict.passed
    row: Row = {"data": data, "net": name, "seed": seed, "failed_before": failed}
    for use in USES:
        row[f"{use}_before"] = steady.before.uses[use].figure
        row[f"{use}_after"] = steady.after.uses[use].figure
    row |= {
        "verdict_before": steady.before.verdict.label,
        "verdict_after": steady.after.verdict.label,
        "share_of_training": steady.kept_step / trained.steps,
        "left_out": steady.skipped_steps,
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_control": accuracy(control, trained),
        "goal": failed and steady.passed and before - after <= GOAL,
    }
    return [row]


def run(config: Config) -> pd.DataFrame:
    """One row per net and seed."""
    seeds = range(config.seeds)
    cases = {f"digits, {n}, seed {s}": ("digits", n, s) for n in config.digits for s in seeds}
    cases |= {f"images, {n}, seed {s}": ("images", n, s) for n in config.images for s in seeds}
    frame = collect(config, cases, measure)
    failed = frame[frame["failed_before"]]
    print(
        f"{len(failed)} of {len(frame)} nets fail; of these "
        f"{int(failed['verdict_after'].isin(['stable', 'marginal']).sum())} pass after the repair, "
        f"{int(failed['goal'].sum())} at no more than {100 * GOAL} points of accuracy"
    )
    return frame


if __name__ == "__main__":
    main(__name__)

r"""Training a classifier of CIFAR-10 explodes the inverse of an affine INN; FD or NF keep it at equal accuracy.

    python -m benchmarks.exploding_inverses.cifar10_classifiers --preset cpu --data-root FOLDER

Two more committed tables, FD at every tenth step and a longer training, six and four minutes of one core:

    python -m benchmarks.exploding_inverses.cifar10_classifiers --preset cpu --data-root FOLDER \
        --runs "affine conv none,affine conv FD 1e-4,affine conv NF 1e-4" --train-images 8000 --test-images 1000 \
        --batch-size 128 --epochs 6 --fd-every 10 --fd-fraction 0.25 --reconstructed 1000 \
        --out benchmarks/results/every_tenth_step
    python -m benchmarks.exploding_inverses.cifar10_classifiers --preset cpu --data-root FOLDER \
        --runs "affine shuffle none" --train-images 8000 --epochs 12 --looks 8 --spectra 32 --reconstructed 1000 \
        --out benchmarks/results/longer

Per look at each training run: accuracy, reconstruction errors and singular values on held-out images, and the angle
between memory-saving and true gradients on training minibatches. ``their_*`` beside the last look is table 9 or 10.

The paper's setting is ``--preset paper``; every field of ``cpu`` that differs says so. What the paper leaves open:
the norm of its reconstruction error (here the Euclidean norm, mean over the images, infinite if one is), how many
images its singular values are of (here the extremes over ``spectra`` images), and the coefficients of the additive net
with shuffles (here those of the additive net with convolutions).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses.classifier_report import compare_with_paper, draw, with_theirs
from benchmarks.exploding_inverses.image_classifiers import Classifier, Run, term
from benchmarks.exploding_inverses.image_data import DATA, LabelledImages, shifted
from benchmarks.exploding_inverses.image_training import (
    Batch,
    Plan,
    decayed,
    exact_float32,
    looks_until,
    train,
    unfinished,
)
from benchmarks.exploding_inverses.table10 import TABLE_10, conclusions
from inn_guard.audits.gradient_angle import gradient_angle
from inn_guard.audits.jacobian_spectrum import jacobian_spectrum
from inn_guard.audits.round_trip import round_trip
from inn_guard.audits.thresholds import max_usable_error
from inn_guard.memory_saving import memory_saving

__all__ = ["Config", "Training", "compare_with_paper", "draw", "run"]

ARCHITECTURES = ("additive shuffle", "additive conv", "affine shuffle", "affine conv")
TABLE_9 = {
    "additive conv": ("FD 1e-3", "FD 1e-4", "FD 5e-5", "NF 1e-3", "NF 1e-4", "NF 1e-5"),
    "additive shuffle": ("FD 5e-5", "NF 1e-5"),
    "affine shuffle": ("FD 1e-3", "FD 1e-4", "FD 5e-5", "NF 1e-3", "NF 1e-4", "NF 1e-5"),
    "affine conv": ("FD 1e-3", "FD 1e-4", "NF 1e-3", "NF 1e-4", "NF 1e-5"),
}
MORE_RUNS = ("affine conv FD 1e-3", "affine conv NF 1e-3", "affine conv NF 1e-4")


def all_runs(table: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """The runs of a table, net by net, each after its unregularized one."""
    return tuple(f"{net} {run}" for net in ARCHITECTURES for run in ("none", *table[net]))


TABLE_10_RUNS = all_runs(TABLE_10)


@dataclass(frozen=True)
class Config:
    """Which nets are trained, how, and what is measured. The defaults are the paper's.

    Attributes:
        runs: "coupling mixing regularizer coefficient" of each.
        data: digits or cifar10.
        data_root: folder of the official files.
        data_name: what the results call the data.
        train_images: the first so many.
        test_images: likewise, for the accuracy.
        levels: of the net.
        blocks: per level.
        hidden: channels of the couplings' networks.
        epochs: of training.
        batch_size: of training.
        learning_rate: of Adam.
        decay_epochs: at which it is divided by ten.
        clip: largest norm of the gradient; the paper prints none.
        shift: pixels of the random crop; images are mirrored too if it is positive and ``mirrored``.
        mirrored: at random, left to right.
        fd_every: K, steps between two FD penalties; NF is part of every step.
        fd_fraction: share of the batch that FD takes.
        memory_saving: train without stored activations the regularized and the additive nets, as the paper does.
        looks: measurements in the course of a training.
        reconstructed: held-out images that are reconstructed.
        spectra: held-out images whose singular values are measured.
        angle_batches: training minibatches, of half the batch size, whose gradients are compared.
        device: cpu or cuda.
        channels_last: memory format.
        seed: of weights, batches and noise.
    """

    runs: tuple[str, ...] = all_runs(TABLE_9)
    data: str = "cifar10"
    data_root: str = "data"
    data_name: str = "CIFAR-10"
    train_images: int = 50_000
    test_images: int = 10_000
    levels: int = 3
    blocks: int = 16
    hidden: int = 128
    epochs: int = 200
    batch_size: int = 128
    learning_rate: float = 1e-4
    decay_epochs: tuple[int, ...] = (60, 120, 160)
    clip: float = math.inf
    shift: int = 4
    mirrored: bool = True
    fd_every: int = 10
    fd_fraction: float = 1.0
    memory_saving: bool = True
    looks: int = 20
    reconstructed: int = 1000
    spectra: int = 32
    angle_batches: int = 40
    device: str = "cuda"
    channels_last: bool = True
    seed: int = 0


PRESETS = {
    # Seconds, on scikit-learn's digits
    "smoke": {
        "runs": ("affine conv none", "affine shuffle FD 1e-4", "additive conv NF 1e-5"),
        "data": "digits", "data_name": "digits", "train_images": 64, "test_images": 32, "levels": 2,
        "blocks": 1, "hidden": 4, "epochs": 2, "batch_size": 32, "decay_epochs": (1,), "shift": 1,
        "mirrored": False, "fd_every": 2, "looks": 2, "reconstructed": 16, "spectra": 2,
        "angle_batches": 1, "device": "cpu",
    },
    # A quarter of an hour of one core: table 10 and three more coefficients of table 9.
    # Fewer images and epochs, smaller net and batch, Adam 1e-3, clipped gradients. Between two penalties the weights
    # move as far in one step of that rate as in ten of the paper's, hence K = 1, on an eighth of the batch.
    "cpu": {
        "runs": (*TABLE_10_RUNS, *MORE_RUNS),
        "data_name": "CIFAR-10 (JPEG copies)", "train_images": 5000, "test_images": 2000,
        "blocks": 4, "hidden": 32, "epochs": 4, "batch_size": 64, "learning_rate": 1e-3,
        "decay_epochs": (), "clip": 10.0, "fd_every": 1, "fd_fraction": 0.125,
        "memory_saving": False, "looks": 5, "reconstructed": 500, "spectra": 8, "angle_batches": 2,
        "device": "cpu",
    },
    "paper": {},  # Tables 8 and 9, for a GPU
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """One net, its data on the device, and how a batch becomes inputs.

    Attributes:
        config: of the experiment.
        run: of the net.
        net: the classifier.
        data: first images.
        moments: mean and deviation of their channels.
    """

    config: Config
    run: Run
    net: Classifier
    data: LabelledImages
    moments: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, config: Config, run: Run) -> Training:
        """A fresh net; its ActNorms are set by the first batch of images."""
        data = DATA[config.data](Path(config.data_root)).first(
            train=config.train_images, test=config.test_images
        )
        net = Classifier(
            run,
            data.shape,
            levels=config.levels,
            blocks=config.blocks,
            hidden=config.hidden,
            seed=config.seed,
        )
        net = net.to(
            config.device, memory_format=torch.channels_last if config.channels_last else None
        )
        data = data.to(config.device)
        training = cls(config, run, net, data, data.moments())
        with torch.no_grad():
            net.inn(training.normalised(training.data.train[: config.batch_size]))
        return training

    def normalised(self, pixels: Tensor) -> Tensor:
        """Zero mean and unit variance per channel of the training images."""
        mean, deviation = self.moments
        x = (pixels.float() - mean) / deviation
        return (
            x.contiguous(memory_format=torch.channels_last)
            if self.config.channels_last
            else x.contiguous()
        )

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Augmented images and labels."""
        rows = batch.rows.to(self.data.train.device)
        pixels = shifted(
            self.data.train[rows],
            reach=self.config.shift,
            mirrored=self.config.mirrored,
            generator=batch.generator,
        )
        return self.normalised(pixels), self.data.train_labels[rows]

    def loss(self) -> Callable[[Batch], Tensor]:
        """Cross entropy and the regularizer's term."""
        config, saves = self.config, self.config.memory_saving and self.run.reversible
        inn = memory_saving(self.net.inn) if saves else self.net.inn
        penalised = term(self.run, every=config.fd_every, fraction=config.fd_fraction)

        def loss(batch: Batch) -> Tensor:
            x, labels = self.inputs(batch)
            z, penalty = penalised.latents(inn, x, batch)
            return cross_entropy(self.net.head(z), labels) + penalty

        return loss

    def look(self) -> Row:
        """Everything that is measured on a net."""
        test = self.normalised(
            self.data.test[: max(self.config.reconstructed, self.config.spectra)]
        )
        return {
            "test_accuracy": self.accuracy(),
            **self.reconstruction(test[: self.config.reconstructed]),
            **self.spectrum(test[: self.config.spectra]),
            **self.angles(),
        }

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the test images."""
        parts = zip(self.data.test.split(256), self.data.test_labels.split(256), strict=True)
        correct = sum(
            int((self.net(self.normalised(x)).argmax(1) == labels).sum()) for x, labels in parts
        )
        return correct / len(self.data.test)

    def reconstruction(self, x: Tensor) -> Row:
        """Euclidean errors of F^-1(F(x)), how many are not finite, and whether all are usable."""
        trip = round_trip(self.net.inn, x, batch_size=256)
        l2 = torch.where(trip.finite, trip.l2, torch.full_like(trip.l2, math.inf))
        return {
            "reconstruction_error": l2.mean().item(),
            "median_reconstruction_error": l2.median().item(),
            "worst_reconstruction_error": l2.max().item(),
            "broken_images": int((~trip.finite).sum()),
            "invertible": bool((trip.finite & (trip.relative <= max_usable_error(x.dtype))).all()),
        }

    def spectrum(self, x: Tensor) -> Row:
        """ExtremeSingularValues over the images, and the median image's condition number."""
        found = jacobian_spectrum(self.net.inn, x, samples=len(x), tolerance=0.02)
        middle = (
            found.per_sample["condition_number"].median().item() if found.per_sample else math.nan
        )
        names = ("condition_number", "sigma_min", "sigma_max")
        return {
            "median_condition_number": middle,
            **{name: found.values.get(name, math.nan) for name in names},
        }

    def angles(self) -> Row:
        """Angles between memory-saving and true gradients of the cross entropy over the trunk's parameters."""
        size, rows = self.config.batch_size // 2, []
        head = copy.deepcopy(
            self.net.head
        ).train()  # with the statistics of the batch, as in training
        for k in range(self.config.angle_batches):
            x, labels = (
                part[k * size :][:size] for part in (self.data.train, self.data.train_labels)
            )
            found = gradient_angle(
                self.net.inn,
                self.normalised(x),
                loss=lambda z, y=labels: cross_entropy(head(z), y),
                batch_size=size,
            )
            rows.append(found.values["mean_angle"])
        angles = torch.tensor(rows, dtype=torch.float64)
        return {
            "mean_angle": angles.mean().item(),
            "worst_angle": math.nan if bool(angles.isnan().any()) else angles.max().item(),
            "broken_gradients": int(angles.isnan().sum()),
        }


def measure(config: Config, case: Run) -> list[Row]:
    """Train one net; one row per look."""
    training = Training.of(config, case)
    per_epoch = len(training.data.train) // config.batch_size
    plan = Plan(
        steps=config.epochs * per_epoch,
        batch_size=config.batch_size,
        looks=looks_until(config.epochs * per_epoch, config.looks),
        rate=decayed(config.decay_epochs, per_epoch),
        clip=config.clip,
        seed=config.seed,
    )
    checkpoint = unfinished(config, repr(case))
    with exact_float32():
        rows = train(
            training.net,
            torch.optim.Adam(training.net.parameters(), config.learning_rate),
            training.loss(),
            plan=plan,
            look=training.look,
            checkpoint=checkpoint,
            examples=len(training.data.train),
        )
    checkpoint.unlink(missing_ok=True)
    about = {"coupling": case.coupling, "mixing": case.mixing, "regularizer": case.regularizer}
    source = {"data": config.data_name, "files": training.data.checksum[:12]}
    return [{**about, "coefficient": case.coefficient, **row, **source} for row in rows]


def run(config: Config) -> pd.DataFrame:
    """All runs, with the paper's figures in the last row of each."""
    frame = with_theirs(collect(config, {text: Run.parse(text) for text in config.runs}, measure))
    print(conclusions(frame).to_string(index=False))
    return frame


if __name__ == "__main__":
    main(__name__)

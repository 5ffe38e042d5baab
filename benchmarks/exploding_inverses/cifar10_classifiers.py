r"""Training on CIFAR-10 explodes the inverse of an affine INN; FD or NF keep it.

    inn-guard bench exploding_inverses.cifar10_classifiers --preset cpu --data-root FOLDER

Two more committed tables, FD at every tenth step and a longer training, six and four minutes of one
core:

    inn-guard bench exploding_inverses.cifar10_classifiers --preset cpu --data-root FOLDER \
        --runs "affine conv none,affine conv FD 1e-4,affine conv NF 1e-4" \
        --train-images 8000 --test-images 1000 --batch-size 128 --epochs 6 \
        --fd-every 10 --fd-fraction 0.25 --reconstructed 1000 \
        --out benchmarks/results/every_tenth_step
    inn-guard bench exploding_inverses.cifar10_classifiers --preset cpu --data-root FOLDER \
        --runs "affine shuffle none" --train-images 8000 --epochs 12 --looks 8 --spectra 32 \
        --reconstructed 1000 --out benchmarks/results/longer

Per evaluation during each training: accuracy, reconstruction errors and singular values on held-out
images, and the angle between memory-saving and true gradients on training minibatches. The last
row of each run has the figures of table 9 in the columns ``paper_*``.

The paper's setting is ``--preset paper``; every field of ``cpu`` that differs says so. What the
paper leaves open: the norm of its reconstruction error (here the Euclidean norm, mean over the
images, infinite if one is), how many images its singular values are of (here the extremes over
``spectra`` images), and the coefficients of the additive net with shuffles (here those of the
additive net with convolutions).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses.classifier_report import (
    compare_with_paper,
    draw,
    with_paper_columns,
)
from benchmarks.exploding_inverses.image_classifiers import Classifier, Run, term
from benchmarks.exploding_inverses.image_data import LabelledImages, shifted
from benchmarks.exploding_inverses.image_training import (
    Batch,
    ImageConfig,
    checkpoint_of,
    decayed,
    exact_float32,
    train,
)
from benchmarks.exploding_inverses.stability import (
    condition_numbers,
    euclidean_errors,
    spectrum_row,
)
from benchmarks.exploding_inverses.table10 import TABLE_10, conclusions
from inn_guard.audits.gradient_angle import gradient_angle
from inn_guard.audits.jacobian_spectrum import jacobian_spectrum
from inn_guard.audits.round_trip import round_trip
from inn_guard.audits.thresholds import max_usable_error
from inn_guard.memory_saving import memory_saving

__all__ = ["PRESETS", "Config", "Training", "compare_with_paper", "draw", "run"]

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
class Config(ImageConfig):
    """Which nets are trained, how, and what is measured. The defaults are the paper's."""

    runs: tuple[str, ...] = all_runs(TABLE_9)  # "coupling mixing regularizer coefficient" of each
    test_images: int = 10_000  # number of test images, for the accuracy
    epochs: int = 200  # of training
    batch_size: int = 128
    learning_rate: float = 1e-4
    # at which the learning rate of Adam is divided by ten
    decay_epochs: tuple[int, ...] = (60, 120, 160)
    shift: int = 4  # pixels of the random crop
    mirrored: bool = True  # whether images are mirrored at random, left to right
    fd_every: int = 10  # K, steps between two FD penalties; NF is part of every step
    fd_fraction: float = 1.0  # share of the batch that FD takes
    # train the regularized and the additive nets without stored activations
    memory_saving: bool = True
    looks: int = 20  # number of evaluations during a training
    reconstructed: int = 1000  # held-out images that are reconstructed
    spectra: int = 32  # held-out images whose singular values are measured
    # training minibatches, of half the batch size, whose gradients are compared
    angle_batches: int = 40


PRESETS = {
    # Seconds, on scikit-learn's digits
    "smoke": {
        "runs": ("affine conv none", "affine shuffle FD 1e-4", "additive conv NF 1e-5"),
        "data": "digits", "data_name": "digits", "train_images": 64, "test_images": 32, "levels": 2,
        "blocks": 1, "hidden": 4, "epochs": 2, "batch_size": 32, "decay_epochs": (1,), "shift": 1,
        "mirrored": False, "fd_every": 2, "looks": 2, "reconstructed": 16, "spectra": 2,
        "angle_batches": 1, "device": "cpu",
    },
    # A quarter of an hour of one core: table 10 and three more coefficients of table 9. Fewer
    # images and epochs, smaller net and batch, Adam 1e-3, clipped gradients. Between two penalties
    # the weights move as far in one step of that rate as in ten of the paper's, hence K = 1, on an
    # eighth of the batch.
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
        data = config.load(test=config.test_images)
        net = Classifier(
            run,
            data.shape,
            levels=config.levels,
            blocks=config.blocks,
            hidden=config.hidden,
            seed=config.seed,
        )
        net, data = config.on_device(net), data.to(config.device)
        training = cls(config, run, net, data, data.moments())
        with torch.no_grad():
            net.inn(training.normalised(data.train[: config.batch_size]))
        return training

    def normalised(self, pixels: Tensor) -> Tensor:
        """Zero mean and unit variance per channel of the training images."""
        mean, deviation = self.moments
        return self.config.contiguous((pixels.float() - mean) / deviation)

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
        config, inn = self.config, self.net.inn
        if config.memory_saving and self.run.reversible:
            inn = memory_saving(inn)
        penalised = term(self.run, every=config.fd_every, fraction=config.fd_fraction)

        def loss(batch: Batch) -> Tensor:
            x, labels = self.inputs(batch)
            z, penalty = penalised.latents(inn, x, batch)
            return cross_entropy(self.net.head(z), labels) + penalty

        return loss

    def evaluate(self) -> Row:
        """Everything that is measured on a net."""
        n_reconstructed, n_spectra = self.config.reconstructed, self.config.spectra
        test = self.normalised(self.data.test[: max(n_reconstructed, n_spectra)])
        return {
            "test_accuracy": self.accuracy(),
            **self.reconstruction(test[:n_reconstructed]),
            **self.spectrum(test[:n_spectra]),
            **self.angles(),
        }

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the test images that are classified correctly."""
        correct = 0
        for pixels, labels in zip(
            self.data.test.split(256), self.data.test_labels.split(256), strict=True
        ):
            predicted = self.net(self.normalised(pixels)).argmax(1)
            correct += int((predicted == labels).sum())
        return correct / len(self.data.test)

    def reconstruction(self, x: Tensor) -> Row:
        """Euclidean errors of F^-1(F(x)), how many are not finite, and whether all are usable."""
        trip = round_trip(self.net.inn, x, batch_size=256)
        errors = euclidean_errors(trip)
        usable = trip.finite & (trip.relative <= max_usable_error(x.dtype))
        return {
            "reconstruction_error": errors.mean().item(),
            "median_reconstruction_error": errors.median().item(),
            "worst_reconstruction_error": errors.max().item(),
            "broken_images": int((~trip.finite).sum()),
            "invertible": bool(usable.all()),
        }

    def spectrum(self, x: Tensor) -> Row:
        """The extreme singular values over the images, and the median condition number."""
        found = jacobian_spectrum(self.net.inn, x, samples=len(x), tolerance=0.02)
        median = condition_numbers(found).median().item()
        return {"median_condition_number": median, **spectrum_row(found)}

    def angles(self) -> Row:
        """Angles between memory-saving and true gradients over the trunk's parameters."""
        size, angles = self.config.batch_size // 2, []
        # with the statistics of the batch, as in training
        head = copy.deepcopy(self.net.head).train()
        for start in range(0, size * self.config.angle_batches, size):
            labels = self.data.train_labels[start:][:size]
            found = gradient_angle(
                self.net.inn,
                self.normalised(self.data.train[start:][:size]),
                loss=lambda z, y=labels: cross_entropy(head(z), y),
                batch_size=size,
            )
            angles.append(found.values["mean_angle"])
        degrees = torch.tensor(angles, dtype=torch.float64)
        return {
            "mean_angle": degrees.mean().item(),
            "worst_angle": degrees.max().item(),
            "broken_gradients": int(degrees.isnan().sum()),
        }


def measure(config: Config, case: Run) -> list[Row]:
    """Train one net; one row per evaluation."""
    training = Training.of(config, case)
    per_epoch = len(training.data.train) // config.batch_size
    rate = decayed(config.decay_epochs, per_epoch)
    checkpoint = checkpoint_of(config, repr(case))
    with exact_float32():
        rows = train(
            training.net,
            torch.optim.Adam(training.net.parameters(), config.learning_rate),
            training.loss(),
            plan=config.plan(config.epochs * per_epoch, evaluations=config.looks, rate=rate),
            evaluate=training.evaluate,
            checkpoint=checkpoint,
            examples=len(training.data.train),
        )
    checkpoint.unlink(missing_ok=True)
    about = dataclasses.asdict(case)
    return [{**about, **row, **config.origin(training.data)} for row in rows]


def run(config: Config) -> pd.DataFrame:
    """All runs, with the paper's figures in the last row of each."""
    cases = {text: Run.parse(text) for text in config.runs}
    frame = with_paper_columns(collect(config, cases, measure))
    print(conclusions(frame).to_string(index=False))
    return frame


if __name__ == "__main__":
    main(__name__)

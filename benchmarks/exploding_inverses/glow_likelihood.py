"""Glow by maximum likelihood: is its inverse there on data, on its own samples, and on images that are no data.

    python -m benchmarks.exploding_inverses.glow_likelihood --preset cpu --data-root FOLDER

Per look at the training of an affine and of an additive Glow: bits per dimension, squared Euclidean reconstruction
errors in [-0.5, 0.5], condition numbers and samples. At the last look one row for each family of inputs: data, samples
(latents from the prior at temperature 1), noise, constants and so on, digits of MNIST where its files are there.

What the paper leaves open: how many epochs. It takes photographs of textures and other data sets for its families; here
they are made from the data, and MNIST's digits stand for another data set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common.image_files import read_mnist
from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses.flow_report import draw, grid
from benchmarks.exploding_inverses.image_classifiers import COUPLINGS
from benchmarks.exploding_inverses.image_data import DATA
from benchmarks.exploding_inverses.image_flows import Augmentation, FlowTraining
from benchmarks.exploding_inverses.image_training import (
    Plan,
    exact_float32,
    looks_until,
    train,
    unfinished,
    warmed_up,
)
from inn_guard.audits.jacobian_spectrum import jacobian_spectrum
from inn_guard.audits.out_of_distribution.audit import out_of_distribution
from inn_guard.audits.round_trip import round_trip
from inn_guard.execution.files import atomic_write
from inn_guard.layers.chain import Chain
from inn_guard.layers.permutation import Permutation
from inn_guard.memory_saving import memory_saving
from inn_guard.models.glow import GlowConfig, glow_flow
from inn_guard.report.result import AuditResult

GRID = 10  #: images in a row


@dataclass(frozen=True)
class Config:
    """Which Glows, how they are trained, and what is measured. The defaults are the paper's.

    Attributes:
        couplings: affine, additive.
        data: digits or cifar10.
        data_root: folder of the official files.
        data_name: what the results call the data.
        train_images: the first so many.
        levels: of the net; half of the channels is factored out between them.
        blocks: per level.
        hidden: channels of the couplings' networks.
        steps: of Adamax.
        batch_size: of training.
        learning_rate: of Adamax.
        weight_decay: of Adamax.
        warmup: steps over which the rate rises.
        shift: pixels of the random translation.
        clip: largest norm of the gradient; the paper prints none.
        memory_saving: train without stored activations.
        looks: measurements in the course of a training.
        evaluated: test images for likelihoods and reconstructions.
        spectra: test images whose singular values are measured.
        outside: inputs per family.
        device: cpu or cuda.
        channels_last: memory format.
        grids: folder for a picture of reconstructions and samples of each net; "" draws none.
        seed: of weights, batches and noise.
    """

    couplings: tuple[str, ...] = ("affine", "additive")
    data: str = "cifar10"
    data_root: str = "data"
    data_name: str = "CIFAR-10"
    train_images: int = 50_000
    levels: int = 3
    blocks: int = 32
    hidden: int = 512
    steps: int = 78_100
    batch_size: int = 64
    learning_rate: float = 5e-4
    weight_decay: float = 5e-5
    warmup: int = 3905
    shift: int = 3
    clip: float = math.inf
    memory_saving: bool = False
    looks: int = 20
    evaluated: int = 1000
    spectra: int = 16
    outside: int = 32
    device: str = "cuda"
    channels_last: bool = True
    grids: str = "benchmarks/results"
    seed: int = 0


PRESETS = {
    # Seconds, on scikit-learn's digits
    "smoke": {
        "couplings": ("affine",), "data": "digits", "data_name": "digits", "train_images": 64,
        "levels": 2, "blocks": 1, "hidden": 4, "steps": 4, "batch_size": 16, "warmup": 2,
        "shift": 1, "looks": 2, "evaluated": 8, "spectra": 2, "outside": 2, "device": "cpu",
        "grids": "",
    },
    # Two minutes of one core: small nets, few steps at a higher rate
    "cpu": {
        "data_name": "CIFAR-10 (JPEG copies)", "train_images": 10_000, "blocks": 4, "hidden": 32,
        "steps": 300, "batch_size": 32, "learning_rate": 5e-3, "warmup": 50, "looks": 5,
        "evaluated": 128, "spectra": 8, "outside": 8, "device": "cpu",
    },
    "paper": {},  # Table 6, 100 epochs, for a GPU
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One Glow and what it is measured on, in [-0.5, 0.5]."""

    config: Config
    net: Chain
    training: FlowTraining

    def look(self) -> Row:
        """Likelihood, reconstructions, spectrum and samples."""
        config = self.config
        x = self.tests(config.evaluated)
        trip = round_trip(self.net, x, batch_size=64)
        squared = torch.where(trip.finite, trip.l2.square(), torch.full_like(trip.l2, math.inf))
        found = jacobian_spectrum(self.net, x, samples=config.spectra, tolerance=0.02)
        middle = (
            found.per_sample["condition_number"].nanmedian().item()
            if found.per_sample
            else math.nan
        )
        names = ("condition_number", "sigma_min", "sigma_max")
        return {
            "bits_per_dimension": self.training.bits(self.net, count=config.evaluated),
            "squared_error": squared.mean().item(),
            "worst_squared_error": squared.max().item(),
            "broken_images": int((~trip.finite).sum()),
            "median_condition_number": middle,
            **{name: found.values.get(name, math.nan) for name in names},
        }

    def outside(self) -> AuditResult:
        """The families of inputs."""
        x = self.tests(self.config.outside)
        return out_of_distribution(
            self.net, x, others=self.others(x), samples=len(x), spectrum_samples=0
        )

    def tests(self, count: int) -> Tensor:
        """The first test images, dequantized."""
        generator = torch.Generator().manual_seed(1)
        return self.training.dequantized(self.training.data.test[:count], generator)

    def others(self, x: Tensor) -> dict[str, Tensor]:
        """MNIST's digits as colour images, where its files are there."""
        if self.config.data != "cifar10" or not (Path(self.config.data_root) / "MNIST").is_dir():
            return {}
        digits = read_mnist(Path(self.config.data_root), train=False).pixels[: len(x)].copy()
        padded = functional.pad(torch.as_tensor(digits), [2] * 4).expand(-1, 3, -1, -1).to(x.device)
        return {"MNIST": self.training.dequantized(padded, torch.Generator().manual_seed(2))}

    @torch.no_grad()
    def samples(self, count: int) -> Tensor:
        """F^-1(z), z ~ N(0, I)."""
        dims = self.training.data.train[0].numel()
        z = torch.randn(count, dims, generator=torch.Generator().manual_seed(3))
        return self.net.inverse(z.to(next(self.net.parameters())))

    def pictures(self, found: AuditResult) -> dict[str, Tensor]:
        """Title -> images in [0, 1]: test images, samples, and the worst input of each family as the table has them."""
        x = self.tests(GRID)
        groups = {
            "test images": x,
            "their reconstructions": round_trip(self.net, x, batch_size=64).end,
        }
        groups["samples"] = self.samples(2 * GRID)
        for key, title in (
            ("input", "the worst of each family"),
            ("reconstruction", "their reconstructions "),
        ):
            if key in found.images:
                groups[title] = found.images[key][:GRID]
        return {title: images.cpu() + 0.5 for title, images in groups.items()}


def measure(config: Config, coupling: str) -> Iterator[Row]:
    """Train one Glow; one row per look, then one per family."""
    measured = fresh(config, coupling)
    plan = Plan(
        steps=config.steps,
        batch_size=config.batch_size,
        looks=looks_until(config.steps, config.looks),
        rate=warmed_up(config.warmup),
        clip=config.clip,
        seed=config.seed,
    )
    net, checkpoint = measured.net, unfinished(config, coupling)
    differentiated = memory_saving(net) if config.memory_saving else net
    optimizer = torch.optim.Adamax(
        net.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    with exact_float32():
        rows = train(
            net,
            optimizer,
            lambda batch: measured.training.loss(differentiated, batch),
            plan=plan,
            look=measured.look,
            checkpoint=checkpoint,
            examples=len(measured.training.data.train),
        )
        found = measured.outside()
    source = {"data": config.data_name, "files": measured.training.data.checksum[:12]}
    yield from ({"coupling": coupling, "family": "", **row, **source} for row in rows)
    for family in found.tables.get("families", ()):
        yield {"coupling": coupling, "step": rows[-1]["step"], **family, **source}
    if config.grids:
        save_grid(
            Path(config.grids) / f"exploding_inverses_glow_{coupling}.png", measured.pictures(found)
        )
    checkpoint.unlink(missing_ok=True)


def fresh(config: Config, coupling: str) -> Measured:
    """A net whose ActNorms are set by the first images."""
    data = DATA[config.data](Path(config.data_root)).first(
        train=config.train_images, test=config.evaluated
    )
    glow = GlowConfig(
        config.levels,
        config.blocks,
        config.hidden,
        coupling=COUPLINGS[coupling],
        mixing=Permutation.reverse,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = glow_flow(data.shape, config=glow)
    net = net.to(config.device, memory_format=torch.channels_last if config.channels_last else None)
    augmentation = Augmentation(config.shift, mirrored=config.data == "cifar10")
    training = FlowTraining(data.to(config.device), -0.5, augmentation, config.channels_last)
    first = training.data.train[: max(config.batch_size, 16)]
    with torch.no_grad():
        net(training.dequantized(first, torch.Generator().manual_seed(config.seed)))
    return Measured(config, net, training)


def save_grid(path: Path, pictures: dict[str, Tensor]) -> None:
    """The pictures as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        grid(pictures, columns=GRID).savefig(partial, dpi=90, bbox_inches="tight", format="png")


def run(config: Config) -> pd.DataFrame:
    """All couplings."""
    return collect(config, {coupling: coupling for coupling in config.couplings}, measure)


if __name__ == "__main__":
    main(__name__)

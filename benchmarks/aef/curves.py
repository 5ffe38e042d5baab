"""Bits per dimension of autoencoders within flows and of identical VAEs during training.

    inn-guard bench aef.curves --preset cpu --root FOLDER

The likelihood of both is importance-sampled around the mode of p(z | x) (``laplace.py``); that
proposal's effective draws are in the table, in the last row with those of the paper's protocol:
an isotropic proposal around h(x) for the AEF, the encoder's posterior for the VAE. Differences to
the VAE are of the same images, with the standard error of their mean. The same estimate on as many
training images shows when a model begins to learn them by heart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.aef import against_vae
from benchmarks.aef.against_vae import standard_error
from benchmarks.aef.laplace import laplace_log_prob
from benchmarks.aef.training import Case
from benchmarks.common.metrics import bits_per_dimension, dequantize
from benchmarks.common.quantized_images import QuantizedImages
from benchmarks.common.runner import Row, collect, main
from inn_guard.models.aef.expanded import ExpandedAutoencoder


@dataclass(frozen=True)
class Config(against_vae.Config):
    """As for ``against_vae``, without partitions, whose likelihood is exact there."""

    dataset: str = "mnist"
    models: tuple[str, ...] = ("VAE", "AEF linear", "AEF spread")
    latents: tuple[int, ...] = (2, 32)
    spreads: tuple[float, ...] = (0.1,)
    steps: int = 2400
    test_images: int = 100
    draws: int = 64
    repetitions: int = 8
    looks: int = 4  # number of evaluations of each model, the last one at the end of its training


PRESETS = {
    "smoke": {
        "dataset": "digits", "latents": (2,), "steps": 4, "channels": (4, 4), "hidden": 8,
        "test_images": 4, "draws": 8, "repetitions": 2, "looks": 2,
    },
    "cpu": {},  # 25 minutes of one core, MNIST's test images
    # The setting of Table 1 on MNIST
    "paper": {
        "train_files": True, "latents": (2, 4, 8, 16, 32), "seeds": (0, 1, 2, 3, 4),
        "steps": 100_000, "channels": (64, 128), "hidden": 256, "test_images": 1000, "looks": 20,
    },
}  # fmt: skip


def cases(config: Config) -> dict[str, tuple[int, int]]:
    """Every latent dimension under every seed; the models of a case share their test images."""
    return {
        f"{config.dataset} d={latent} seed={seed}": (latent, seed)
        for latent in config.latents
        for seed in config.seeds
    }


def run(config: Config) -> pd.DataFrame:
    """All models of all latent dimensions."""
    return collect(config, cases(config), measure)


def measure(config: Config, case: tuple[int, int]) -> Iterator[Row]:
    """Rows of every evaluation of every model of one latent dimension."""
    latent, seed = case
    data = against_vae.load(config.dataset, config.root, config.train_files)
    first: dict[int, Tensor] = {}
    for model in config.models:
        evaluator = Evaluator(config, data, seed)
        spread = 0.0
        if model == "AEF spread":
            spread = config.spreads[0]
        against_vae.trained(
            config,
            Case(model, latent, seed),
            data,
            spread=spread,
            evaluations=against_vae.Evaluations(config.looks, evaluator),
        )
        for step, (row, bits) in evaluator.found.items():
            difference = bits - first.setdefault(step, bits)
            yield {
                "dataset": data.name,
                "model": model,
                "latent": latent,
                "seed": seed,
                "step": step,
                **row,
                f"less_than_{config.models[0]}": -difference.mean().item(),
                "difference_error": standard_error(difference),
            }


class Evaluator:
    """Measures a model when it is called during training, and keeps the results.

    Args:
        config: how many images and draws.
        data: the images.
        seed: of the noise, the same for every model.
    """

    def __init__(self, config: Config, data: QuantizedImages, seed: int) -> None:
        self._config, self._data, self._seed = config, data, seed
        self.found: dict[int, tuple[Row, Tensor]] = {}

    def __call__(self, model: against_vae.Model, step: int) -> float:
        """Bits per dimension of the test images."""
        assert isinstance(model, ExpandedAutoencoder)
        config, data = self._config, self._data
        noise = torch.Generator().manual_seed(3000 + self._seed)
        cells = torch.Generator().manual_seed(4000 + self._seed)
        row: Row = {}
        for name, pixels in (("train", data.train), ("test", data.test)):
            x = dequantize(pixels[: config.test_images], generator=cells, levels=data.levels)
            estimate = laplace_log_prob(
                model, x, draws=config.draws, repetitions=config.repetitions, generator=noise
            )
            bits = self._bits(estimate.log_prob)
            row |= {f"bpd_{name}": bits.mean().item(), f"bpd_{name}_error": standard_error(bits)}
        row |= {
            "bpd_test_upper": self._bits(estimate.lower_bound).mean().item(),
            "effective_draws": estimate.effective_draws.median().item(),
            "sigma": model.flow.sigma().log().mean().exp().item(),
        }
        if step == config.steps:
            row |= self._by_the_paper(model, x, noise)
        self.found[step] = row, bits
        return row["bpd_test"]

    def _by_the_paper(self, model: ExpandedAutoencoder, x: Tensor, noise: torch.Generator) -> Row:
        """Bits and effective draws by the paper's protocol."""
        (estimate,) = against_vae.tuned_importance(
            self._config, model, self._data, x, noise, rows=len(x)
        )
        return {
            "bpd_paper": self._bits(estimate.log_prob).mean().item(),
            "effective_draws_paper": estimate.effective_draws.median().item(),
        }

    def _bits(self, log_prob: Tensor) -> Tensor:
        return bits_per_dimension(log_prob, dims=self._data.dims, levels=self._data.levels)


def draw(frame: pd.DataFrame) -> Figure:
    """Bits per dimension of test and training images (dotted) against steps, a panel per d."""
    latents = sorted(frame["latent"].unique())
    figure = Figure(figsize=(4.6 * len(latents), 3.6), layout="constrained")
    panels = figure.subplots(1, len(latents), squeeze=False)[0]
    for axes, latent in zip(panels, latents, strict=True):
        rows = frame[frame["latent"] == latent]
        for colour, (model, own) in enumerate(rows.groupby("model", sort=False)):
            means = own.groupby("step")[["bpd_test", "bpd_train"]].mean()
            curve = partial(axes.plot, means.index, color=f"C{colour}")
            curve(means["bpd_test"], "o-", label=model)
            curve(means["bpd_train"], ":", alpha=0.8)
        axes.set(xlabel="steps", ylabel="bits per dimension", title=f"d = {latent}")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8, title="test; dotted: training images", title_fontsize=7)
    figure.suptitle(frame["dataset"].iloc[0], fontsize=10)
    return figure


if __name__ == "__main__":
    main(__name__)

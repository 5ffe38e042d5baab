"""Bits per dimension of autoencoders within flows and of identical VAEs against the steps of training.

    python -m benchmarks.aef.curves --preset cpu --root FOLDER     # MNIST's test images, 25 minutes on one core

The likelihood of both is importance-sampled around the mode of p(z | x) (``laplace.py``); that
proposal's effective draws are in the table beside those of the paper's protocol at the last look:
an isotropic proposal around h(x) for the AEF, the encoder's posterior for the VAE. Differences to
the VAE are of the same images, with the standard error of their mean. The same estimate on as many
training images shows when a model begins to learn them by heart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.aef import against_vae
from benchmarks.aef.laplace import laplace_log_prob
from benchmarks.common.metrics import bits_per_dimension, dequantize
from benchmarks.common.quantized_images import QuantizedImages
from benchmarks.common.runner import Row, collect, main
from inn_guard.models.aef.expanded import ExpandedAutoencoder
from inn_guard.models.aef.model import LinearAEF


@dataclass(frozen=True)
class Config(against_vae.Config):
    """As for ``against_vae``, without partitions, whose likelihood is exact there.

    Attributes:
        looks: how many times each model is measured, the last time at the end of its training.
    """

    dataset: str = "mnist"
    models: tuple[str, ...] = ("VAE", "AEF linear", "AEF spread")
    latents: tuple[int, ...] = (2, 32)
    spreads: tuple[float, ...] = (0.1,)
    steps: int = 2400
    test_images: int = 100
    draws: int = 64
    repetitions: int = 8
    looks: int = 4


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
    """Every latent dimension under every seed: all models together, since they are compared image by image."""
    return {
        f"{config.dataset} d={latent} seed={seed}": (latent, seed)
        for latent in config.latents
        for seed in config.seeds
    }


def run(config: Config) -> pd.DataFrame:
    """All models of all latent dimensions."""
    return collect(config, cases(config), measure)


def measure(config: Config, case: tuple[int, int]) -> Iterator[Row]:
    """Rows of every look at every model of one latent dimension."""
    latent, seed = case
    data = against_vae.load(config.dataset, config.root, config.train_files)
    first: dict[int, Tensor] = {}
    for model in config.models:
        looks = Looking(config, data, seed)
        one = against_vae.Case(model, latent, seed)
        spread = config.spreads[0] if model == "AEF spread" else 0.0
        against_vae.trained(
            config, one, data, spread=spread, looks=against_vae.Looks(config.looks, looks)
        )
        for step, (row, bits) in looks.seen.items():
            difference = bits - first.setdefault(step, bits)
            yield {
                "dataset": data.name,
                "model": model,
                "latent": latent,
                "seed": seed,
                "step": step,
                **row,
                f"less_than_{config.models[0]}": -difference.mean().item(),
                "difference_error": difference.std().item() / math.sqrt(len(bits)),
            }


class Looking:
    """Measures a model when it is called during training, and keeps what it saw.

    Args:
        config: how many images and draws.
        data: the images.
        seed: of the noise, the same for every model.
    """

    def __init__(self, config: Config, data: QuantizedImages, seed: int) -> None:
        self._config, self._data, self._seed = config, data, seed
        self.seen: dict[int, tuple[Row, Tensor]] = {}

    def __call__(self, model: against_vae.Model, step: int) -> float:
        """Bits per dimension of the test images."""
        assert isinstance(model, ExpandedAutoencoder)
        config, data = self._config, self._data
        noise, cells = (torch.Generator().manual_seed(base + self._seed) for base in (3000, 4000))
        row: Row = {}
        for name, pixels in (("train", data.train), ("test", data.test)):
            x = dequantize(pixels[: config.test_images], generator=cells, levels=data.levels)
            estimate = laplace_log_prob(
                model, x, draws=config.draws, repetitions=config.repetitions, generator=noise
            )
            bits = self._bits(estimate.log_prob)
            row |= {
                f"bpd_{name}": bits.mean().item(),
                f"bpd_{name}_error": bits.std().item() / math.sqrt(len(bits)),
            }
        row |= {
            "bpd_test_upper": self._bits(estimate.lower_bound).mean().item(),
            "effective_draws": estimate.effective_draws.median().item(),
            "sigma": model.flow.sigma().log().mean().exp().item(),
            **(self._by_the_paper(model, x, noise) if step == config.steps else {}),
        }
        self.seen[step] = row, bits
        return row["bpd_test"]

    def _by_the_paper(self, model: ExpandedAutoencoder, x: Tensor, noise: torch.Generator) -> Row:
        """Bits and effective draws by the paper's protocol, the AEF's width tuned on validation images."""
        config, data = self._config, self._data
        if isinstance(model, LinearAEF):
            validation = dequantize(
                data.validation[: config.test_images], generator=noise, levels=data.levels
            )
            model.tune(validation, draws=config.draws, generator=noise)
        estimate = model.importance(
            x, draws=config.draws, repetitions=config.repetitions, generator=noise
        )
        return {
            "bpd_paper": self._bits(estimate.log_prob).mean().item(),
            "effective_draws_paper": estimate.effective_draws.median().item(),
        }

    def _bits(self, log_prob: Tensor) -> Tensor:
        return bits_per_dimension(log_prob, dims=self._data.dims, levels=self._data.levels)


def draw(frame: pd.DataFrame) -> Figure:
    """Bits per dimension of test images, and dashed of training images, against steps, a panel per d."""
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

"""Denoising by models trained on noisy images only: AEF, VAE and a least-squares autoencoder of the same nets.

    python -m benchmarks.aef.denoising --preset cpu

Every model reconstructs noisy test images; what is measured is how far the features of the
reconstruction are from those of the clean image (features of a small classifier, named in the
table), and the pixels' mean squared error. Paper: Table 2, MNIST, Inception features, noise 0.5: AE
0.135, VAE 0.085, AEF 0.082 at d = 2; 0.086, 0.045, 0.053 at d = 32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.aef.drawing import COLUMNS, IMAGES, grid, image_file
from benchmarks.common.features import classifier_features
from benchmarks.common.fit import Batch, FitSettings, fit
from benchmarks.common.metrics import (
    FeatureExtractor,
    add_noise,
    dequantize,
    feature_error,
    reconstruction_error,
)
from benchmarks.common.quantized_images import QuantizedImages, quantized_digits
from benchmarks.common.runner import Row, collect, main
from inn_guard.layers.autoregressive import maf
from inn_guard.models.aef.expanded import ExpandedAutoencoder
from inn_guard.models.aef.flow import AutoencoderConfig
from inn_guard.models.aef.model import LinearAEF
from inn_guard.models.aef.networks import small_nets
from inn_guard.models.aef.vae import VAE, DenoisingAutoencoder

Model = ExpandedAutoencoder | DenoisingAutoencoder
MODELS: dict[str, Callable[[AutoencoderConfig], Model]] = {
    "AE": DenoisingAutoencoder,
    "VAE": VAE,
    "AEF linear": LinearAEF,
}


@dataclass(frozen=True)
class Config:
    """What is trained and how it is measured.

    Attributes:
        models: of MODELS.
        deviations: of the noise, images in [0, 1].
        latents: dimensions d.
        seeds: of weights, batches and noise.
        steps: of Adam.
        learning_rate: 1e-4 in the paper, for a thousand times as many steps.
        channels: of encoder and decoder.
        hidden: width of the flows' MADE layers.
        classifier_steps: of the net whose features are compared.
    """

    models: tuple[str, ...] = tuple(MODELS)
    deviations: tuple[float, ...] = (0.5,)
    latents: tuple[int, ...] = (16,)
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 300
    learning_rate: float = 1e-3
    channels: tuple[int, ...] = (16, 32)
    hidden: int = 64
    classifier_steps: int = 400


PRESETS = {
    "smoke": {"seeds": (0,), "steps": 3, "channels": (4, 4), "hidden": 8, "classifier_steps": 3},
    "cpu": {},  # minutes on one core
}


@dataclass(frozen=True)
class Case:
    """One trained model."""

    model: str
    deviation: float
    latent: int
    seed: int


def run(config: Config) -> pd.DataFrame:
    grid_of_cases = {
        f"digits d={latent} noise={deviation} {model} seed={seed}": Case(
            model, deviation, latent, seed
        )
        for latent in config.latents
        for deviation in config.deviations
        for model in config.models
        for seed in config.seeds
    }
    return collect(config, grid_of_cases, measure)


def measure(config: Config, case: Case) -> Iterator[Row]:
    """Train one model on noisy images and score its reconstructions of noisy test images."""
    data, extractor = _data(), _extractor(config)
    model = trained(config, case, data)
    noise = torch.Generator().manual_seed(1000)
    clean = dequantize(data.test, generator=noise, levels=data.levels)
    noisy = add_noise(clean, deviation=case.deviation, generator=noise)
    with torch.no_grad():
        denoised = model.reconstruct(noisy).clamp(0, 1)
    if case.seed == config.seeds[0]:
        IMAGES.mkdir(parents=True, exist_ok=True)
        parts = {"clean": clean, "noisy": noisy, "denoised": denoised}
        np.savez(
            _file(case.model, case.deviation, case.latent),
            **{k: v[:COLUMNS].numpy() for k, v in parts.items()},
        )
    yield {
        "model": case.model,
        "latent": case.latent,
        "deviation": case.deviation,
        "seed": case.seed,
        "steps": config.steps,
        "feature_error": feature_error(extractor, clean, denoised).mean().item(),
        "feature_error_of_noisy": feature_error(extractor, clean, noisy).mean().item(),
        "pixel_mse": reconstruction_error(clean, denoised).mean().item(),
        "pixel_mse_of_noisy": reconstruction_error(clean, noisy).mean().item(),
        "features": extractor.name,
    }


def trained(config: Config, case: Case, data: QuantizedImages) -> Model:
    """The model in eval mode."""
    recipe = AutoencoderConfig(
        data.shape,
        case.latent,
        nets=partial(small_nets, channels=tuple(config.channels)),  # type: ignore[arg-type]
        core_encoder=partial(maf, hidden=config.hidden),
        prior=partial(maf, hidden=config.hidden),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        model = MODELS[case.model](recipe)

    def loss(batch: Batch) -> Tensor:
        x = dequantize(batch.x, generator=batch.generator, levels=data.levels)
        noisy = add_noise(x, deviation=case.deviation, generator=batch.generator)
        return model.loss(noisy, generator=batch.generator)

    settings = FitSettings(
        config.steps, learning_rate=config.learning_rate, clip=200.0, seed=case.seed
    )
    fit(model, loss, (data.train,), settings=settings)
    return model.eval()


def draw(frame: pd.DataFrame) -> Figure:
    """Clean, noisy and denoised test images of every model."""
    settings = [
        tuple(row) for row in frame[["model", "deviation", "latent"]].drop_duplicates().to_numpy()
    ]
    figure = Figure(figsize=(9, 2.1 * len(settings)), layout="constrained")
    rows = figure.subplots(len(settings), squeeze=False)[:, 0]
    for axes, (model, deviation, latent) in zip(rows, settings, strict=True):
        path = _file(model, deviation, latent)
        if path.exists():
            with np.load(path) as images:
                grid(
                    axes, np.concatenate([images[name] for name in ("clean", "noisy", "denoised")])
                )
        axes.set_title(
            f"{model}, d = {latent}, noise {deviation}: clean, noisy, denoised", fontsize=9
        )
    return figure


def _file(model: str, deviation: float, latent: int) -> Path:
    return image_file(f"denoising-{deviation}", model, latent)


@cache
def _data() -> QuantizedImages:
    return quantized_digits()


@cache
def _extractor(config: Config) -> FeatureExtractor:
    return classifier_features(_data(), steps=config.classifier_steps)


if __name__ == "__main__":
    main(__name__)

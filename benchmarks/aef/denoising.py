"""Denoising by models trained on noisy images only: AEF, VAE and a least-squares autoencoder.

    inn-guard bench aef.denoising --preset cpu

Every model reconstructs noisy test images; what is measured is how far the features of the
reconstruction are from those of the clean image (features of a small classifier, named in the
table), and the pixels' mean squared error. Paper: Table 2, MNIST, Inception features, noise 0.5: AE
0.135, VAE 0.085, AEF 0.082 at d = 2; 0.086, 0.045, 0.053 at d = 32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.aef import training
from benchmarks.aef.drawing import COLUMNS, grid, image_file
from benchmarks.aef.training import ModelConfig, fit_images, fresh, keep_images
from benchmarks.common.features import classifier_features
from benchmarks.common.fit import FitSettings
from benchmarks.common.metrics import (
    FeatureExtractor,
    add_noise,
    dequantize,
    feature_error,
    reconstruction_error,
)
from benchmarks.common.quantized_images import QuantizedImages, quantized_digits
from benchmarks.common.runner import Row, collect, main
from inn_guard.models.aef.expanded import ExpandedAutoencoder
from inn_guard.models.aef.flow import AutoencoderConfig
from inn_guard.models.aef.model import LinearAEF
from inn_guard.models.aef.vae import VAE, DenoisingAutoencoder

Model = ExpandedAutoencoder | DenoisingAutoencoder
MODELS: dict[str, Callable[[AutoencoderConfig], Model]] = {
    "AE": DenoisingAutoencoder,
    "VAE": VAE,
    "AEF linear": LinearAEF,
}


@dataclass(frozen=True)
class Config(ModelConfig):
    """What is trained and how it is measured."""

    models: tuple[str, ...] = tuple(MODELS)
    deviations: tuple[float, ...] = (0.5,)  # of the noise, images in [0, 1]
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 300
    learning_rate: float = 1e-3  # 1e-4 in the paper, for a thousand times as many steps


PRESETS = {
    "smoke": {"seeds": (0,), "steps": 3, "channels": (4, 4), "hidden": 8, "classifier_steps": 3},
    "cpu": {},  # minutes on one core
}


@dataclass(frozen=True)
class Case(training.Case):
    """One trained model, and the standard deviation of the noise."""

    deviation: float


def run(config: Config) -> pd.DataFrame:
    cases = {
        f"digits d={latent} noise={deviation} {model} seed={seed}": Case(
            model, latent, seed, deviation
        )
        for latent in config.latents
        for deviation in config.deviations
        for model in config.models
        for seed in config.seeds
    }
    return collect(config, cases, measure)


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
        images = {"clean": clean, "noisy": noisy, "denoised": denoised}
        keep_images(f"denoising-{case.deviation}", case, images)
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
    model = fresh(config, case, data.shape, MODELS[case.model])

    def corrupt(x: Tensor, generator: torch.Generator) -> Tensor:
        return add_noise(x, deviation=case.deviation, generator=generator)

    settings = FitSettings(
        config.steps, learning_rate=config.learning_rate, clip=200.0, seed=case.seed
    )
    fit_images(model, data, settings, corrupt=corrupt)
    return model


def draw(frame: pd.DataFrame) -> Figure:
    """Clean, noisy and denoised test images of every model."""
    pictures = frame[["model", "deviation", "latent"]].drop_duplicates()
    figure = Figure(figsize=(9, 2.1 * len(pictures)), layout="constrained")
    rows = figure.subplots(len(pictures), squeeze=False)[:, 0]
    for axes, one in zip(rows, pictures.itertuples(), strict=True):
        path = image_file(f"denoising-{one.deviation}", one.model, one.latent)
        if path.exists():
            with np.load(path) as images:
                parts = [images[name][:COLUMNS] for name in ("clean", "noisy", "denoised")]
            grid(axes, np.concatenate(parts))
        title = f"{one.model}, d = {one.latent}, noise {one.deviation}: clean, noisy, denoised"
        axes.set_title(title, fontsize=9)
    return figure


@cache
def _data() -> QuantizedImages:
    return quantized_digits()


@cache
def _extractor(config: Config) -> FeatureExtractor:
    return classifier_features(_data(), steps=config.classifier_steps)


if __name__ == "__main__":
    main(__name__)

"""What the AEF experiments share: models of one configuration, their training, and kept images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.aef.drawing import image_file
from benchmarks.common.fit import Batch, FitSettings, History, fit
from benchmarks.common.metrics import dequantize
from benchmarks.common.quantized_images import QuantizedImages
from inn_guard.layers.autoregressive import maf
from inn_guard.models.aef.flow import AutoencoderConfig
from inn_guard.models.aef.networks import small_nets

__all__ = ["Case", "ModelConfig", "fit_images", "fresh", "keep_images"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class ModelConfig:
    """The nets of an AEF, a VAE or an autoencoder, and how they are trained."""

    models: tuple[str, ...] = ("VAE", "AEF linear")  # names of models
    latents: tuple[int, ...] = (16,)  # dimensions d
    seeds: tuple[int, ...] = (0,)  # of weights, batches and noise
    steps: int = 500  # of Adam, the gradient clipped at 200
    channels: tuple[int, ...] = (16, 32)  # of encoder and decoder
    hidden: int = 64  # width of the MADE layers of the flows
    classifier_steps: int = 400  # of the net whose features are compared


@dataclass(frozen=True)
class Case:
    """One trained model."""

    model: str
    latent: int
    seed: int


def fresh(
    config: ModelConfig,
    case: Case,
    shape: tuple[int, int, int],
    make: Callable[[AutoencoderConfig], Model],
) -> Model:
    """The model of a case before training; equal seeds give equal nets."""
    sizes = AutoencoderConfig(
        shape,
        case.latent,
        nets=partial(small_nets, channels=tuple(config.channels)),  # type: ignore[arg-type]
        core_encoder=partial(maf, hidden=config.hidden),
        prior=partial(maf, hidden=config.hidden),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        return make(sizes)


def fit_images(
    model: nn.Module,
    data: QuantizedImages,
    settings: FitSettings,
    *,
    corrupt: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    validate: Callable[[int], float] | None = None,
) -> History:
    """Train on dequantized images; the model is in eval mode afterwards.

    Args:
        model: with a method ``loss(x, generator=...)``.
        data: images.
        settings: how to train.
        corrupt: (images, generator) -> what the model is trained on; default: the images.
        validate: step -> number, see ``fit``.
    """

    def loss(batch: Batch) -> Tensor:
        x = dequantize(batch.x, generator=batch.generator, levels=data.levels)
        if corrupt is not None:
            x = corrupt(x, batch.generator)
        return model.loss(x, generator=batch.generator)

    history = fit(model, loss, (data.train,), settings=settings, validate=validate)
    model.eval()
    return history


def keep_images(dataset: str, case: Case, images: dict[str, Tensor]) -> None:
    """Write the first 64 images of each kind to the file that the figures read."""
    path = image_file(dataset, case.model, case.latent)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: part[:64].numpy() for name, part in images.items()})

"""The feature extractor of every Frechet distance here: a small CNN trained on the same data set, named as that.

Its distances order models of one data set; they are no FID and compare with no published number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.image_sets import ImageSet
from inn_guard.metrics import FeatureExtractor
from inn_guard.training import Batch, FitSettings, fit

__all__ = ["small_classifier_features"]

FEATURES = 64


def small_classifier_features(images: ImageSet, *, steps: int = 600, seed: int = 0) -> FeatureExtractor:
    """The 64 penultimate features of a CNN trained on ``images`` for ``steps`` steps of Adam.

    Args:
        images: data set; its name becomes part of the extractor's name.
        steps: optimiser steps of batch 128.
        seed: of the network's weights and the order of the data.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = _body(images.shape)
        head = nn.Linear(FEATURES, 10)
    pixels, labels = images.train
    network = nn.Sequential(body, head)

    def loss(batch: Batch) -> Tensor:
        return functional.cross_entropy(network(batch.x.float() / 255), batch.tensors[1])

    fit(network, loss, (pixels, labels), settings=FitSettings(steps=steps, batch_size=128, seed=seed))
    network.eval()
    return FeatureExtractor(f"small CNN trained on {images.name}", body)


def _body(shape: tuple[int, int, int]) -> nn.Module:
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * -(-height // 4) * -(-width // 4), FEATURES),
        nn.ReLU(),
    )

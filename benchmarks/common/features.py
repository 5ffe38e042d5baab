"""Features of a small classifier trained on the data set itself, for Fréchet distances.

They are not Inception features, so that such a distance is never called FID.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common.fit import Batch, FitSettings, fit
from benchmarks.common.metrics import FeatureExtractor
from benchmarks.common.quantized_images import QuantizedImages, quantized_images

__all__ = ["classifier_features", "images_and_features"]


@cache
def images_and_features(
    name: str, root: str, *, steps: int
) -> tuple[QuantizedImages, FeatureExtractor]:
    """A data set, and the extractor trained on it for at most 600 steps.

    Args:
        name: of the data set, see ``quantized_images``.
        root: folder of its official files; "" for the default.
        steps: of the models that are compared; the extractor is trained for at most twice as many.
    """
    folder = None
    if root:
        folder = Path(root)
    images = quantized_images(name, folder)
    return images, classifier_features(images, steps=min(600, 2 * steps))


def classifier_features(data: QuantizedImages, *, steps: int, seed: int = 0) -> FeatureExtractor:
    """64 features of a small convolutional net trained on ``data.train`` and its labels.

    Args:
        data: images and labels.
        steps: of training, 64 images each.
        seed: of weights and order.

    Returns:
        An extractor whose name has its kind, the data it was trained on and its test accuracy.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _classifier(data.shape, int(data.train_labels.max()) + 1)
    train, test = data.scaled(data.train), data.scaled(data.test)

    def loss(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(net(batch.x), batch.tensors[1])

    settings = FitSettings(steps, batch_size=64, learning_rate=2e-3, seed=seed)
    fit(net, loss, (train, data.train_labels), settings=settings)
    net.eval()
    with torch.no_grad():
        accuracy = (net(test).argmax(1) == data.test_labels).double().mean().item()
    return FeatureExtractor(
        f"small CNN trained on {data.name}, test accuracy {accuracy:.1%}", net[:-1]
    )


def _classifier(shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * math.ceil(height / 4) * math.ceil(width / 4), 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )

"""Features of a small classifier trained on the data set itself, for Frechet distances that are never called FID."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.common.fit import Batch, FitSettings, fit
from benchmarks.common.metrics import FeatureExtractor
from benchmarks.common.quantized_images import QuantizedImages

__all__ = ["classifier_features"]


def classifier_features(data: QuantizedImages, *, steps: int, seed: int = 0) -> FeatureExtractor:
    """64 features before the last layer of a small convolutional net, trained on ``data.train`` and its labels.

    Args:
        data: images and labels.
        steps: of training, 64 images each.
        seed: of weights and order.

    Returns:
        An extractor whose name says what it is, on which data it was trained and how well it classifies the test data.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _classifier(data.shape, int(data.train_labels.max()) + 1)
    train, test = (pixels.float() / (data.levels - 1) for pixels in (data.train, data.test))

    def loss(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(net(batch.x), batch.tensors[1])

    fit(
        net,
        loss,
        (train, data.train_labels),
        settings=FitSettings(steps, batch_size=64, learning_rate=2e-3, seed=seed),
    )
    net.eval()
    with torch.no_grad():
        accuracy = (net(test).argmax(1) == data.test_labels).double().mean().item()
    return FeatureExtractor(
        f"small CNN trained on {data.name}, test accuracy {accuracy:.1%}", net[:-1]
    )


def _classifier(shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    channels, height, width = shape
    convolutions = [
        *(nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
    ]
    features = 32 * -(-height // 4) * -(-width // 4)
    return nn.Sequential(
        *convolutions, nn.Flatten(), nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, classes)
    )

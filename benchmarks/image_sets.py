"""Image sets for generative models as uint8 tensors, split for training, validation and testing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.image_files import Images, read_cifar10, read_mnist

__all__ = ["IMAGE_SETS", "ImageSet", "image_set"]


@dataclass(frozen=True)
class ImageSet:
    """Images (n, C, H, W) uint8 and labels (n,) int64 in three splits.

    Attributes:
        name: what a result calls the data, reductions included.
        train: images to learn from, and their labels.
        validation: images to choose by.
        test: images to report.
    """

    name: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train[0].shape[1:]
        return channels, height, width

    @property
    def dims(self) -> int:
        """C H W."""
        return self.train[0][0].numel()


def digits(_: Path | None = None) -> ImageSet:
    """scikit-learn's 1797 digits of 8x8 pixels with 17 grey values, spread to 0 .. 255; 1297, 200 and 300 images."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    spread = np.round(pixels[order] * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    return _split("digits 8x8 (17 grey values)", Images(spread, labels[order], {}), validation=200, test=300)


def mnist(root: Path | None) -> ImageSet:
    """MNIST below ``root``; without its training files, its 10,000 test images, the last 2,000 of them held out."""
    root = _given(root, "MNIST")
    try:
        train, test = read_mnist(root, train=True), read_mnist(root, train=False)
    except FileNotFoundError:
        return _split("MNIST (10,000 test images)", read_mnist(root, train=False), validation=500, test=2000)
    whole = Images(
        np.concatenate([train.pixels, test.pixels]),
        np.concatenate([train.labels, test.labels]),
        {**train.checksums, **test.checksums},
    )
    return _split("MNIST", whole, validation=5000, test=len(test.pixels))


def cifar10(root: Path | None) -> ImageSet:
    """CIFAR-10 below ``root``, the last 5,000 training images for validation."""
    root = _given(root, "CIFAR-10")
    train, test = read_cifar10(root, train=True), read_cifar10(root, train=False)
    whole = Images(
        np.concatenate([train.pixels, test.pixels]), np.concatenate([train.labels, test.labels]), train.checksums
    )
    return _split("CIFAR-10", whole, validation=5000, test=len(test.pixels))


IMAGE_SETS: dict[str, Callable[[Path | None], ImageSet]] = {"digits": digits, "mnist": mnist, "cifar10": cifar10}


def image_set(name: str, root: Path | None = None) -> ImageSet:
    """The image set of that name.

    Args:
        name: a key of IMAGE_SETS.
        root: folder of the official files; digits need none.

    Raises:
        ValueError: if there is none of that name.
        FileNotFoundError: if its files are not below ``root``, with the command that fetches them.
    """
    if name not in IMAGE_SETS:
        raise ValueError(f"expected one of {', '.join(IMAGE_SETS)}; got {name!r}")
    return IMAGE_SETS[name](root)


def _given(root: Path | None, name: str) -> Path:
    if root is None:
        raise FileNotFoundError(f"{name} needs its files: type --data-root FOLDER, the folder that holds them")
    return root


def _split(name: str, images: Images, *, validation: int, test: int) -> ImageSet:
    pixels, labels = torch.as_tensor(images.pixels), torch.as_tensor(images.labels)
    ends = (len(pixels) - validation - test, len(pixels) - test, len(pixels))
    starts = (0, ends[0], ends[1])
    parts = [(pixels[a:b], labels[a:b]) for a, b in zip(starts, ends, strict=True)]
    return ImageSet(name, *parts)

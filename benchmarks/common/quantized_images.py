"""Digits, MNIST and CIFAR-10 as quantized pixels, split into training, validation and test data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.common.image_files import read_cifar10, read_mnist

__all__ = [
    "QuantizedImages",
    "by_parts",
    "cifar10",
    "mnist",
    "quantized_digits",
    "quantized_images",
]


@dataclass(frozen=True)
class QuantizedImages:
    """Pixels (n, C, H, W) uint8 below ``levels`` and labels (n,).

    Attributes:
        name: of the data set and of the split.
        levels: number of values of a pixel.
    """

    name: str
    levels: int
    train: Tensor
    train_labels: Tensor
    validation: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    @property
    def dims(self) -> int:
        """C H W, the number of values of one image."""
        return self.train[0].numel()

    def scaled(self, pixels: Tensor) -> Tensor:
        """Pixels as float32 in [0, 1]."""
        return pixels.float() / (self.levels - 1)


def by_parts(function: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """``function(x)``, called on ``size`` rows at once."""
    return torch.cat([function(part) for part in x.split(size)])


def quantized_images(name: str, root: Path | None) -> QuantizedImages:
    """digits, mnist (its 10,000 test images), mnist_whole or cifar10.

    Args:
        name: of the data set.
        root: the folder of the official files, ``data`` if None; digits need none.

    Raises:
        ValueError: if there is none of that name.
        MissingData: if its files are not there.
    """
    if name == "digits":
        return quantized_digits()
    root = root or Path("data")
    if name in ("mnist", "mnist_whole"):
        return mnist(root, train_files=name == "mnist_whole")
    if name == "cifar10":
        return cifar10(root)
    raise ValueError(f"expected digits, mnist, mnist_whole or cifar10; got {name!r}")


def quantized_digits(*, seed: int = 0) -> QuantizedImages:
    """scikit-learn's 1797 digits, 8 x 8, 17 grey values: 1200 train, 147 validate, 450 test."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.as_tensor(images).to(torch.uint8).reshape(-1, 1, 8, 8)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    return _split(
        "digits", 17, pixels[order], torch.as_tensor(labels)[order], sizes=(1200, 147, 450)
    )


def mnist(root: Path, *, train_files: bool) -> QuantizedImages:
    """MNIST from its official files below ``root``.

    Args:
        root: the folder.
        train_files: train and validate on 54,000 and 6,000 images of the training files, test on
            the test files; else everything comes from the 10,000 test images: 7,200, 800, and the
            last 2,000 to test.
    """
    test = read_mnist(root, train=False)
    pixels, labels = torch.as_tensor(test.pixels.copy()), torch.as_tensor(test.labels)
    if not train_files:
        return _split("mnist, 10,000 test images", 256, pixels, labels, sizes=(7200, 800, 2000))
    train = read_mnist(root, train=True)
    pixels = torch.cat([torch.as_tensor(train.pixels.copy()), pixels])
    labels = torch.cat([torch.as_tensor(train.labels), labels])
    return _split("mnist", 256, pixels, labels, sizes=(54_000, 6_000, 10_000))


def cifar10(root: Path) -> QuantizedImages:
    """CIFAR-10 from its official files: 45,000 train, 5,000 validate, 10,000 test."""
    train, test = read_cifar10(root, train=True), read_cifar10(root, train=False)
    pixels = torch.cat([torch.as_tensor(part.pixels.copy()) for part in (train, test)])
    labels = torch.cat([torch.as_tensor(part.labels) for part in (train, test)])
    sizes = (len(train.labels) - 5000, 5000, len(test.labels))
    return _split("CIFAR-10", 256, pixels, labels, sizes=sizes)


def _split(
    name: str, levels: int, pixels: Tensor, labels: Tensor, *, sizes: tuple[int, int, int]
) -> QuantizedImages:
    train, validation, test = pixels.split(list(sizes))
    train_labels, _, test_labels = labels.split(list(sizes))
    return QuantizedImages(name, levels, train, train_labels, validation, test, test_labels)

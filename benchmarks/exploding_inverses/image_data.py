"""Labelled images, normalised and augmented as classifiers and flows are trained on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common.image_files import read_cifar10
from benchmarks.common.quantized_images import quantized_digits

__all__ = ["DATA", "LabelledImages", "shifted"]


@dataclass(frozen=True)
class LabelledImages:
    """Pixels (n, C, H, W) uint8 and labels (n,) of a training and a test split.

    Attributes:
        levels: number of values of a pixel.
        checksum: sha256 over the files' own, or "" for data that come with a library.
    """

    levels: int
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    checksum: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    def first(self, *, train: int, test: int) -> LabelledImages:
        """The first ``train`` and ``test`` images, or all if there are fewer."""
        return LabelledImages(
            self.levels,
            self.train[:train],
            self.train_labels[:train],
            self.test[:test],
            self.test_labels[:test],
            self.checksum,
        )

    def in_bits(self, bits: int) -> LabelledImages:
        """The leading ``bits`` bits of the pixels; unchanged if they have no more grey values."""
        factor = max(1, self.levels // 2**bits)
        parts = (self.train // factor, self.train_labels, self.test // factor, self.test_labels)
        return LabelledImages(2**bits, *parts, self.checksum)

    def to(self, device: torch.device | str) -> LabelledImages:
        """The same on another device."""
        parts = (self.train, self.train_labels, self.test, self.test_labels)
        return LabelledImages(self.levels, *(part.to(device) for part in parts), self.checksum)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the training pixels per channel, (1, C, 1, 1) each."""
        counts = [
            torch.bincount(channel.flatten(), minlength=self.levels)
            for channel in self.train.unbind(1)
        ]
        weights = torch.stack(counts).double() / counts[0].sum()
        values = torch.arange(self.levels, dtype=torch.float64, device=weights.device)
        mean = weights @ values
        variance = weights @ values.square() - mean.square()
        return mean.float().reshape(1, -1, 1, 1), variance.sqrt().float().reshape(1, -1, 1, 1)


def digits(_: Path) -> LabelledImages:
    """scikit-learn's digits, 1 x 8 x 8 with 17 grey values: no files needed."""
    images = quantized_digits()
    return LabelledImages(
        images.levels, images.train, images.train_labels, images.test, images.test_labels
    )


def cifar10(root: Path) -> LabelledImages:
    """CIFAR-10 from its official files below ``root``: 50,000 images to train, 10,000 to test."""
    train, test = read_cifar10(root, train=True), read_cifar10(root, train=False)
    parts, checksum = [], hashlib.sha256()
    for part in (train, test):
        parts += [torch.as_tensor(part.pixels.copy()), torch.as_tensor(part.labels.copy())]
        for name, value in sorted(part.checksums.items()):
            checksum.update(f"{name}{value}".encode())
    return LabelledImages(256, *parts, checksum=checksum.hexdigest())


DATA: dict[str, Callable[[Path], LabelledImages]] = {"digits": digits, "cifar10": cifar10}


def shifted(pixels: Tensor, *, reach: int, mirrored: bool, generator: torch.Generator) -> Tensor:
    """Every image moved at random in both directions, with zeros behind it, and maybe mirrored.

    Args:
        pixels: (B, C, H, W).
        reach: largest shift; 4 is the usual crop of CIFAR-10.
        mirrored: whether half of the images, drawn at random, are mirrored left to right.
        generator: on the CPU.

    Returns:
        (B, C, H, W), with the channels last in memory.
    """
    count, _, height, width = pixels.shape
    drawn = torch.randint(2 * reach + 1, (2, count, 1), generator=generator).to(pixels.device)
    rows = drawn[0] + torch.arange(height, device=pixels.device)
    columns = torch.arange(width, device=pixels.device).expand(count, width)
    if mirrored:
        turn = (torch.rand(count, 1, generator=generator) < 0.5).to(pixels.device)
        columns = torch.where(turn, width - 1 - columns, columns)
    columns = drawn[1] + columns
    padded = functional.pad(pixels, [reach] * 4)
    images = torch.arange(count, device=pixels.device)[:, None, None]
    return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

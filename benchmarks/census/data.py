"""Data of the census: two densities of the plane, Gaussians, digits, a table, and image patches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer, make_moons
from torch import Tensor

from benchmarks.common.image_files import read_cifar10
from benchmarks.common.quantized_images import quantized_digits

__all__ = ["DATA", "Split", "load"]

ROWS = 2500  #: of the data that are generated
PATCHES = 6000
SIDE = 16  #: of a patch


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows to audit at, (n, *shape) float32, standardised by the former."""

    train: Tensor
    test: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.train.shape[1:])

    @property
    def dims(self) -> int:
        """The number of values in one sample."""
        return self.train[0].numel()

    @property
    def checksum(self) -> str:
        """Of both parts: the first 16 digits of their sha256."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def moons(root: str, generator: torch.Generator) -> Tensor:
    """Two half circles with noise of deviation 0.05, (n, 2)."""
    seed = int(torch.randint(2**31, (), generator=generator))
    return torch.as_tensor(make_moons(ROWS, noise=0.05, random_state=seed)[0])


def checkerboard(root: str, generator: torch.Generator) -> Tensor:
    """Every other one of 4 x 4 squares, uniformly, (n, 2)."""
    first = 4 * torch.rand(ROWS, generator=generator)
    row = 2 * torch.randint(2, (ROWS,), generator=generator)
    second = torch.rand(ROWS, generator=generator) + row + first.floor() % 2
    return torch.stack([first, second], dim=1)


def gaussians(root: str, generator: torch.Generator) -> Tensor:
    """Sixteen separated Gaussians of deviation 0.05, (n, 8)."""
    centres = torch.randn(16, 8, generator=torch.Generator().manual_seed(7))
    chosen = centres[torch.randint(16, (ROWS,), generator=generator)]
    return chosen + 0.05 * torch.randn(ROWS, 8, generator=generator)


def digits(root: str, generator: torch.Generator) -> Tensor:
    """scikit-learn's digits, dequantized uniformly, (1797, 1, 8, 8)."""
    images = quantized_digits()
    pixels = torch.cat([images.train, images.validation, images.test]).float()
    return (pixels + torch.rand(pixels.shape, generator=generator)) / images.levels


def cells(root: str, generator: torch.Generator) -> Tensor:
    """scikit-learn's table of breast cancer cells, (569, 30)."""
    return torch.as_tensor(load_breast_cancer().data)


def patches(root: str, generator: torch.Generator) -> Tensor:
    """Patches of 16 x 16 pixels at random places of CIFAR-10's training images, dequantized.

    Raises:
        MissingData: if the files are not below ``root``.
    """
    pixels = torch.as_tensor(read_cifar10(Path(root or "data"), train=True).pixels[:PATCHES])
    corners = torch.randint(pixels.shape[-1] - SIDE + 1, (len(pixels), 2), generator=generator)
    parts = [
        image[:, top : top + SIDE, left : left + SIDE]
        for image, (top, left) in zip(pixels, corners.tolist(), strict=True)
    ]
    cut = torch.stack(parts).float()
    return (cut + torch.rand(cut.shape, generator=generator)) / 256


DATA: dict[str, Callable[[str, torch.Generator], Tensor]] = {
    "moons": moons,
    "checkerboard": checkerboard,
    "gaussians": gaussians,
    "digits": digits,
    "cells": cells,
    "patches": patches,
}


def load(name: str, *, root: str, held_out: int, seed: int) -> Split:
    """A data set, shuffled and split.

    A table is standardised by feature; images by one mean and one deviation.

    Args:
        name: a key of DATA.
        root: folder of CIFAR-10's files; the other data need none.
        held_out: rows that are kept out of training, for the audit.
        seed: of everything random.

    Raises:
        ValueError: if there is no such data set.
    """
    if name not in DATA:
        raise ValueError(f"expected data out of {', '.join(DATA)}; got {name!r}")
    generator = torch.Generator().manual_seed(seed)
    rows = DATA[name](root, generator).double()
    rows = rows[torch.randperm(len(rows), generator=generator)]
    test, train = rows[:held_out], rows[held_out:]
    mean, deviation = train.mean(0), train.std(0)
    if train.dim() > 2:
        mean, deviation = train.mean(), train.std()
    return Split(((train - mean) / deviation).float(), ((test - mean) / deviation).float())

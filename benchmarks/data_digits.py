"""scikit-learn's handwritten digits: 1797 real images of 8x8 pixels that come with the library."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor

__all__ = ["Digits", "digits"]

SHAPE = (-1, 1, 8, 8)


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) float32 and labels (n,) int64, split by class proportions."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(*, held_out: float = 0.25, seed: int = 0) -> Digits:
    """The digits, every pixel standardised by its mean and deviation over the training images.

    This is scikit-learn's usual preparation. Pixels in the corners are black in almost every image, so the few images
    that use them lie far out, up to 36 deviations: real data with real outliers. Pixels that never change stay 0. No
    noise is added, because the task is to classify.

    Args:
        held_out: share of images kept out of training.
        seed: of the split.
    """
    pixels, labels = load_digits(return_X_y=True)
    train, test, *split_labels = train_test_split(
        pixels, labels, test_size=held_out, random_state=seed, stratify=labels
    )
    scaler = StandardScaler().fit(train)
    train_images, test_images = (
        torch.as_tensor(scaler.transform(part), dtype=torch.float32).reshape(SHAPE) for part in (train, test)
    )
    train_labels, test_labels = (torch.as_tensor(part) for part in split_labels)
    return Digits(train_images, train_labels, test_images, test_labels)

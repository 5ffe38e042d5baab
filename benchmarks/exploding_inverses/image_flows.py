"""Flows of images by maximum likelihood: data, loss, and the nets of the exploding-inverses paper."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.metrics import bits_per_dimension, dequantize
from benchmarks.exploding_inverses.image_data import LabelledImages, shifted
from benchmarks.exploding_inverses.image_training import Batch
from inn_guard.core.invertible import Invertible

__all__ = ["Augmentation", "FlowTraining"]


@dataclass(frozen=True)
class Augmentation:
    """Random shifts by so many pixels, and mirroring."""

    shift: int = 0
    mirrored: bool = False


@dataclass(frozen=True)
class FlowTraining:
    """Images, dequantized into [low, low + 1), and the likelihood of them.

    Attributes:
        data: images and their number of grey values.
        low: what the darkest pixel becomes.
        augmentation: of training images.
        channels_last: memory format.
    """

    data: LabelledImages
    low: float
    augmentation: Augmentation
    channels_last: bool

    def dequantized(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Pixels (B, C, H, W) uint8 with uniform noise, in [low, low + 1)."""
        x = dequantize(pixels, generator=generator, levels=self.data.levels) + self.low
        return (
            x.contiguous(memory_format=torch.channels_last)
            if self.channels_last
            else x.contiguous()
        )

    def loss(self, net: Invertible, batch: Batch) -> Tensor:
        """Mean negative log-likelihood of the batch, in nats per value."""
        pixels = self.data.train[batch.rows.to(self.data.train.device)]
        if self.augmentation.shift or self.augmentation.mirrored:
            pixels = shifted(
                pixels,
                reach=self.augmentation.shift,
                mirrored=self.augmentation.mirrored,
                generator=batch.generator,
            )
        x = self.dequantized(pixels, batch.generator)
        return -net.log_prob(x).mean() / x[0].numel()

    @torch.no_grad()
    def bits(self, net: Invertible, *, count: int) -> float:
        """Bits per dimension of the first ``count`` test images, a bound with one draw of the noise."""
        generator = torch.Generator().manual_seed(0)
        parts = [
            net.log_prob(self.dequantized(pixels, generator))
            for pixels in self.data.test[:count].split(64)
        ]
        log_prob = torch.cat(parts)
        dims = self.data.train[0].numel()
        return bits_per_dimension(log_prob, dims=dims, levels=self.data.levels).mean().item()

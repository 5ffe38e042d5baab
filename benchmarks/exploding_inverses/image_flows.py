"""Flows of images by maximum likelihood: configuration, data and loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.metrics import bits_per_dimension, dequantize
from benchmarks.exploding_inverses.image_data import LabelledImages, shifted
from benchmarks.exploding_inverses.image_training import Batch, ImageConfig
from inn_guard.core.invertible import Invertible

__all__ = ["FlowConfig", "FlowTraining"]


@dataclass(frozen=True)
class FlowConfig(ImageConfig):
    """What all trainings of flows on images need. The defaults are the paper's."""

    hidden: int = 512
    steps: int = 78_100  # of the optimiser
    warmup: int = 1000  # steps over which the learning rate rises
    grids: str = "benchmarks/results"  # folder for a picture of every net's images; "" draws none


@dataclass(frozen=True)
class FlowTraining:
    """Images, dequantized into [low, low + 1), and their likelihood.

    Attributes:
        config: of the experiment.
        data: images and their number of grey values, on the device.
        low: value of the darkest pixel.
        shift: pixels by which training images are moved at random.
        mirrored: whether half of the training images, drawn at random, are mirrored.
    """

    config: FlowConfig
    data: LabelledImages
    low: float
    shift: int = 0
    mirrored: bool = False

    def initialise(self, net: Invertible, images: int) -> None:
        """Set the ActNorms of a net by the first training images."""
        generator = torch.Generator().manual_seed(self.config.seed)
        with torch.no_grad():
            net(self.dequantized(self.data.train[:images], generator))

    def dequantized(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Pixels (B, C, H, W) uint8 with uniform noise, in [low, low + 1)."""
        x = dequantize(pixels, generator=generator, levels=self.data.levels) + self.low
        return self.config.contiguous(x)

    def loss(self, net: Invertible, batch: Batch) -> Tensor:
        """Mean negative log-likelihood of the batch, in nats per value."""
        pixels = self.data.train[batch.rows.to(self.data.train.device)]
        if self.shift or self.mirrored:
            pixels = shifted(
                pixels, reach=self.shift, mirrored=self.mirrored, generator=batch.generator
            )
        x = self.dequantized(pixels, batch.generator)
        return -net.log_prob(x).mean() / x[0].numel()

    @torch.no_grad()
    def bits(self, net: Invertible, *, count: int) -> float:
        """Bits per dimension of the first ``count`` test images, with one draw of the noise."""
        generator = torch.Generator().manual_seed(0)
        parts = [
            net.log_prob(self.dequantized(pixels, generator))
            for pixels in self.data.test[:count].split(64)
        ]
        log_prob = torch.cat(parts)
        dims = self.data.train[0].numel()
        return bits_per_dimension(log_prob, dims=dims, levels=self.data.levels).mean().item()

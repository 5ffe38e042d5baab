"""The net of the performance claims: the affine Glow trunk, D = 3072 for images of 32 x 32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.layers.chain import Chain
from inn_guard.models.glow import GlowConfig, glow_classifier

__all__ = ["DEVICE", "Sizes"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Sizes:
    """Channels of the couplings' networks, levels, height and width of the images, samples in the batch, and a seed."""

    hidden: int = 128
    levels: int = 3
    size: int = 32
    batch: int = 32
    seed: int = 0

    def net(self, blocks: int) -> Chain:
        """So many blocks over all levels, with couplings that do something, initialised from a batch."""
        torch.manual_seed(self.seed)
        shape = (3, self.size, self.size)
        sizes = GlowConfig(levels=self.levels, blocks=blocks // self.levels, hidden=self.hidden)
        net = glow_classifier(shape, config=sizes)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
            net(torch.randn(self.batch, *shape))
        return net.to(DEVICE).eval()

    def data(self) -> Tensor:
        """A batch of standard normal images."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.batch, 3, self.size, self.size, generator=generator).to(DEVICE)

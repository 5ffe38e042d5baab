"""The net of the performance claims: the affine Glow trunk, 3 levels, D = 3072 for images of 32 x 32."""

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
    """Channels of the couplings' networks, height and width of the images, samples in the batch, and a seed."""

    hidden: int = 128
    size: int = 32
    batch: int = 32
    seed: int = 0

    def net(self, blocks: int) -> Chain:
        """So many blocks over three levels, with couplings that do something, initialised from a batch."""
        torch.manual_seed(self.seed)
        shape = (3, self.size, self.size)
        net = glow_classifier(shape, config=GlowConfig(levels=3, blocks=blocks // 3, hidden=self.hidden))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
            net(torch.randn(self.batch, *shape))
        return net.to(DEVICE).eval()

    def data(self) -> Tensor:
        """A batch of standard normal images."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.batch, 3, self.size, self.size, generator=generator).to(DEVICE)

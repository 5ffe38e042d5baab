"""The net of the performance claims: the affine Glow trunk, D = 3072 for images of 32 x 32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.singular_values import ExtremeSingularValues, extreme_singular_values
from inn_guard.layers.chain import Chain
from inn_guard.models.glow import GlowConfig, glow_classifier

__all__ = ["DEVICE", "Sizes"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Sizes:
    """Which net and which data."""

    hidden: int = 128  # channels of the couplings' networks
    levels: int = 3  # of the net
    size: int = 32  # height and width of the images
    batch: int = 32  # number of images
    seed: int = 0  # of weights and images

    def net(self, blocks: int) -> Chain:
        """A net of ``blocks`` blocks over all levels, perturbed and initialised from a batch."""
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

    @torch.no_grad()
    def extremes(self, net: Invertible, x: Tensor, *, tolerance: float) -> ExtremeSingularValues:
        """The extreme singular values of the Jacobian at every sample."""
        generator = torch.Generator().manual_seed(self.seed)
        return extreme_singular_values(
            Linearization(net, x), generator=generator, tolerance=tolerance
        )

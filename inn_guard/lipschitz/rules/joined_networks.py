"""SideBySide: a coupling's networks as one network, as the bound rules read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["SideBySide"]


class SideBySide(nn.Module):
    """A block's sub-networks as one: their outputs side by side, times a factor, with the condition joined to x."""

    def __init__(self, *networks: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.factor = factor

    def forward(
        self, x: Any, context: Any = None
    ) -> Any:  # read by torch.fx, whose proxies are no tensors
        """[network_1(x, context), network_2(x, context), ...]."""
        x = x if context is None else torch.cat([x, context], 1)
        outputs = [network(x) for network in self.networks]
        raw = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return raw if self.factor == 1.0 else raw * self.factor

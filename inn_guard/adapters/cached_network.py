"""CachedNetwork: a network that has been evaluated already, in a coupling that is inverted and differentiated at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["CachedNetwork"]


class CachedNetwork(nn.Module):
    """A network whose output is known already; all its other attributes are the network's own.

    Args:
        network: what was evaluated; its parameters stay registered.
        output: its value.
    """

    def __init__(self, network: nn.Module, output: Tensor) -> None:
        super().__init__()
        self.network, self.output = network, output

    def forward(self, *_: Any) -> Tensor:
        """The value, whatever is asked."""
        return self.output.clone()  # spline couplings divide it in place

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "network":
                raise
            return getattr(self.network, name)  # spline couplings scale by its hidden_features

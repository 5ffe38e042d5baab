"""CachedNetwork: a network that has been evaluated already, for couplings that need it twice."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["CachedNetwork", "with_modules"]

Module = TypeVar("Module", bound=nn.Module)


class CachedNetwork(nn.Module):
    """A network whose output is known; all its other attributes are the network's own.

    Args:
        network: what was evaluated; its parameters stay registered.
        output: its value.
    """

    def __init__(self, network: nn.Module, output: Tensor) -> None:
        super().__init__()
        self.network, self.output = network, output

    def forward(self, *_: Any) -> Tensor:
        """The known output, whatever the input is."""
        # a clone: spline couplings divide it in place
        return self.output.clone()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "network":
                raise
            # spline couplings scale by the network's hidden_features
            return getattr(self.network, name)


def with_modules(module: Module, modules: dict[str, nn.Module]) -> Module:
    """A shallow copy of ``module`` with these submodules in place of its own, by name."""
    clone = copy.copy(module)
    vars(clone)["_modules"] = {**module._modules, **modules}
    return clone

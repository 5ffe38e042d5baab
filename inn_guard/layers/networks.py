"""The sub-networks of the layers: plain feed-forward modules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from inn_guard.jacobian.network import InputSliceJacobian, NetworkJacobian, linearize_network

__all__ = ["MLP", "Conditional", "ConvNet", "zero_last"]

#: a class or function without arguments that makes an activation module
Activation = Callable[[], nn.Module]


class MLP(nn.Sequential):
    """Linear - activation - ... - Linear: (B, sizes[0]) -> (B, sizes[-1]).

    Args:
        sizes: widths from input to output, at least two.
        activation: makes the module between two linear layers.

    >>> MLP([2, 64, 64, 4])(torch.zeros(5, 2)).shape
    torch.Size([5, 4])
    """

    def __init__(self, sizes: Sequence[int], *, activation: Activation = nn.ReLU) -> None:
        if len(sizes) < 2:
            raise ValueError(f"expected at least an input and an output size, got {list(sizes)}")
        linear = [nn.Linear(n, m) for n, m in itertools.pairwise(sizes)]
        super().__init__(*_interleaved(linear, activation))


class ConvNet(nn.Sequential):
    """Zero-padded convolutions 3x3 - activation - 1x1 - activation - 3x3.

    (B, channels, H, W) -> (B, out, H, W). The conditioner of Glow's coupling layers.

    Args:
        channels: channels in.
        hidden: channels between.
        out: channels out.
        activation: makes the module between two convolutions.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma, Dhariwal, 2018), appendix B.
    """

    def __init__(
        self, channels: int, hidden: int, out: int, *, activation: Activation = nn.ReLU
    ) -> None:
        convolutions = [
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.Conv2d(hidden, hidden, 1),
            nn.Conv2d(hidden, out, 3, padding=1),
        ]
        super().__init__(*_interleaved(convolutions, activation))


class Conditional(nn.Module):
    """A network with a context: f(x, c) = network([x, c]), joined along dimension 1.

    Args:
        network: takes the joined channels.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """network([x, c]): c of shape (B, C) is repeated over the positions of an image x."""
        return self.network(self.joined(x, context))

    def linearize(self, x: Tensor, context: Tensor) -> NetworkJacobian:
        """The Jacobian with respect to x at this context."""
        joined = self.joined(x, context)
        held = joined.shape[1] - x.shape[1]
        return InputSliceJacobian(
            linearize_network(self.network, joined), channels=x.shape[1], held=held
        )

    @staticmethod
    def joined(x: Tensor, context: Tensor) -> Tensor:
        """x and c joined along dimension 1, c repeated over the positions of x."""
        while context.dim() < x.dim():
            context = context.unsqueeze(-1)
        return torch.cat([x, context.expand(*context.shape[:2], *x.shape[2:])], dim=1)


def zero_last(network: nn.Module) -> nn.Module:
    """``network`` with its last linear or convolutional module set to zero: the zero function.

    Raises:
        ValueError: if it has no such module.

    >>> float(zero_last(MLP([2, 8, 4]))(torch.ones(1, 2)).abs().sum())
    0.0
    """
    linear = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if not linear:
        raise ValueError(f"expected a network with a linear or convolutional module, got {network}")
    nn.init.zeros_(linear[-1].weight)
    if linear[-1].bias is not None:
        nn.init.zeros_(linear[-1].bias)
    return network


def _interleaved(linear: Sequence[nn.Module], activation: Activation) -> list[nn.Module]:
    """The modules with a new activation between each two of them."""
    modules: list[nn.Module] = [linear[0]]
    for module in linear[1:]:
        modules += [activation(), module]
    return modules

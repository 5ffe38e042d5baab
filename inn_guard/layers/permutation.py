"""Permutation of channels or features."""

from __future__ import annotations

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.layers.linear import PermutationJacobian

__all__ = ["Permutation"]


class Permutation(Invertible):
    """z_k = x_order(k) along dimension 1; log|det J| = 0.

    Args:
        order: every index from 0 to channels - 1 once.

    >>> Permutation(torch.tensor([2, 0, 1]))(torch.tensor([[10.0, 20.0, 30.0]])).tolist()
    [[30.0, 10.0, 20.0]]
    """

    order: Tensor
    back: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        every_index = torch.arange(order.numel(), device=order.device)
        if order.dim() != 1 or not torch.equal(order.sort().values, every_index):
            raise ValueError(f"expected every index from 0 to n - 1 once, got {order.tolist()}")
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    @classmethod
    def reverse(cls, channels: int) -> Permutation:
        """The layer that reverses the order of the channels."""
        return cls(torch.arange(channels).flip(0))

    @classmethod
    def shuffle(cls, channels: int, *, generator: torch.Generator) -> Permutation:
        """A layer with a random order, drawn once."""
        return cls(torch.randperm(channels, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """z = x[:, order]."""
        return x.index_select(1, self.order)

    def inverse(self, z: Tensor) -> Tensor:
        """x = z[:, back]."""
        return z.index_select(1, self.back)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and the log-determinant 0, (B,)."""
        return self.forward(x), x.new_zeros(len(x))

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and the log-determinant 0, (B,)."""
        return self.inverse(z), z.new_zeros(len(z))

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The permutation itself: its transpose is its inverse."""
        # counted from the end: vectors may have more leading dimensions than x
        channels = 1 - x.dim()

        def forward(v: Tensor) -> Tensor:
            return v.index_select(channels, self.order)

        def inverse(u: Tensor) -> Tensor:
            return u.index_select(channels, self.back)

        return PermutationJacobian.of_moves(x.detach(), forward, inverse)

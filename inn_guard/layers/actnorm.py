"""Learned diagonal maps of channels: Diagonal, and ActNorm, whose first batch initialises it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.core.tensors import per_channel
from inn_guard.layers.linear import ElementwiseJacobian

__all__ = ["ActNorm", "Diagonal"]


class Diagonal(Invertible):
    """z_c = exp(log_scale_c) x_c + shift_c for every channel c.

    log|det J| = positions * sum_c log_scale_c. Starts as the identity.

    Args:
        channels: size of dimension 1.

    >>> Diagonal(2)(torch.tensor([[3.0, 4.0]])).tolist()
    [[3.0, 4.0]]
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """z = scale * x + shift."""
        return x * self._over(x, self.log_scale.exp()) + self._over(x, self.shift)

    def inverse(self, z: Tensor) -> Tensor:
        """x = (z - shift) / scale."""
        return (z - self._over(z, self.shift)) / self._over(z, self.log_scale.exp())

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and positions * sum log_scale."""
        return self.forward(x), self._log_det(x)

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and -positions * sum log_scale."""
        return self.inverse(z), -self._log_det(z)

    def linearize(self, x: Tensor) -> LayerJacobian:
        """Multiplication with the scale."""
        with torch.no_grad():
            return ElementwiseJacobian(self.forward(x), self._over(x, self.log_scale.exp()))

    def _log_det(self, x: Tensor) -> Tensor:
        positions = x.shape[2:].numel()
        return (self.log_scale.sum() * positions).expand(len(x))

    @staticmethod
    def _over(x: Tensor, channels: Tensor) -> Tensor:
        """One value per channel in a shape that broadcasts against x."""
        # without this check a wrong number of channels could broadcast silently
        if x.dim() < 2 or x.shape[1] != len(channels):
            raise ValueError(f"expected (B, {len(channels)}, ...), got {tuple(x.shape)}")
        return per_channel(channels, x)


class ActNorm(Diagonal):
    """A Diagonal whose first training batch gives each output channel mean 0 and variance 1.

    That happens once, in training mode, in a forward pass over at least two values per channel, all
    of them finite. Until then an ActNorm is the identity, also in evaluation mode and in the
    inverse. The buffer ``initialized`` tells whether it has happened.

    Args:
        channels: size of dimension 1.
        eps: added to the standard deviation.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma, Dhariwal, 2018),
        section 3.1.
    """

    initialized: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-6) -> None:
        super().__init__(channels)
        self.eps = eps
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """z = scale * x + shift; the first training batch sets scale and shift."""
        if self.training and not self.initialized:
            self._initialize(x.detach())
        return super().forward(x)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        """Set scale and shift from this batch, unless it does not determine them."""
        values = x.transpose(0, 1).flatten(1)
        if values.shape[1] < 2:
            return
        deviation, mean = torch.std_mean(values, dim=1, correction=0)
        # a batch with NaN would spoil the parameters for good: the next one initialises them
        if not (deviation + mean).isfinite().all():
            return
        self.log_scale.copy_(-(deviation + self.eps).log())
        self.shift.copy_(-mean * self.log_scale.exp())
        self.initialized.logical_not_()  # from False to True

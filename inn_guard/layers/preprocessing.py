"""Logit preprocessing of data in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.layers.linear import ElementwiseJacobian

__all__ = ["Logit"]


class Logit(Invertible):
    """z = logit(p) with p = alpha + (1 - 2 alpha) x.

    log|det J| = sum log(1 - 2 alpha) - log p - log(1 - p). Data outside [0, 1] may give values that
    are not finite; they are not clamped.

    Args:
        alpha: keeps p away from 0 and 1.

    References:
        Density estimation using Real NVP (Dinh, Sohl-Dickstein, Bengio, 2017), section 4.1.

    >>> Logit(0.1)(torch.tensor([[0.5]])).tolist()
    [[0.0]]
    """

    def __init__(self, alpha: float = 1e-6) -> None:
        super().__init__()
        if not 0 <= alpha < 0.5:
            raise ValueError(f"expected alpha in [0, 0.5), got {alpha}")
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        """z = logit(alpha + (1 - 2 alpha) x)."""
        return torch.logit(self._inside(x))

    def inverse(self, z: Tensor) -> Tensor:
        """x = (sigmoid(z) - alpha) / (1 - 2 alpha)."""
        return (torch.sigmoid(z) - self.alpha) / (1 - 2 * self.alpha)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and the sum of log dz/dx, (B,)."""
        return self.forward(x), self._slope(x).log().flatten(1).sum(1)

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and the sum of log dx/dz, (B,)."""
        # log p + log(1 - p) from z: finite also where p rounds to 0 or 1
        log_slope = functional.logsigmoid(z) + functional.logsigmoid(-z)
        log_width = z.new_tensor(1 - 2 * self.alpha).log()
        return self.inverse(z), (log_slope - log_width).flatten(1).sum(1)

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The Jacobian at x: multiplication with dz/dx."""
        return ElementwiseJacobian(self.forward(x.detach()), self._slope(x.detach()))

    def _inside(self, x: Tensor) -> Tensor:
        return self.alpha + (1 - 2 * self.alpha) * x

    def _slope(self, x: Tensor) -> Tensor:
        p = self._inside(x)
        return (1 - 2 * self.alpha) / (p * (1 - p))

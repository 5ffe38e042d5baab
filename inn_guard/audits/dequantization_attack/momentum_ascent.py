"""Ascent: average what the noisy gradients agree on, then draw where they lead."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.dequantization_attack.search import Search
from inn_guard.audits.dequantization_attack.sign_ascent import SignAscent, Uphill, unit

__all__ = ["Ascent"]


@dataclass(frozen=True)
class Ascent(SignAscent):
    """Shrinking sign steps along a running mean of normalised gradients; then draws around the end.

    The gradient of the reconstruction error is a signal (where the inverse amplifies more) under
    rounding noise of the same size, drawn afresh at every point. A running mean of directions keeps
    the first and forgets the second.

    Attributes:
        momentum: weight of the mean so far.

    References:
        Boosting Adversarial Attacks with Momentum (Dong et al., 2018).
    """

    momentum: float | int = 0.9

    def uphill(self, search: Search, start: Tensor) -> Uphill:
        """The mean of the gradients' directions so far."""
        mean = torch.zeros_like(start)

        def slope(x: Tensor) -> Tensor:
            nonlocal mean
            mean = self.momentum * mean + unit(search.gradient(x).to_x)
            return mean

        return slope

"""Chains of linear maps and slopes, and a certified bound of their norm: LipSDP per neuron, without an SDP solver.

The Jacobian of a feed-forward network is W_l Sigma_{l-1} W_{l-1} ... Sigma_1 W_1 with diagonal Sigma_i whose entries
lie in [lower, upper]. A chain bounds its norm over ALL such Sigma. Channels that are passed on (skip connections, the
kept part of a coupling, a whole additive network) are neurons of slope exactly one, so one chain may be a whole flow.

Let Q be any matrix with J J^T <= Q for the Jacobian J of the state reached so far. With the new pre-activations
W (state), S = W Q W^H, M = (upper + lower) / 2, R = (upper - lower) / 2, any diagonal D with N = D - S > 0 gives

    state' = [kept; sigma(W state)]:   Q' = [[P, 0], [0, R^2 D - M D M]] + V^H N^-1 V,   V = [C, D M]

where P and C are the rows of Q and of W Q that belong to the kept channels. Proof: write the increments as
dv = M z + R q with |q_j| <= |z_j|; z^T (D^-1 weighted S-procedure) as in LipSDP-Neuron; Woodbury's identity. D free of
choice is what an optimiser chooses; every D is a proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Chain", "Layer", "Multipliers"]

Multipliers: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """state -> [state[keep]; sigma(weight @ state)], with slopes of sigma in [lower, upper].

    Attributes:
        keep: indices of the state that are passed on, (k,).
        weight: (1, n, m), or (frequencies, n, m) of a convolution on a torus; float64 or complex128.
        lower: least slopes, (n,).
        upper: largest slopes, (n,).
        error: Frobenius norm of what is not known about each frequency's weight.
    """

    keep: Tensor
    weight: Tensor
    lower: Tensor
    upper: Tensor
    error: float = 0.0

    @property
    def mean(self) -> Tensor:
        """M."""
        return (self.lower + self.upper) / 2

    @property
    def half_width(self) -> Tensor:
        """R."""
        return (self.upper - self.lower) / 2


@dataclass(frozen=True)
class Chain:
    """Layers one after the other, then a linear map of the last state.

    Attributes:
        size: of the first state.
        layers: in order.
        output: (1 or frequencies, out, m): the result from the last state.
        error: Frobenius norm of what is not known about each frequency's output matrix.
    """

    size: int
    layers: tuple[Layer, ...]
    output: Tensor
    error: float = 0.0
    notes: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def frequencies(self) -> int:
        """How many independent problems share the slopes."""
        return max([len(layer.weight) for layer in self.layers] + [len(self.output)])

    def at(self, frequencies: Tensor) -> Chain:
        """The same chain at some frequencies only."""
        layers = tuple(
            Layer(layer.keep, _pick(layer.weight, frequencies), layer.lower, layer.upper, layer.error)
            for layer in self.layers
        )
        return Chain(self.size, layers, _pick(self.output, frequencies), self.error)

    def jacobian(self, slopes: Sequence[Tensor]) -> Tensor:
        """W_l Sigma ... W_1 for given slopes: what every bound must dominate. (frequencies, out, size)."""
        state = torch.eye(self.size, dtype=self.output.dtype)[None]
        for layer, sigma in zip(self.layers, slopes, strict=True):
            fresh = sigma[:, None] * (layer.weight @ state.to(layer.weight.dtype))
            kept = state[:, layer.keep].to(fresh.dtype).expand(len(fresh), -1, -1)
            state = torch.cat([kept, fresh], 1)
        return self.output @ state.to(self.output.dtype)


def _pick(matrix: Tensor, frequencies: Tensor) -> Tensor:
    return matrix if len(matrix) == 1 else matrix[frequencies]

"""Chains of linear maps and slopes, whose norm LipSDP bounds per neuron, without an SDP solver.

The Jacobian of a feed-forward network is W_l Sigma_{l-1} W_{l-1} ... Sigma_1 W_1 with diagonal
Sigma_i whose entries lie in [lower, upper]. A bound of a chain holds for ALL such Sigma. Channels
that are passed on (skip connections, the identity part of a coupling, a whole additive network) are
neurons of slope exactly one, so a chain may be a whole flow.

Let Q be any matrix with J J^T <= Q for the Jacobian J of the state reached so far. With the new
pre-activations W (state), S = W Q W^H, M = (upper + lower) / 2, R = (upper - lower) / 2, any
diagonal D with N = D - S > 0 gives

    state' = [K state; sigma(W state)]
    Q' = [[P, 0], [0, R^2 D - M D M]] + V^H N^-1 V,   V = [C, D M]

where P = K Q K^H and C = W Q K^H belong to the part K of the state that is passed on. K is any
linear map, so a layer without neurons can drop parts of the state. Proof: write the increments as
dv = M z + R q with |q_j| <= |z_j|; z^T (D^-1 weighted S-procedure) as in LipSDP-Neuron; Woodbury's
identity. Every D is a proof; an optimiser looks for a good one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Chain", "Layer", "Multipliers", "product"]

OVERHEAD = 1e6  #: operations in the time that the calls of one small layer take

Multipliers: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """state -> [keep @ state; sigma(weight @ state)], with slopes of sigma in [lower, upper].

    Attributes:
        keep: what is passed on, (1 or frequencies, k, m): rows of the identity, or any linear map
            of the state.
        weight: (1, n, m), or (frequencies, n, m) of a convolution on a torus; float64 or
            complex128.
        lower: least slopes, (n,).
        upper: largest slopes, (n,).
        error: bound of the Frobenius norm of the error of each frequency's [keep; weight].
    """

    keep: Tensor
    weight: Tensor
    lower: Tensor
    upper: Tensor
    error: float = 0.0

    @property
    def joint(self) -> Tensor:
        """[keep; weight], (1 or frequencies, k + n, m)."""
        dtype = torch.promote_types(self.keep.dtype, self.weight.dtype)
        count = max(len(self.keep), len(self.weight))
        keep = self.keep.to(dtype).expand(count, -1, -1)
        weight = self.weight.to(dtype).expand(count, -1, -1)
        return torch.cat([keep, weight], 1)

    @property
    def mean(self) -> Tensor:
        """M = (lower + upper) / 2."""
        return (self.lower + self.upper) / 2

    @property
    def half_width(self) -> Tensor:
        """R = (upper - lower) / 2."""
        return (self.upper - self.lower) / 2


@dataclass(frozen=True)
class Chain:
    """Layers one after the other, then a linear map of the last state.

    Attributes:
        size: entries of the first state.
        layers: layers in order.
        output: map from the last state to the output, (1 or frequencies, out, m).
        error: bound of the Frobenius norm of the error of each frequency's output matrix.
    """

    size: int
    layers: tuple[Layer, ...]
    output: Tensor
    error: float = 0.0

    @property
    def frequencies(self) -> int:
        """How many independent problems share the slopes."""
        count = len(self.output)
        for layer in self.layers:
            count = max(count, len(layer.weight), len(layer.keep))
        return count

    @property
    def width(self) -> int:
        """The largest number of neurons in a layer."""
        return max([0, *[len(layer.lower) for layer in self.layers]])

    @property
    def operations(self) -> float:
        """About how many floating-point operations one evaluation of a bound takes."""
        total, rank, shared, frequencies = 1e6, self.size, 0, 1
        for layer in self.layers:
            n, m = layer.weight.shape[1:]
            rows = layer.keep.shape[1] + n
            own = max(len(layer.keep), len(layer.weight))
            frequencies = max(frequencies, own)
            # the base appears with the second layer; all frequencies share it until a convolution
            shared = max(shared, own) if shared else 1
            total += (
                8.0 * frequencies * rows * (m + 2 * n) * rank
                + 10.0 * shared * rows**2 * max(rows, m)
                + OVERHEAD
            )
            if rows <= 2 * rank:
                total, rank, shared = total + 8.0 * frequencies * rows**3, rows, 0
        return total

    def at(self, frequencies: Tensor) -> Chain:
        """The same chain at some frequencies only."""
        layers = []
        for layer in self.layers:
            keep, weight = _pick(layer.keep, frequencies), _pick(layer.weight, frequencies)
            layers.append(replace(layer, keep=keep, weight=weight))
        return Chain(self.size, tuple(layers), _pick(self.output, frequencies), self.error)

    def jacobian(self, slopes: Sequence[Tensor]) -> Tensor:
        """W_l Sigma ... W_1 for given slopes, (frequencies, out, size)."""
        state = torch.eye(self.size, dtype=self.output.dtype)[None]
        for layer, sigma in zip(self.layers, slopes, strict=True):
            ones = torch.ones(layer.keep.shape[1], dtype=torch.float64)
            state = torch.cat([ones, sigma])[:, None] * product(layer.joint, state)
        return product(self.output, state)


def _pick(matrix: Tensor, frequencies: Tensor) -> Tensor:
    if len(matrix) == 1:
        return matrix
    return matrix[frequencies]


def product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B; a real A is not made complex for a complex B."""
    if A.dtype == B.dtype:
        return A @ B
    if not A.is_complex() and B.is_complex() and not B.is_conj():
        pairs = torch.view_as_real(B.contiguous()).flatten(-2)
        return torch.view_as_complex((A @ pairs).unflatten(-1, (B.shape[-1], 2)).contiguous())
    return A.to(torch.complex128) @ B.to(torch.complex128)

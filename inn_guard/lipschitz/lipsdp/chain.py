"""Chains of linear maps and slopes, and a certified bound of their norm: LipSDP per neuron, without an SDP solver.

The Jacobian of a feed-forward network is W_l Sigma_{l-1} W_{l-1} ... Sigma_1 W_1 with diagonal Sigma_i whose entries
lie in [lower, upper]. A chain bounds its norm over ALL such Sigma. Channels that are passed on (skip connections, the
kept part of a coupling, a whole additive network) are neurons of slope exactly one, so one chain may be a whole flow.

Let Q be any matrix with J J^T <= Q for the Jacobian J of the state reached so far. With the new pre-activations
W (state), S = W Q W^H, M = (upper + lower) / 2, R = (upper - lower) / 2, any diagonal D with N = D - S > 0 gives

    state' = [K state; sigma(W state)]:   Q' = [[P, 0], [0, R^2 D - M D M]] + V^H N^-1 V,   V = [C, D M]

where P = K Q K^H and C = W Q K^H belong to what is passed on; K is linear, so a layer without neurons is any linear
map of the state, and forgets what nothing will need. Proof: write the increments as
dv = M z + R q with |q_j| <= |z_j|; z^T (D^-1 weighted S-procedure) as in LipSDP-Neuron; Woodbury's identity. D free of
choice is what an optimiser chooses; every D is a proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Chain", "Layer", "Multipliers", "product"]

Multipliers: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """state -> [keep @ state; sigma(weight @ state)], with slopes of sigma in [lower, upper].

    Attributes:
        keep: what is passed on, (1 or frequencies, k, m): rows of the identity, or any linear map of the state.
        weight: (1, n, m), or (frequencies, n, m) of a convolution on a torus; float64 or complex128.
        lower: least slopes, (n,).
        upper: largest slopes, (n,).
        error: Frobenius norm of what is not known about each frequency's [keep; weight].
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
        return torch.cat(
            [part.to(dtype).expand(count, -1, -1) for part in (self.keep, self.weight)], 1
        )

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
        counts = [max(len(layer.weight), len(layer.keep)) for layer in self.layers]
        return max([*counts, len(self.output)])

    @property
    def operations(self) -> float:
        """About how many floating-point operations one evaluation of a bound takes."""
        total, rank, shared, frequencies = 1e6, self.size, 0, 1
        for layer in self.layers:
            rows, n, m = layer.keep.shape[1] + layer.weight.shape[1], *layer.weight.shape[1:]
            own = max(len(layer.keep), len(layer.weight))
            frequencies = max(frequencies, own)
            shared = max(shared, own) if shared else 1
            total += (
                8.0 * frequencies * rows * (m + 2 * n) * rank
                + 10.0 * shared * rows**2 * max(rows, m)
                + 1e5
            )
            if rows <= 2 * rank:
                total, rank, shared = total + 8.0 * frequencies * rows**3, rows, 0
        return total

    def at(self, frequencies: Tensor) -> Chain:
        """The same chain at some frequencies only."""
        layers = tuple(
            replace(
                layer, keep=_pick(layer.keep, frequencies), weight=_pick(layer.weight, frequencies)
            )
            for layer in self.layers
        )
        return Chain(self.size, layers, _pick(self.output, frequencies), self.error)

    def jacobian(self, slopes: Sequence[Tensor]) -> Tensor:
        """W_l Sigma ... W_1 for given slopes: what every bound must dominate. (frequencies, out, size)."""
        state = torch.eye(self.size, dtype=self.output.dtype)[None]
        for layer, sigma in zip(self.layers, slopes, strict=True):
            joint = torch.promote_types(layer.weight.dtype, state.dtype)
            fresh = sigma[:, None] * (layer.weight.to(joint) @ state.to(joint))
            dtype = torch.promote_types(layer.keep.dtype, state.dtype)
            kept = layer.keep.to(dtype) @ state.to(dtype)
            dtype, count = torch.promote_types(dtype, fresh.dtype), max(len(kept), len(fresh))
            state = torch.cat([part.to(dtype).expand(count, -1, -1) for part in (kept, fresh)], 1)
        joint = torch.promote_types(self.output.dtype, state.dtype)
        return self.output.to(joint) @ state.to(joint)


def _pick(matrix: Tensor, frequencies: Tensor) -> Tensor:
    return matrix if len(matrix) == 1 else matrix[frequencies]


def product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B; a real A is not made complex for a complex B."""
    if A.dtype == B.dtype:
        return A @ B
    if not A.is_complex() and B.is_complex() and not B.is_conj():
        pairs = torch.view_as_real(B.contiguous()).flatten(-2)
        return torch.view_as_complex((A @ pairs).unflatten(-1, (B.shape[-1], 2)).contiguous())
    return A.to(torch.complex128) @ B.to(torch.complex128)

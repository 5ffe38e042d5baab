"""Tangents of foreign layers whose structure is known: what the adapters build them from, and how they are proved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.layers.coupling_tangent import CouplingTangent
from inn_guard.layers.linear_tangent import MovingTangent
from inn_guard.layers.partition import Partition
from inn_guard.network_tangent import NetworkTangent
from inn_guard.tangent import INEXACT, ROUNDING, Map, Tangent, probes

__all__ = ["Features", "Reordered", "TangentChain", "agrees", "coupling_tangent", "known_tangent", "moving_tangent"]


@singledispatch
def known_tangent(module: nn.Module, x: Tensor, context: Any) -> Tangent | None:
    """The tangent at x of a foreign module by its class; None where its structure is not known."""
    return None


def agrees(tangent: Tangent, forward: Map, x: Tensor) -> bool:
    """Whether the tangent's output and J^T u, for a random u, are those of ``forward`` by autograd, up to rounding."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        z = forward(leaf)
    if z.shape != tangent.output.shape or not z.requires_grad:
        return False
    (u,) = probes(tangent.output)
    (pulled,) = torch.autograd.grad(z, leaf, u)
    return _close(tangent.output, z.detach()) and _close(tangent.vjp(u), pulled)


def _close(actual: Tensor, expected: Tensor) -> bool:
    tolerance = min(INEXACT, ROUNDING * torch.finfo(expected.dtype).eps * math.sqrt(expected[0].numel()))
    gap = (actual - expected).flatten(1).double().norm(dim=1)
    return bool((gap <= tolerance * expected.flatten(1).double().norm(dim=1)).all())


class Features:
    """The channels (features) with these indices are kept, the others changed.

    Args:
        kept: indices along dimension 1.
        changed: the other indices.
    """

    def __init__(self, kept: Tensor, changed: Tensor) -> None:
        self.kept, self.changed = kept, changed
        self._order = torch.cat([kept, changed]).argsort()

    def split(self, x: Tensor, *, dims: int) -> tuple[Tensor, Tensor]:
        """(kept, changed)."""
        return x.index_select(x.dim() + 1 - dims, self.kept), x.index_select(x.dim() + 1 - dims, self.changed)

    def join(self, kept: Tensor, changed: Tensor, *, dims: int) -> Tensor:
        """Both in their places."""
        return torch.cat([kept, changed], dim=1 - dims).index_select(kept.dim() + 1 - dims, self._order)

    def restrict(self, parameter: Tensor, *, neutral: float) -> Tensor:
        """The parameter itself: it has entries for changed ones only."""
        return parameter


class Reordered:
    """The tangent of a network with output [s, t], as that of [factor * t, s].

    Args:
        network: the tangent of [s, t].
        factor: of t.
    """

    def __init__(self, network: NetworkTangent, *, factor: float = 1.0) -> None:
        self._network, self._factor = network, factor
        self._dim = 1 - network.output.dim()
        self.output = self.jvp_like(network.output)

    def jvp(self, v: Tensor) -> Tensor:
        """J v."""
        return self.jvp_like(self._network.jvp(v))

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u."""
        shift, h = u.chunk(2, dim=self._dim)
        return self._network.vjp(torch.cat([h, self._factor * shift], dim=self._dim))

    def jvp_like(self, raw: Tensor) -> Tensor:
        """[factor * t, s] of [s, t]."""
        h, shift = raw.chunk(2, dim=self._dim)
        return torch.cat([self._factor * shift, h], dim=self._dim)


class TangentChain:
    """Several tangents, one after the other, first one first."""

    def __init__(self, tangents: Sequence[Tangent]) -> None:
        self._tangents = tuple(tangents)
        self.output = self._tangents[-1].output

    def jvp(self, v: Tensor) -> Tensor:
        """J v."""
        for tangent in self._tangents:
            v = tangent.jvp(v)
        return v

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u."""
        for tangent in reversed(self._tangents):
            u = tangent.vjp(u)
        return u

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """J^-1 u."""
        for tangent in reversed(self._tangents):
            u = tangent.inverse_jvp(u)
        return u

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """J^-T v."""
        for tangent in self._tangents:
            v = tangent.inverse_vjp(v)
        return v


def coupling_tangent(x: Tensor, network: NetworkTangent, partition: Partition, scale: Map | None) -> CouplingTangent:
    """Of z_kept = x_kept, z_changed = x_changed * g(s) + t at x.

    Args:
        x: where.
        network: the tangent of [t, s] at the kept part, or of t alone.
        partition: splits x and z.
        scale: g, elementwise; None where it is one.
    """
    kept, changed = partition.split(x, dims=x.dim())
    if scale is None:
        return CouplingTangent(partition.join(kept, changed + network.output, dims=x.dim()), network, partition)
    shift, h = network.output.chunk(2, dim=1)
    leaf = h.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = scale(leaf)
    (slope,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    value = value.detach()
    z = partition.join(kept, changed * value + shift, dims=x.dim())
    return CouplingTangent(z, network, partition, scale=value, gain=changed * slope)


def moving_tangent(x: Tensor, ahead: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> MovingTangent:
    """Of a map that moves entries only, at x; both directions take leading dimensions."""
    rows = ahead(torch.arange(x[0].numel(), device=x.device).reshape(1, *x.shape[1:])).flatten()
    return MovingTangent(ahead(x), ahead, back, inverse_jvp=back, inverse_vjp=ahead, shape=x.shape, rows=rows)

"""Tangents of foreign layers whose structure is known: what the adapters build them from, and how they are proved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from inn_guard.core.layer_jacobian import INEXACT, ROUNDING, LayerJacobian, Map, random_vectors
from inn_guard.jacobian.network import NetworkJacobian
from inn_guard.layers.coupling import CouplingJacobian
from inn_guard.layers.linear import ChannelMixingJacobian, PermutationJacobian
from inn_guard.layers.partition import Partition

__all__ = [
    "Features",
    "PermutedOutputs",
    "SelectedOutputs",
    "SwappedOutputs",
    "ChainJacobian",
    "agrees",
    "coupling_jacobian",
    "known_jacobian",
    "channel_mixing_jacobian",
    "permutation_jacobian",
]


@singledispatch
def known_jacobian(module: nn.Module, x: Tensor, context: Any) -> LayerJacobian | None:
    """The tangent at x of a foreign module by its class; None where its structure is not known."""
    return None


def agrees(tangent: LayerJacobian, forward: Map, x: Tensor) -> bool:
    """Whether the tangent's output and J^T u, for a random u, are those of ``forward`` by autograd, up to rounding."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        z = forward(leaf)
    if z.shape != tangent.output.shape or not z.requires_grad:
        return False
    (u,) = random_vectors(tangent.output)
    (pulled,) = torch.autograd.grad(z, leaf, u)
    return _close(tangent.output, z.detach()) and _close(tangent.vjp(u), pulled)


def _close(actual: Tensor, expected: Tensor) -> bool:
    tolerance = min(
        INEXACT, ROUNDING * torch.finfo(expected.dtype).eps * math.sqrt(expected[0].numel())
    )
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
        return x.index_select(x.dim() + 1 - dims, self.kept), x.index_select(
            x.dim() + 1 - dims, self.changed
        )

    def join(self, kept: Tensor, changed: Tensor, *, dims: int) -> Tensor:
        """Both in their places."""
        return torch.cat([kept, changed], dim=1 - dims).index_select(
            kept.dim() + 1 - dims, self._order
        )

    def restrict(self, parameter: Tensor, *, neutral: float) -> Tensor:
        """The parameter itself: it has entries for changed ones only."""
        return parameter


class PermutedOutputs:
    """The tangent of a network with output [s, t], as that of [factor * t, s].

    Args:
        network: the tangent of [s, t].
        factor: of t.
    """

    def __init__(self, network: NetworkJacobian, *, factor: float = 1.0) -> None:
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


class SelectedOutputs:
    """The tangent of a network, as that of its output channels in another order.

    Args:
        network: the tangent.
        order: new channel i is old channel order[i], along dimension 1.
    """

    def __init__(self, network: NetworkJacobian, order: Tensor) -> None:
        self._network, self._order, self._back = network, order, order.argsort()
        self._dim = 1 - network.output.dim()
        self.output = network.output.index_select(self._dim, order)

    @classmethod
    def deinterleaved(cls, network: NetworkJacobian) -> SelectedOutputs:
        """Of [t_1, s_1, t_2, s_2, ...] as [t, s]."""
        channels = torch.arange(network.output.shape[1], device=network.output.device)
        return cls(network, torch.cat([channels[0::2], channels[1::2]]))

    def jvp(self, v: Tensor) -> Tensor:
        """J v."""
        return self._network.jvp(v).index_select(self._dim, self._order)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u."""
        return self._network.vjp(u.index_select(self._dim, self._back))


class SwappedOutputs:
    """The tangent of the inverse of a map, from the tangent of the map at z.

    Args:
        tangent: of z -> x.
        z: the inverse map's value at x.
    """

    def __init__(self, tangent: LayerJacobian, z: Tensor) -> None:
        self.output = z
        self.jvp, self.vjp = tangent.inverse_jvp, tangent.inverse_vjp
        self.inverse_jvp, self.inverse_vjp = tangent.jvp, tangent.vjp


class ChainJacobian:
    """Several tangents, one after the other, first one first."""

    def __init__(self, tangents: Sequence[LayerJacobian]) -> None:
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


def coupling_jacobian(
    x: Tensor, network: NetworkJacobian, partition: Partition, scale: Map | None
) -> CouplingJacobian:
    """Of z_kept = x_kept, z_changed = x_changed * g(s) + t at x.

    Args:
        x: where.
        network: the tangent of [t, s] at the kept part, or of t alone.
        partition: splits x and z.
        scale: g, elementwise; None where it is one.
    """
    kept, changed = partition.split(x, dims=x.dim())
    if scale is None:
        return CouplingJacobian(
            partition.join(kept, changed + network.output, dims=x.dim()), network, partition
        )
    shift, h = network.output.chunk(2, dim=1)
    leaf = h.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = scale(leaf)
    (slope,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    value = value.detach()
    z = partition.join(kept, changed * value + shift, dims=x.dim())
    return CouplingJacobian(z, network, partition, scale=value, gain=changed * slope)


def permutation_jacobian(
    x: Tensor, ahead: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> PermutationJacobian:
    """Of a map that moves entries only, at x; both directions take leading dimensions."""
    rows = ahead(torch.arange(x[0].numel(), device=x.device).reshape(1, *x.shape[1:])).flatten()
    return PermutationJacobian(
        ahead(x), ahead, back, inverse_jvp=back, inverse_vjp=ahead, shape=x.shape, rows=rows
    )


def channel_mixing_jacobian(x: Tensor, weight: Tensor, shift: Tensor | None = None) -> ChannelMixingJacobian:
    """Of z = W x + b over the channels, at every pixel, at x; all products take leading dimensions."""
    dims = x.dim()

    def mix(v: Tensor, matrix: Tensor) -> Tensor:
        return functional.linear(v.movedim(1 - dims, -1), matrix).movedim(-1, 1 - dims)

    inverse = torch.linalg.inv_ex(
        weight
    ).inverse  # of a singular W not finite or wrong, which its check finds
    output = mix(x, weight)
    return ChannelMixingJacobian(
        output=output if shift is None else output + shift.reshape(-1, *[1] * (dims - 2)),
        jvp=lambda v: mix(v, weight),
        vjp=lambda u: mix(u, weight.T),
        inverse_jvp=lambda u: mix(u, inverse),
        inverse_vjp=lambda v: mix(v, inverse.T),
        shape=x.shape,
        weight=weight,
    )

"""Additive and affine coupling layers."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.core.readable import is_plain
from inn_guard.jacobian.network import (
    AutogradNetwork,
    NetworkJacobian,
    linearize_network,
    select_rows_of,
)
from inn_guard.jacobian.network_dense import add_product_
from inn_guard.jacobian.network_products import network_in_dtype
from inn_guard.layers.networks import Conditional
from inn_guard.layers.partition import Halves, Partition
from inn_guard.layers.scales import ScaleFunction, SigmoidScale

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "Coupling",
    "CouplingJacobian",
    "NetworkMaker",
    "ScaleAndShift",
]

Self = TypeVar("Self", bound="Coupling")
#: (channels in, channels out) -> a network
NetworkMaker = Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class ScaleAndShift:
    """The map that a coupling layer applies to its transformed part: t -> t * scale + shift.

    Attributes:
        shift: of the shape of the transformed part.
        scale: of the same shape, or None where it is one.
        log_scale: its logarithm, or None where that is zero.
    """

    shift: Tensor
    scale: Tensor | None = None
    log_scale: Tensor | None = None

    def forward(self, transformed: Tensor) -> Tensor:
        """t * scale + shift, with t the transformed part."""
        if self.scale is None:
            return transformed + self.shift
        return transformed * self.scale + self.shift

    def inverse(self, transformed: Tensor) -> Tensor:
        """(t - shift) / scale, with t the transformed part of the output."""
        if self.scale is None:
            return transformed - self.shift
        return (transformed - self.shift) / self.scale

    def log_det(self) -> Tensor:
        """The sum of the logarithms of the scale, (B,)."""
        if self.log_scale is None:
            return self.shift.new_zeros(len(self.shift))
        return self.log_scale.flatten(1).sum(1)


class Coupling(Invertible):
    """z1 = x1, z2 = x2 * scale + shift; scale and shift depend on the identity part x1 only.

    The identity part is the same before and after the layer. So one evaluation of the network at it
    serves the forward pass, the inverse and their gradients::

        identity, transformed = layer.split(z)
        elementwise = layer.parameters_of(identity)
        x = layer.join(identity, elementwise.inverse(transformed))

    A layer with a context calls ``network(x1, context)``, one without ``network(x1)``.

    Args:
        network: from the identity part to the raw parameters.
        partition: which part is the identity part. Default: the first half of the channels.
    """

    #: set by ``with_cached_conditioner`` only: the network has been evaluated already
    _cached: ScaleAndShift | None = None

    def __init__(self, network: nn.Module, *, partition: Partition | None = None) -> None:
        super().__init__()
        self.network = network
        self.partition: Partition = Halves() if partition is None else partition

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(identity part, transformed part) of an input x or an output z."""
        return self.partition.split(x, dims=x.dim())

    def join(self, identity: Tensor, transformed: Tensor) -> Tensor:
        """The x that splits into ``identity`` and ``transformed``."""
        return self.partition.join(identity, transformed, dims=identity.dim())

    def raw(self, identity: Tensor) -> Tensor:
        """The network's output at the identity part, and at the context if there is one."""
        if self.context is None:
            return self.network(identity)
        return self.network(identity, self.context)

    @abc.abstractmethod
    def elementwise(self, raw: Tensor) -> ScaleAndShift:
        """What the network's output does to the transformed part."""

    def parameters_of(self, identity: Tensor) -> ScaleAndShift:
        """The map of the transformed part, from one evaluation of the network."""
        if self._cached is not None:
            return self._cached
        return self.elementwise(self.raw(identity))

    def with_cached_conditioner(self: Self, state: Tensor) -> Self:
        """The layer with its network evaluated once, at the identity part of ``state``."""
        clone = copy.copy(self)
        identity, _ = self.split(state)
        clone._cached = self.parameters_of(identity)
        return clone

    def gain(self, raw: Tensor, transformed: Tensor) -> Tensor | None:
        """The derivative of z2 with respect to s, elementwise. Default: None, there is no s."""
        return None

    @torch.no_grad()
    def linearize(self, x: Tensor) -> LayerJacobian:
        """The four products from one evaluation of the network; no graph if it is feed-forward."""
        identity, transformed = self.split(x.detach())
        network = self._network_jacobian(identity)
        elementwise = self.elementwise(network.output)
        gain = self.gain(network.output, transformed)
        z = self.join(identity, elementwise.forward(transformed))
        return CouplingJacobian(z, network, self.partition, scale=elementwise.scale, gain=gain)

    def _network_jacobian(self, identity: Tensor) -> NetworkJacobian:
        """The Jacobian of the network's output with respect to the identity part."""
        if self.context is None:
            return linearize_network(self.network, identity)
        if is_plain(self.network, Conditional):
            network: Any = self.network
            return network.linearize(identity, self.context)
        return AutogradNetwork(self.raw, identity)

    def forward(self, x: Tensor) -> Tensor:
        """z, whose transformed part is x2 * scale + shift."""
        identity, transformed = self.split(x)
        return self.join(identity, self.parameters_of(identity).forward(transformed))

    def inverse(self, z: Tensor) -> Tensor:
        """x, whose transformed part is (z2 - shift) / scale."""
        identity, transformed = self.split(z)
        return self.join(identity, self.parameters_of(identity).inverse(transformed))

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and sum log scale."""
        identity, transformed = self.split(x)
        elementwise = self.parameters_of(identity)
        return self.join(identity, elementwise.forward(transformed)), elementwise.log_det()

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and -sum log scale."""
        identity, transformed = self.split(z)
        elementwise = self.parameters_of(identity)
        return self.join(identity, elementwise.inverse(transformed)), -elementwise.log_det()


class AdditiveCoupling(Coupling):
    """z1 = x1, z2 = x2 + t(x1); log|det J| = 0.

    Args:
        network: t, from the identity part to the shape of the transformed part.
        partition: which part is the identity part. Default: the first half of the channels.

    References:
        NICE: Non-linear Independent Components Estimation (Dinh, Krueger, Bengio, 2014).
    """

    @classmethod
    def on_halves(
        cls, channels: int, network: NetworkMaker, *, swapped: bool = False
    ) -> AdditiveCoupling:
        """A layer on these channels with the network ``network(identity, transformed)``."""
        partition = Halves(swapped=swapped)
        return cls(network(*partition.sizes(channels)), partition=partition)

    def elementwise(self, raw: Tensor) -> ScaleAndShift:
        """The map x2 -> x2 + t, with t the network's output."""
        return ScaleAndShift(self.partition.restrict(raw, neutral=0.0))


class AffineCoupling(Coupling):
    """z1 = x1, z2 = x2 * g(s(x1)) + t(x1); log|det J| = sum log g(s(x1)).

    Args:
        network: from the identity part to twice the channels of the transformed part: first t, then
            s.
        partition: which part is the identity part. Default: the first half of the channels.
        scale: g. Default: Glow's sigmoid(s + 2).

    Raises:
        TypeError: if ``scale`` is no scale function.

    References:
        Density estimation using Real NVP (Dinh, Sohl-Dickstein, Bengio, 2017).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        partition: Partition | None = None,
        scale: ScaleFunction | None = None,
    ) -> None:
        super().__init__(network, partition=partition)
        if scale is None:
            scale = SigmoidScale()
        if not isinstance(scale, ScaleFunction):
            raise TypeError(
                "expected a scale function such as SigmoidScale(), ClampedScale() or ExpScale(); "
                f"got {scale!r:.60}"
            )
        self.scale: ScaleFunction = scale

    @classmethod
    def on_halves(
        cls,
        channels: int,
        network: NetworkMaker,
        *,
        swapped: bool = False,
        scale: ScaleFunction | None = None,
    ) -> AffineCoupling:
        """A layer on these channels with the network ``network(identity, 2 * transformed)``."""
        partition = Halves(swapped=swapped)
        identity, transformed = partition.sizes(channels)
        return cls(network(identity, 2 * transformed), partition=partition, scale=scale)

    def elementwise(self, raw: Tensor) -> ScaleAndShift:
        """The map x2 -> x2 * g(s) + t, with [t, s] the network's output."""
        shift, h = self.halves(raw)
        return ScaleAndShift(
            shift=self.partition.restrict(shift, neutral=0.0),
            scale=self.partition.restrict(self.scale.value(h), neutral=1.0),
            log_scale=self.partition.restrict(self.scale.log(h), neutral=0.0),
        )

    def gain(self, raw: Tensor, transformed: Tensor) -> Tensor:
        """The derivative of z2 with respect to s, x2 * g'(s), elementwise."""
        return transformed * self.scale.slope(self.halves(raw)[1])

    @staticmethod
    def halves(raw: Tensor) -> tuple[Tensor, Tensor]:
        """(t, s): the two halves of the network's output.

        Raises:
            ValueError: if its number of channels is odd.
        """
        if raw.shape[1] % 2:
            raise ValueError(
                "expected a network whose output is [t, s], twice the transformed channels; "
                f"got {raw.shape[1]} channels"
            )
        shift, h = raw.chunk(2, dim=1)
        return shift, h


class CouplingJacobian:
    """The four products of a coupling layer at one point, by the blocks of the Jacobian.

    With the identity part x1 and the transformed part x2 of x, and z2 = x2 * g(s(x1)) + t(x1):

        J v     = [v1, g v2 + A v1]                 A = dt/dx1 + x2 g'(s) ds/dx1
        J^T u   = [u1 + A^T u2, g u2]
        J^-1 u  = [u1, (u2 - A u1) / g]
        J^-T v  = [v1 - A^T (v2 / g), v2 / g]

    A v1 and A^T u2 cost one product with the network's Jacobian each. Vectors may carry leading
    dimensions.

    Args:
        output: z.
        network: the Jacobian of [t, s], or of t alone, at x1.
        partition: splits x and z.
        scale: g(s(x1)); None where it is one.
        gain: x2 g'(s(x1)); None where there is no s.
    """

    def __init__(
        self,
        output: Tensor,
        network: NetworkJacobian,
        partition: Partition,
        *,
        scale: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> None:
        self.output = output
        self._network, self._partition = network, partition
        self._scale, self._gain = scale, gain
        self._dims = output.dim()

    def select(self, rows: Tensor) -> CouplingJacobian | None:
        """The Jacobian of these rows; None if the network's cannot be restricted to them."""
        network = select_rows_of(self._network, rows)
        if network is None:
            return None
        scale = _indexed(self._scale, rows)
        gain = _indexed(self._gain, rows)
        return CouplingJacobian(self.output[rows], network, self._partition, scale=scale, gain=gain)

    def in_dtype(self, dtype: torch.dtype) -> CouplingJacobian | None:
        """The Jacobian whose network multiplies in ``dtype``; None if the network's cannot."""
        network = network_in_dtype(self._network, dtype)
        if network is None:
            return None
        scale, gain = self._scale, self._gain
        return CouplingJacobian(self.output, network, self._partition, scale=scale, gain=gain)

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (..., B, *data) -> (..., B, *latent)."""
        identity, transformed = self._split(v)
        coupled = self._coupled(identity)
        if self._scale is None:
            return self._join(identity, transformed + coupled)
        return self._join(identity, torch.addcmul(coupled, transformed, self._scale))

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u: (..., B, *latent) -> (..., B, *data)."""
        identity, transformed = self._split(u)
        identity = identity + self._coupled_transpose(transformed)
        if self._scale is not None:
            transformed = transformed * self._scale
        return self._join(identity, transformed)

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """J^-1 u: (..., B, *latent) -> (..., B, *data)."""
        identity, transformed = self._split(u)
        transformed = transformed - self._coupled(identity)
        if self._scale is not None:
            transformed = transformed / self._scale
        return self._join(identity, transformed)

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """J^-T v: (..., B, *data) -> (..., B, *latent)."""
        identity, transformed = self._split(v)
        if self._scale is not None:
            transformed = transformed / self._scale
        return self._join(identity - self._coupled_transpose(transformed), transformed)

    def multiply(self, matrix: Tensor) -> Tensor:
        """J M for a matrix M (dim x, K), at a batch of one; in place."""
        if not isinstance(self._partition, Halves):
            columns = self.jvp(matrix.T.reshape(-1, *self.output.shape))
            return columns.reshape(len(columns), -1).T.contiguous()
        matrix = matrix.contiguous()
        width = matrix.shape[1]
        by_channel = matrix.view(1, self.output.shape[1], -1)
        identity, transformed = self._partition.split(by_channel, dims=3)
        # Both are views of the matrix: the rows of the identity part stay as they are, and what is
        # done to the others is done in place.
        identity = identity.reshape(-1, width)
        transformed = transformed.reshape(-1, width)
        if self._scale is not None:
            transformed.mul_(self._scale.reshape(-1, 1))
        shape = self._split(self.output)[0].shape[1:]
        add_product_(transformed, self._network, identity, shape=shape, gain=self._gain)
        return matrix

    def _coupled(self, identity: Tensor) -> Tensor:
        """A v1 of the class docstring, in the shape of the transformed part."""
        raw = self._network.jvp(identity)
        if self._gain is not None:
            shift, h = raw.chunk(2, dim=1 - self._dims)
            raw = torch.addcmul(shift, self._gain, h)
        return self._partition.restrict(raw, neutral=0.0)

    def _coupled_transpose(self, transformed: Tensor) -> Tensor:
        """A^T u2 of the class docstring, in the shape of the identity part."""
        raw = self._partition.restrict(transformed, neutral=0.0)
        if self._gain is not None:
            raw = torch.cat([raw, self._gain * raw], dim=1 - self._dims)
        return self._network.vjp(raw)

    def _split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._partition.split(v, dims=self._dims)

    def _join(self, identity: Tensor, transformed: Tensor) -> Tensor:
        return self._partition.join(identity, transformed, dims=self._dims)


def _indexed(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    if tensor is None:
        return None
    return tensor[rows]

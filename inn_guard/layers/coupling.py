"""Additive and affine coupling layers."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.jacobian.network import AutogradNetwork, NetworkJacobian, linearize_network
from inn_guard.layers.coupling_tangent import CouplingTangent
from inn_guard.layers.networks import Conditional
from inn_guard.layers.partition import Halves, Partition
from inn_guard.layers.scales import ScaleFunction, SigmoidScale

__all__ = ["AdditiveCoupling", "AffineCoupling", "Coupling", "Elementwise", "NetworkMaker"]

Self = TypeVar("Self", bound="Coupling")
NetworkMaker = Callable[[int, int], nn.Module]  #: (channels in, channels out) -> a network


@dataclass(frozen=True)
class Elementwise:
    """The map that a coupling layer applies to its changed part: changed -> changed * scale + shift.

    Attributes:
        shift: of the shape of the changed part.
        scale: of the same shape, or None where it is one.
        log_scale: its logarithm, or None where that is zero.
    """

    shift: Tensor
    scale: Tensor | None = None
    log_scale: Tensor | None = None

    def forward(self, changed: Tensor) -> Tensor:
        """changed * scale + shift."""
        return changed + self.shift if self.scale is None else changed * self.scale + self.shift

    def inverse(self, changed: Tensor) -> Tensor:
        """(changed - shift) / scale."""
        return changed - self.shift if self.scale is None else (changed - self.shift) / self.scale

    def log_det(self) -> Tensor:
        """The sum of the logarithms of the scale, (B,)."""
        if self.log_scale is None:
            return self.shift.new_zeros(len(self.shift))
        return self.log_scale.flatten(1).sum(1)


class Coupling(Invertible):
    """z_kept = x_kept, z_changed = x_changed * scale + shift, with scale and shift a function of x_kept alone.

    One evaluation of the network at the kept part, which is the same before and after the layer, serves the forward
    pass, the inverse and their gradients:

        kept, changed = layer.split(z)
        elementwise = layer.parameters_of(kept)
        x = layer.join(kept, elementwise.inverse(changed))

    A layer with a context calls ``network(x_kept, context)``, one without ``network(x_kept)``.

    Args:
        network: from the kept part to the raw parameters.
        partition: which part is kept; the first half of the channels unless given.
    """

    _elementwise: Elementwise | None = None  #: of a primed layer

    def __init__(self, network: nn.Module, *, partition: Partition | None = None) -> None:
        super().__init__()
        self.network = network
        self.partition: Partition = Halves() if partition is None else partition

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(kept, changed) of an input x or an output z."""
        return self.partition.split(x, dims=x.dim())

    def join(self, kept: Tensor, changed: Tensor) -> Tensor:
        """The inverse of ``split``."""
        return self.partition.join(kept, changed, dims=kept.dim())

    def raw(self, kept: Tensor) -> Tensor:
        """The network's output at the kept part, and at the context if there is one."""
        return self.network(kept) if self.context is None else self.network(kept, self.context)

    @abc.abstractmethod
    def elementwise(self, raw: Tensor) -> Elementwise:
        """What the network's output does to the changed part."""

    def parameters_of(self, kept: Tensor) -> Elementwise:
        """The map of the changed part, by one evaluation of the network at the kept part."""
        return self.elementwise(self.raw(kept)) if self._elementwise is None else self._elementwise

    def with_cached_conditioner(self: Self, state: Tensor) -> Self:
        """The layer with its network evaluated at the kept part of ``state``, an input or an output."""
        twin = copy.copy(self)
        twin._elementwise = self.parameters_of(self.split(state)[0])
        return twin

    def gain(self, raw: Tensor, changed: Tensor) -> Tensor | None:
        """The derivative of the output's changed part with respect to s; None where there is no s."""
        return None

    @torch.no_grad()
    def linearize(self, x: Tensor) -> LayerJacobian:
        """The four products, from one evaluation of the network, without an autograd graph where it is feed-forward."""
        kept, changed = self.split(x.detach())
        network = self._network_tangent(kept)
        elementwise = self.elementwise(network.output)
        gain = self.gain(network.output, changed)
        z = self.join(kept, elementwise.forward(changed))
        return CouplingTangent(z, network, self.partition, scale=elementwise.scale, gain=gain)

    def _network_tangent(self, kept: Tensor) -> NetworkJacobian:
        if self.context is None:
            return linearize_network(self.network, kept)
        if type(self.network) is Conditional:
            return self.network.linearize(kept, self.context)
        return AutogradNetwork(self.raw, kept)

    def forward(self, x: Tensor) -> Tensor:
        """z: kept part as it is, changed part scaled and shifted."""
        kept, changed = self.split(x)
        return self.join(kept, self.parameters_of(kept).forward(changed))

    def inverse(self, z: Tensor) -> Tensor:
        """x: kept part as it is, shift subtracted from the changed part and divided by the scale."""
        kept, changed = self.split(z)
        return self.join(kept, self.parameters_of(kept).inverse(changed))

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and sum log scale."""
        kept, changed = self.split(x)
        elementwise = self.parameters_of(kept)
        return self.join(kept, elementwise.forward(changed)), elementwise.log_det()

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and -sum log scale."""
        kept, changed = self.split(z)
        elementwise = self.parameters_of(kept)
        return self.join(kept, elementwise.inverse(changed)), -elementwise.log_det()


class AdditiveCoupling(Coupling):
    """z_kept = x_kept, z_changed = x_changed + t(x_kept); log|det J| = 0.

    Args:
        network: t, from the kept part to the shape of the changed part.
        partition: which part is kept; the first half of the channels unless given.

    References:
        NICE: Non-linear Independent Components Estimation (Dinh, Krueger, Bengio, 2014).
    """

    @classmethod
    def on_halves(
        cls, channels: int, network: NetworkMaker, *, swapped: bool = False
    ) -> AdditiveCoupling:
        """A layer on ``channels`` with the network that ``network(kept, changed)`` makes."""
        partition = Halves(swapped=swapped)
        return cls(network(*partition.sizes(channels)), partition=partition)

    def elementwise(self, raw: Tensor) -> Elementwise:
        """changed + t."""
        return Elementwise(self.partition.restrict(raw, neutral=0.0))


class AffineCoupling(Coupling):
    """z_kept = x_kept, z_changed = x_changed * g(s(x_kept)) + t(x_kept); log|det J| = sum log g(s(x_kept)).

    Args:
        network: from the kept part to twice the channels of the changed part: first t, then s.
        partition: which part is kept; the first half of the channels unless given.
        scale: g; Glow's sigmoid(s + 2) unless given.

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
        self.scale: ScaleFunction = SigmoidScale() if scale is None else scale

    @classmethod
    def on_halves(
        cls,
        channels: int,
        network: NetworkMaker,
        *,
        swapped: bool = False,
        scale: ScaleFunction | None = None,
    ) -> AffineCoupling:
        """A layer on ``channels`` with the network that ``network(kept, 2 * changed)`` makes."""
        partition = Halves(swapped=swapped)
        kept, changed = partition.sizes(channels)
        return cls(network(kept, 2 * changed), partition=partition, scale=scale)

    def elementwise(self, raw: Tensor) -> Elementwise:
        """changed * g(s) + t."""
        shift, h = self.halves(raw)
        return Elementwise(
            shift=self.partition.restrict(shift, neutral=0.0),
            scale=self.partition.restrict(self.scale.value(h), neutral=1.0),
            log_scale=self.partition.restrict(self.scale.log(h), neutral=0.0),
        )

    def gain(self, raw: Tensor, changed: Tensor) -> Tensor:
        """changed * g'(s)."""
        return changed * self.scale.slope(self.halves(raw)[1])

    @staticmethod
    def halves(raw: Tensor) -> tuple[Tensor, Tensor]:
        """(t, s): the two halves of the network's output.

        Raises:
            ValueError: if its number of channels is odd.
        """
        if raw.shape[1] % 2:
            raise ValueError(
                f"expected a network with twice the changed channels, [t, s], as output; got {raw.shape[1]}"
            )
        shift, h = raw.chunk(2, dim=1)
        return shift, h

"""Simple kinds of bounded maps: rearrangements, diagonal, linear and elementwise ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import inn_guard.lipschitz.maps.closed_forms as blocks
from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.preimage import everywhere, preimage
from inn_guard.lipschitz.networks.activations import Activation
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, Linear
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.networks.interpreters import over_channels
from inn_guard.numerics.intervals import Box, Interval, linear
from inn_guard.numerics.rounding import up
from inn_guard.numerics.spectral_norm import (
    cheap_norm,
    exact,
    inverse_with_error,
    norm_operations,
    spectral_norm,
)

__all__ = ["Diagonal", "Elementwise", "LinearMap", "Rearrangement", "ShapeDependent", "per_channel"]


@dataclass(frozen=True)
class Rearrangement(BoundedMap):
    """A map that moves entries, or drops or adds zeros: norm one both ways.

    Attributes:
        move: what it does to a batch (B, *shape).
        channels: the order of channels, if it only permutes them.
    """

    move: Callable[[Tensor], Tensor]
    channels: Tensor | None = None

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """One, exactly."""
        return BlockBounds(1.0, 1.0, method="isometry")

    def image(self, box: Interval) -> Interval:
        """The box, moved."""
        return box.map(lambda t: self.move(t[None])[0])

    def preimage(self, box: Interval) -> Interval:
        """The box, moved back."""
        try:
            return box[self._order(box).argsort()]
        except Unbounded:
            return everywhere(box)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        """The channels in another order."""
        return x.rows(self._order(box))

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        """The channels back in order."""
        return z.rows(self._order(box).argsort())

    def comparison_matrices(self, box: Interval, bounds: BlockBounds) -> tuple[Tensor, Tensor]:
        """Permutation matrices."""
        matrix = torch.eye(box.shape[0], dtype=torch.float64)[self._order(box)]
        return matrix, matrix.T

    def _order(self, box: Interval) -> Tensor:
        if self.channels is not None:
            return self.channels
        if len(box.shape) != 1:
            raise Unbounded("entries move between pixels")
        order = self.move(torch.arange(box.shape[0], dtype=torch.float64)[None])[0].long()
        if order.shape != box.shape:
            raise Unbounded("entries are dropped, added, or arranged as an image")
        return order


@dataclass(frozen=True)
class ShapeDependent(BoundedMap):
    """A map that is known once the shape of its input is.

    Attributes:
        make: the map for a box.
        conditioners: its networks.
    """

    make: Callable[[Interval], BoundedMap]
    conditioners: tuple[torch.nn.Module, ...] = ()

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """The map's."""
        return self.make(box).bounds(box, effort)

    def image(self, box: Interval) -> Interval:
        """The map's."""
        return self.make(box).image(box)

    def preimage(self, box: Interval) -> Interval:
        """The map's."""
        return self.make(box).preimage(box)

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        """The map's."""
        return self.make(box).paper_formula(box, effort)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        """The map's."""
        return self.make(box).lipsdp_jacobian(builder, x, box)

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        """The map's."""
        return self.make(box).lipsdp_inverse(builder, z, box)

    def secant_chain(
        self, builder: ChainBuilder, x: Linear, box: Interval, centre: Tensor
    ) -> Linear:
        """The map's."""
        return self.make(box).secant_chain(builder, x, box, centre)

    def comparison_matrices(self, box: Interval, bounds: BlockBounds) -> tuple[Tensor, Tensor]:
        """The map's."""
        return self.make(box).comparison_matrices(box, bounds)

    def subnetworks(self) -> list[torch.nn.Module]:
        """The conditioners."""
        return list(self.conditioners)


@dataclass(frozen=True)
class Diagonal(BoundedMap):
    """scale * x + shift, per channel; scale is known up to a few roundings of the functions that made it."""

    scale: Tensor
    shift: Tensor

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """max |D| and 1 / min |D|."""
        scale = self._scale()
        if not scale.bounded:
            return BlockBounds.none("the scale is not finite")
        pair = blocks.elementwise(scale)
        reason = "" if math.isfinite(pair.inverse) else "a scale is zero: the block is singular"
        return BlockBounds(*pair, reason=reason)

    def image(self, box: Interval) -> Interval:
        """LogScaledVector and shifted."""
        scale, shift = (over_channels(exact(t), box.lo) for t in (self.scale, self.shift))
        return box * Interval.around(scale) + Interval.around(shift)

    def preimage(self, box: Interval) -> Interval:
        """The shift taken off, divided by the scale."""
        scale, shift = (over_channels(exact(t), box.lo) for t in (self.scale, self.shift))
        return (box - Interval.around(shift)) / Interval.around(scale)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        """The diagonal."""
        scale = exact(self.scale) * torch.ones(x.channels, dtype=torch.float64)
        return x.mapped(torch.diag(scale)[None])

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        """Its inverse."""
        scale = exact(self.scale) * torch.ones(z.channels, dtype=torch.float64)
        return z.mapped(torch.diag(1 / scale)[None])

    def comparison_matrices(self, box: Interval, bounds: BlockBounds) -> tuple[Tensor, Tensor]:
        """The diagonal and its inverse."""
        scale = Interval.around(exact(self.scale) * torch.ones(box.shape[0], dtype=torch.float64))
        return torch.diag(scale.magnitude), torch.diag(scale.reciprocal().magnitude)

    def _scale(self) -> Interval:
        return Interval.around(exact(self.scale).reshape(-1))


@dataclass(frozen=True)
class LinearMap(BoundedMap):
    """W x + b over the channels, at every pixel.

    Attributes:
        weight: W, (out, in).
        shift: b, (out,), or None.
        error: Frobenius norm of what rounding may have done when W was computed from its factors.
    """

    weight: Tensor
    shift: Tensor | None = None
    error: float = 0.0

    @classmethod
    def computed(cls, weight: Tensor, shift: Tensor | None = None) -> LinearMap:
        """A weight that is a product of stored factors, computed in float64 with some tens of roundings."""
        return cls(weight, shift, 1e-13 * float(exact(weight).norm()) + 1e-300)

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """Certified norms of W and W^-1."""
        n = max(self.weight.shape)
        if not effort.deadline.can_afford(2 * norm_operations(n, n) + 4.0 * n**3):
            return BlockBounds(
                up(cheap_norm(self.weight) + self.error),
                math.inf,
                reason="time ran out for its inverse",
            )
        forward, inverse = blocks.linear(self.weight)
        slip = up(inverse * self.error)
        forward = up(forward + self.error)
        inverse = up(inverse / math.nextafter(1 - slip, 0)) if slip < 1 else math.inf
        return BlockBounds(
            forward, inverse, reason="" if math.isfinite(inverse) else "the matrix is singular"
        )

    def image(self, box: Interval) -> Interval:
        """W box + b."""
        y = linear(exact(self.weight), box.map(lambda t: t.movedim(0, -1)))
        slack = (
            self.error * box.magnitude.square().sum(0).sqrt() * (1 + 1e-9)
            if self.error
            else torch.zeros(())
        )
        y = (y + Interval(-slack[..., None], slack[..., None])) if self.error else y
        y = y.map(lambda t: t.movedim(-1, 0))
        return (
            y if self.shift is None else y + Interval.around(over_channels(exact(self.shift), y.lo))
        )

    def preimage(self, box: Interval) -> Interval:
        """W^-1 (box - b)."""
        try:
            inverse, error = self._inverse()
        except Unbounded:
            return everywhere(box)
        z = (
            box
            if self.shift is None
            else box - Interval.around(over_channels(exact(self.shift), box.lo))
        )
        return LinearMap(inverse, error=error).image(z)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        """W."""
        return x.mapped(exact(self.weight)[None], self.error)

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        """W^-1, computed, with a bound of what it is off by."""
        inverse, error = self._inverse()
        return z.mapped(inverse[None], error)

    def comparison_matrices(self, box: Interval, bounds: BlockBounds) -> tuple[Tensor, Tensor]:
        """|W| and |W^-1|."""
        if self.weight.shape[0] != self.weight.shape[1] or not math.isfinite(bounds.inverse):
            raise Unbounded("the matrix is not invertible")
        inverse, error = inverse_with_error(self.weight)
        slip = up(error + up(up(bounds.inverse * bounds.inverse) * 2 * self.error))
        return exact(self.weight).abs() + self.error, inverse.abs() + slip

    def _inverse(self) -> tuple[Tensor, float]:
        """W^-1, computed, with a bound of the norm of what it is off by.

        Raises:
            Unbounded: if W is singular.
        """
        if self.weight.shape[0] != self.weight.shape[1]:
            raise Unbounded("the matrix is not square")
        inverse, error = inverse_with_error(self.weight)
        size = spectral_norm(inverse) + error
        slip = up(size * self.error)
        if not math.isfinite(error) or slip >= 0.5:
            raise Unbounded("the matrix is singular")
        return inverse, up(error + 2 * up(up(size * size) * self.error))


@dataclass(frozen=True)
class Elementwise(BoundedMap):
    """y_i = scale * f(x_i), an activation as a layer; ``inverse`` is its inverse where that has bounds on boxes."""

    function: Activation
    scale: float = 1.0
    inverse: BoundedMap | None = None

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """sup |f'| and 1 / inf |f'| over the box."""
        slope, everywhere = self._slope(box), self._slope(Box.everywhere(box.shape))
        pair, widest = blocks.elementwise(slope), blocks.elementwise(everywhere)
        reason = (
            ""
            if math.isfinite(pair.inverse)
            else "the slope comes arbitrarily close to zero: give a smaller box"
        )
        return BlockBounds(*pair, pair == widest, reason)

    def image(self, box: Interval) -> Interval:
        """f over the box."""
        return self.function.value(box) * self.scale

    def preimage(self, box: Interval) -> Interval:
        """The inverse's image, if there is one; or by f itself, if its slope is proved to be nowhere negative."""
        if self.inverse is not None:
            return self.inverse.image(box)
        rises = float(self._slope(everywhere(box)).lo.min()) >= 0
        return preimage(self.image, box) if rises else everywhere(box)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        """Slopes over the box."""
        return builder.activated(x, *per_channel(self._slope(box), x.channels))

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        """One over them."""
        return builder.activated(z, *per_channel(self._slope(box).reciprocal(), z.channels))

    def comparison_matrices(self, box: Interval, bounds: BlockBounds) -> tuple[Tensor, Tensor]:
        """Largest slopes, and one over the smallest."""
        slope = self._slope(box)
        ends = (slope.magnitude, slope.reciprocal().magnitude)
        first, last = (torch.diag(end.reshape(len(end), -1).amax(1)) for end in ends)
        return first, last

    def _slope(self, box: Interval) -> Interval:
        return self.function.slope(box) * self.scale


def per_channel(slopes: Interval, channels: int) -> tuple[Tensor, Tensor]:
    """The hull over the pixels, per channel."""
    return slopes.lo.reshape(channels, -1).amin(1), slopes.hi.reshape(channels, -1).amax(1)

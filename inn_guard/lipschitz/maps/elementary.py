"""Simple kinds of bounded maps: rearrangements, linear and elementwise maps, known constants."""

# Methods without a docstring are documented in BoundedMap.
# ruff: noqa: D102

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import inn_guard.lipschitz.maps.closed_forms as blocks
from inn_guard.execution.deadline import spend
from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.neighbourhood import Moved, Neighbourhood, moved_by_slopes
from inn_guard.lipschitz.maps.preimage import everywhere, preimage
from inn_guard.lipschitz.networks.activations import Activation
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, Linear
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.networks.interpreters import Columns, over_channels
from inn_guard.lipschitz.transformers.base import clamped, product_with_complement
from inn_guard.numerics.interval_matrices import diagonal, within
from inn_guard.numerics.intervals import Box, Interval, linear
from inn_guard.numerics.rounding import TINY, Upper, enlarged, frobenius_norm, gamma
from inn_guard.numerics.spectral_norm import (
    cheap_norm,
    exact,
    inverse_with_error,
    norm_operations,
    spectral_norm,
)

__all__ = [
    "Diagonal",
    "Elementwise",
    "KnownConstants",
    "LinearMap",
    "LogitMap",
    "Rearrangement",
    "ShapeDependent",
    "per_channel",
]

PRODUCT_ERROR = 1e-13  #: relative error of a computed matrix, some hundreds of roundings
DERIVED = 64  #: roundings allowed to each entry of a factor


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
        if self.channels is not None and not self._is_permutation(self.channels):
            return BlockBounds.none("its order of channels is no permutation")
        return BlockBounds(1.0, 1.0, method="isometry")

    @staticmethod
    def _is_permutation(order: Tensor) -> bool:
        return torch.equal(order.sort().values, torch.arange(len(order)))

    def image(self, box: Interval) -> Interval:
        return box.map(lambda t: self.move(t[None])[0])

    def preimage(self, box: Interval) -> Interval:
        try:
            return box[self.order(box).argsort()]
        except Unbounded:
            return everywhere(box)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        return x.rows(self.order(box))

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        return z.rows(self.order(box).argsort())

    def jacobians(self, box: Interval) -> tuple[Interval, Interval]:
        """A matrix of zeros and ones, and its transpose."""
        inputs = box.shape.numel()
        unit = torch.eye(inputs, dtype=torch.float64).reshape(inputs, *box.shape)
        matrix = self.move(unit).flatten(1).T
        # a damaged order of channels repeats some and drops others
        if not torch.equal(matrix @ matrix.T, torch.eye(inputs, dtype=torch.float64)):
            raise Unbounded("entries are dropped, added or repeated")
        return Interval.of(matrix), Interval.of(matrix.T)

    def linearised(self, around: Neighbourhood) -> Moved:
        """Every column is rearranged, without rounding."""
        # of every entry there must be exactly one
        labels = torch.arange(around.centre.shape.numel(), dtype=torch.float64)
        moved = self.move(labels.reshape(1, *around.centre.shape))
        if not torch.equal(moved.flatten().sort().values, labels):
            raise Unbounded("entries are dropped, added or repeated")
        columns = Columns(self.move(around.columns), Upper(0.0))
        centre = self.image(around.point)
        return Moved(centre, columns, Upper(0.0), Upper(0.0), is_isometry=True)

    def order(self, box: Interval) -> Tensor:
        """The order of channels.

        Raises:
            Unbounded: if it does not only permute channels.
        """
        if self.channels is not None:
            if not self._is_permutation(self.channels):
                raise Unbounded("its order of channels is no permutation")
            return self.channels
        if len(box.shape) != 1:
            raise Unbounded("entries move between pixels")
        order = self.move(torch.arange(box.shape[0], dtype=torch.float64)[None])[0].long()
        if order.shape != box.shape:
            raise Unbounded("entries are dropped, added, or arranged as an image")
        return order


@dataclass(frozen=True)
class ShapeDependent(BoundedMap):
    """A map that is known only once the shape of its input is.

    Attributes:
        make: the map for boxes of the shape of one.
        networks: those in it.
    """

    make: Callable[[Interval], BoundedMap]
    networks: tuple[nn.Module, ...] = ()
    _made: dict[torch.Size, BoundedMap] = field(default_factory=dict, init=False, repr=False)

    def at(self, box: Interval) -> BoundedMap:
        """The map for the shape of a box, made once: networks are traced in it."""
        if box.shape not in self._made:
            self._made[box.shape] = self.make(box)
        return self._made[box.shape]

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        return self.at(box).bounds(box, effort)

    def image(self, box: Interval) -> Interval:
        return self.at(box).image(box)

    def preimage(self, box: Interval) -> Interval:
        return self.at(box).preimage(box)

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        return self.at(box).paper_formula(box, effort)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        return self.at(box).lipsdp_jacobian(builder, x, box)

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        return self.at(box).lipsdp_inverse(builder, z, box)

    def secant_chain(
        self, builder: ChainBuilder, x: Linear, box: Interval, centre: Tensor
    ) -> Linear:
        return self.at(box).secant_chain(builder, x, box, centre)

    def jacobians(self, box: Interval) -> tuple[Interval, Interval]:
        return self.at(box).jacobians(box)

    def linearised(self, around: Neighbourhood) -> Moved:
        return self.at(around.point).linearised(around)

    def subnetworks(self) -> list[nn.Module]:
        return list(self.networks)


@dataclass(frozen=True)
class Diagonal(BoundedMap):
    """scale * x + shift, per channel; both were computed with a few roundings."""

    scale: Tensor
    shift: Tensor

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        scale = Interval.around(exact(self.scale).reshape(-1))
        if not scale.bounded:
            return BlockBounds.none("the scale is not finite")
        pair, reason = blocks.elementwise(scale), ""
        if not math.isfinite(pair.inverse):
            reason = "a scale is zero: the block is singular"
        return BlockBounds(*pair, reason=reason)

    def image(self, box: Interval) -> Interval:
        return box * _at_every_pixel(self.scale, box) + _at_every_pixel(self.shift, box)

    def preimage(self, box: Interval) -> Interval:
        return (box - _at_every_pixel(self.shift, box)) / _at_every_pixel(self.scale, box)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        return x.mapped(torch.diag(self._per_channel(x.channels))[None])

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        return z.mapped(torch.diag(1 / self._per_channel(z.channels))[None])

    def jacobians(self, box: Interval) -> tuple[Interval, Interval]:
        """The diagonal and its inverse."""
        return _diagonals(_at_every_pixel(self.scale, box).map(lambda t: t.expand(box.shape)))

    def linearised(self, around: Neighbourhood) -> Moved:
        slopes = _at_every_pixel(self.scale, around.point)
        slopes = slopes.map(lambda t: t.expand(around.centre.shape))
        return moved_by_slopes(around, self.image(around.point), slopes)

    def _per_channel(self, channels: int) -> Tensor:
        return exact(self.scale) * torch.ones(channels, dtype=torch.float64)


@dataclass(frozen=True)
class LinearMap(BoundedMap):
    """W x + b over the channels, at every pixel.

    Attributes:
        weight: W, (out, in).
        shift: b, (out,), or None.
        error: Frobenius norm of the rounding error of W, if W was computed from its factors.
    """

    weight: Tensor
    shift: Tensor | None = None
    error: float = 0.0

    @classmethod
    def computed(cls, weight: Tensor, shift: Tensor | None = None) -> LinearMap:
        """For a matrix computed in float64 with some tens of roundings, and no cancellation."""
        return cls(weight, shift, frobenius_norm(exact(weight)) * PRODUCT_ERROR + TINY)

    @classmethod
    def product(cls, *factors: Tensor, shift: Tensor | None = None) -> LinearMap:
        """For a product of matrices, the first applied last, in which much may cancel.

        The rounding error is one of the product of the factors' absolute values.
        """
        weight, size, operations = exact(factors[0]), frobenius_norm(exact(factors[0])), DERIVED
        for factor in factors[1:]:
            weight = weight @ exact(factor)
            size = size * frobenius_norm(exact(factor))
            operations += factor.shape[0] + DERIVED
        return cls(weight, shift, gamma(operations) * size + TINY)

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        n = max(self.weight.shape)
        operations = 2 * norm_operations(n, n) + 4.0 * n**3
        if not effort.deadline.can_afford(operations):
            forward = cheap_norm(self.weight) + self.error
            return BlockBounds(forward, math.inf, reason="time ran out for its inverse")
        spend(operations)
        exact_product = blocks.linear(self.weight)
        forward, inverse = Upper(exact_product.forward), Upper(exact_product.inverse)
        inverse, reason = inverse / (1 - inverse * self.error), ""
        if not math.isfinite(inverse):
            reason = "the matrix is singular"
        return BlockBounds(forward + self.error, inverse, reason=reason)

    def image(self, box: Interval) -> Interval:
        y = linear(exact(self.weight), box.map(lambda t: t.movedim(0, -1)))
        if self.error:
            length = enlarged(box.magnitude.square().sum(0).sqrt(), box.shape[0] + 4)
            slack = enlarged(self.error * length, 1)[..., None]
            y = y + Interval(-slack, slack)
        y = y.map(lambda t: t.movedim(-1, 0))
        if self.shift is None:
            return y
        return y + _at_every_pixel(self.shift, y)

    def preimage(self, box: Interval) -> Interval:
        try:
            inverse, error = self.inverse()
        except Unbounded:
            return everywhere(box)
        if self.shift is not None:
            box = box - _at_every_pixel(self.shift, box)
        return LinearMap(inverse, error=error).image(box)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        return x.mapped(exact(self.weight)[None], self.error)

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        inverse, error = self.inverse()
        return z.mapped(inverse[None], error)

    def jacobians(self, box: Interval) -> tuple[Interval, Interval]:
        """W and W^-1, repeated for every pixel."""
        inverse, error = self.inverse()
        pixels = torch.eye(box.shape[1:].numel(), dtype=torch.float64)

        def repeated(matrix: Interval) -> Interval:
            return matrix.map(lambda t: torch.kron(t.contiguous(), pixels))

        weight = within(exact(self.weight), self.error)
        return repeated(weight), repeated(within(inverse, error))

    def linearised(self, around: Neighbourhood) -> Moved:
        W = exact(self.weight)
        error = self.inverse()[1]
        values = torch.einsum("oc,nc...->no...", W, around.columns)
        columns = Columns(around.columns, Upper(0.0))
        columns = columns.moved(values, cheap_norm(W.abs()), W.shape[1] + 2)
        # W^-1 lies within ``error`` of the computed one, and so does the inverse of the weight
        return Moved(self.image(around.point), columns, Upper(self.error), 2 * error)

    def inverse(self) -> tuple[Tensor, Upper]:
        """W^-1, computed, with a bound of the norm of its error.

        Raises:
            Unbounded: if W is singular.
        """
        if self.weight.shape[0] != self.weight.shape[1]:
            raise Unbounded("the matrix is not square")
        inverse, error = inverse_with_error(self.weight)
        size = spectral_norm(inverse) + error
        if not math.isfinite(error) or size * self.error >= 0.5:
            raise Unbounded("the matrix is singular")
        return inverse, error + 2 * size * size * self.error


@dataclass(frozen=True)
class Elementwise(BoundedMap):
    """y_i = scale * f(x_i), an activation as a layer.

    Attributes:
        function: f.
        scale: a factor.
        inverse: the inverse map, where that has bounds on boxes.
    """

    function: Activation
    scale: float = 1.0
    inverse: BoundedMap | None = None

    def slope(self, box: Interval) -> Interval:
        """An enclosure of the derivatives over the box."""
        return self.function.slope(box) * self.scale

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        pair, reason = blocks.elementwise(self.slope(box)), ""
        widest = blocks.elementwise(self.slope(Box.everywhere(box.shape)))
        if not math.isfinite(pair.inverse):
            reason = "the slope comes arbitrarily close to zero; pass a smaller domain"
        return BlockBounds(*pair, pair == widest, reason)

    def image(self, box: Interval) -> Interval:
        return self.function.value(box) * self.scale

    def preimage(self, box: Interval) -> Interval:
        """The image of the inverse; or from f, if its slope is proved to be nowhere negative."""
        if self.inverse is not None:
            return self.inverse.image(box)
        if float(self.slope(everywhere(box)).lo.min()) < 0:
            return everywhere(box)
        return preimage(self.image, box)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        return builder.activated(x, *per_channel(self.slope(box), x.channels))

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        return builder.activated(z, *per_channel(self.slope(box).reciprocal(), z.channels))

    def jacobians(self, box: Interval) -> tuple[Interval, Interval]:
        """The slopes, and one over them."""
        return _diagonals(self.slope(box))

    def linearised(self, around: Neighbourhood) -> Moved:
        slopes = self.slope(around.range())
        return moved_by_slopes(around, self.image(around.point), slopes)


@dataclass(frozen=True)
class KnownConstants(BoundedMap):
    """A map of known constants on all of R^d, such as a spline with fixed knots.

    Attributes:
        pair: its bounds.
        inside: an interval that every entry in it is mapped into: [-B, B] for a spline with tails.
        shape_of: from the input shape to the output shape; default: the same.
    """

    pair: Pair
    inside: tuple[float, float] | None = None
    shape_of: Callable[[torch.Size], torch.Size] = lambda shape: shape

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        if self.pair.finite:
            return BlockBounds(*self.pair)
        return BlockBounds(
            *self.pair, reason="the block is not invertible everywhere, or not Lipschitz"
        )

    def image(self, box: Interval) -> Interval:
        if self.inside is None:
            return Box.everywhere(self.shape_of(box.shape))
        least, most = self.inside
        return box.hull(Interval(torch.full_like(box.lo, least), torch.full_like(box.hi, most)))

    def preimage(self, box: Interval) -> Interval:
        if self.shape_of(box.shape) != box.shape:
            return everywhere(box)
        return self.image(box)


@dataclass(frozen=True)
class LogitMap(BoundedMap):
    """logit(alpha + (1 - 2 alpha) x) / temperature for data in [0, 1]; local.

    Attributes:
        alpha: distance of the logit's argument from 0 and 1.
        temperature: divides.
        eps: arguments are clamped to [eps, 1 - eps], beyond which nothing moves.
    """

    alpha: float
    temperature: float = 1.0
    eps: float = 0.0

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        p = self._argument(box)
        if p.inf() <= 0 or p.sup() >= 1:
            return BlockBounds.none(
                "the logit is unbounded at 0 and 1; pass domain=Box(lo, hi) with 0 < lo and hi < 1"
            )
        if p.inf() <= self.eps or p.sup() >= 1 - self.eps:
            return BlockBounds.none(
                f"the logit clamps its argument to [{self.eps:.2g}, 1 - {self.eps:.2g}], beyond "
                "which its slope is zero; pass a smaller domain"
            )
        return BlockBounds(*blocks.elementwise(self._slope(p)), is_global=False)

    def image(self, box: Interval) -> Interval:
        p = clamped(self._argument(box), 0.0, 1.0)
        return (p.log() - (1.0 - p).log()) / self.temperature

    def jacobians(self, box: Interval) -> tuple[Interval, Interval]:
        """The slopes, and one over them, where the argument is never clamped."""
        p = self._argument(box)
        if p.inf() <= self.eps or p.sup() >= 1 - self.eps:
            raise Unbounded("the logit is unbounded at 0 and 1, or clamped")
        return _diagonals(self._slope(p))

    def _slope(self, p: Interval) -> Interval:
        width = 1.0 - Interval.of(self.alpha) * 2.0
        return width / product_with_complement(p) / self.temperature

    def _argument(self, box: Interval) -> Interval:
        return box * (1.0 - Interval.of(self.alpha) * 2.0) + self.alpha


def _at_every_pixel(values: Tensor, like: Interval) -> Interval:
    """Computed values of the channels, with what rounding may have lost of them."""
    return Interval.around(over_channels(exact(values), like.lo))


def _diagonals(slopes: Interval) -> tuple[Interval, Interval]:
    """The diagonal Jacobian of entrywise slopes, and its inverse."""
    flat = slopes.map(torch.flatten)
    inverse = flat.reciprocal()
    if not flat.bounded or not inverse.bounded:
        raise Unbounded("a slope may be zero, or is not finite")
    return diagonal(flat), diagonal(inverse)


def per_channel(slopes: Interval, channels: int) -> tuple[Tensor, Tensor]:
    """The least and the largest slope of each channel, over the pixels."""
    return slopes.lo.reshape(channels, -1).amin(1), slopes.hi.reshape(channels, -1).amax(1)

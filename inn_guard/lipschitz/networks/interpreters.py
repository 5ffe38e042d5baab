"""Two readings of a network: the box of its values, and a Lipschitz constant by products of certified norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.execution.deadline import Deadline
from inn_guard.lipschitz.networks.activations import Activation
from inn_guard.lipschitz.networks.graph import LinearRearrangement, Unbounded
from inn_guard.numerics.convolution_norm import (
    apply,
    cheap_convolution_norm,
    convolution_norm,
    convolution_operations,
    is_transposed,
    kernels,
)
from inn_guard.numerics.intervals import Interval, linear
from inn_guard.numerics.rounding import gamma, up
from inn_guard.numerics.spectral_norm import cheap_norm, exact, norm_operations, spectral_norm

__all__ = [
    "Channelwise",
    "Constant",
    "EntrywiseBounds",
    "IntervalInterpreter",
    "NormProduct",
    "over_channels",
]


class IntervalInterpreter:
    """Interval bounds of every intermediate value, of the shape of one sample.

    Attributes:
        seen: what went into each activation, by its place; the local slopes follow from it.
    """

    def __init__(self) -> None:
        self.seen: dict[str, Interval] = {}

    def linear(self, x: Interval, weight: Tensor, bias: Tensor | None) -> Interval:
        """W x + b."""
        y = linear(exact(weight), x)
        return y if bias is None else y + exact(bias)

    def convolution(self, x: Interval, module: Any) -> Interval:
        """Centre and radius, each convolved, with the rounding of both."""
        weight = exact(module.weight)
        if not x.bounded or not bool(weight.isfinite().all()):
            everything = torch.full_like(apply(module, weight, torch.zeros_like(x.lo)), math.inf)
            return Interval(-everything, everything)
        centre, radius = apply(module, weight, x.centre), apply(module, weight.abs(), x.radius)
        relative = 2 * gamma(weight[0].numel() * weight.shape[0] + 4) * (1 + 1e-9)
        slack = relative * (apply(module, weight.abs(), x.magnitude) + radius)
        y = Interval.of(centre) + Interval(-radius - slack, radius + slack)
        return y if module.bias is None else y + over_channels(exact(module.bias), y.lo)

    def activate(self, x: Interval, function: Activation, place: str) -> Interval:
        """f(x), remembering x."""
        self.seen[place] = x
        return function.value(x)

    def rescale(self, x: Interval, scale: Tensor, shift: Tensor) -> Interval:
        """scale * x + shift, scale and shift being known up to a few roundings."""
        scales, shifts = (Interval.around(over_channels(exact(t), x.lo)) for t in (scale, shift))
        return x * scales + shifts

    def add(self, x: Interval, y: Interval) -> Interval:
        """x + y."""
        return x + y

    def concatenate(self, parts: list[Interval]) -> Interval:
        """Along the channels."""
        return Interval.cat(parts)

    def flatten(self, x: Interval) -> Interval:
        """One dimension."""
        return x.map(torch.flatten)

    def rearrange(self, x: Interval, move: LinearRearrangement) -> Interval:
        """Both ends, with the rounding of averages."""
        y = x.map(lambda t: move.move(t[None])[0])
        slack = 1e-12 * y.magnitude if move.norm < 1 else torch.zeros(())
        return Interval(y.lo - slack, y.hi + slack)

    def constant(self, value: Tensor, like: Interval) -> Interval:
        """The hull of a batch (B, *shape) of constants; vectors are repeated over the pixels of an image."""
        value = exact(value)
        hull = Interval(value.amin(0), value.amax(0))
        if value.dim() == 2 and len(like.shape) > 1:
            return hull.map(lambda t: over_channels(t, like.lo).expand(-1, *like.shape[1:]))
        return hull


@dataclass(frozen=True)
class Constant:
    """A Lipschitz constant of a value of ``shape`` (without batch) with respect to the network's input."""

    lipschitz: float
    shape: tuple[int, ...]


class NormProduct:
    """Lipschitz constants by products of certified norms and largest slopes.

    Args:
        seen: what goes into each activation, for local slopes; empty for global ones.
        deadline: norms that would take longer are bounded by sums of absolute values instead.
    """

    def __init__(
        self, seen: dict[str, Interval] | None = None, deadline: Deadline | None = None
    ) -> None:
        self.seen = seen or {}
        self.deadline = deadline or Deadline()

    def linear(self, x: Constant, weight: Tensor, bias: Tensor | None) -> Constant:
        """||W||."""
        norm = (
            spectral_norm
            if self.deadline.can_afford(norm_operations(*weight.shape))
            else cheap_norm
        )
        return Constant(up(x.lipschitz * norm(weight)), (*x.shape[:-1], weight.shape[0]))

    def convolution(self, x: Constant, module: Any) -> Constant:
        """The torus bound."""
        shape, size = (
            apply(module, exact(module.weight), torch.zeros(x.shape, dtype=torch.float64)).shape,
            x.shape[1:],
        )
        affordable = self.deadline.can_afford(convolution_operations(module, size))
        norm = (convolution_norm if affordable else cheap_convolution_norm)(module, size)
        return Constant(up(x.lipschitz * norm), tuple(shape))

    def activate(self, x: Constant, function: Activation, place: str) -> Constant:
        """The largest absolute slope."""
        slope = (
            function.slope(self.seen[place]).magnitude.max()
            if place in self.seen
            else max(map(abs, function.slopes()))
        )
        return Constant(up(x.lipschitz * float(slope)), x.shape)

    def rescale(self, x: Constant, scale: Tensor, shift: Tensor) -> Constant:
        """The largest absolute scale."""
        return Constant(up(x.lipschitz * float(exact(scale).abs().max()), 16), x.shape)

    def add(self, x: Constant, y: Constant) -> Constant:
        """The sum."""
        return Constant(up(x.lipschitz + y.lipschitz), torch.broadcast_shapes(x.shape, y.shape))

    def concatenate(self, parts: list[Constant]) -> Constant:
        """The root of the sum of squares."""
        total = 0.0
        for part in parts:
            total = up(total + up(part.lipschitz**2))
        return Constant(
            up(math.sqrt(total)), (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        )

    def flatten(self, x: Constant) -> Constant:
        """The same."""
        return Constant(x.lipschitz, (math.prod(x.shape),))

    def rearrange(self, x: Constant, move: LinearRearrangement) -> Constant:
        """Times the norm of the move."""
        shape = move.move(torch.zeros(1, *x.shape, dtype=torch.float64)).shape[1:]
        return Constant(
            x.lipschitz if move.norm == 1 else up(x.lipschitz * move.norm), tuple(shape)
        )

    def constant(self, value: Tensor, like: Constant) -> Constant:
        """Zero."""
        return Constant(0.0, (value.shape[1], *like.shape[1:]))


class EntrywiseBounds:
    """Upper bounds of |J| entry by entry, (outputs, inputs), for networks on vectors; masks keep their exact zeros.

    Args:
        seen: what goes into each activation, for local slopes; empty for global ones.
    """

    def __init__(self, seen: dict[str, Interval] | None = None) -> None:
        self.seen = seen or {}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """|W| |J|."""
        size = exact(weight).abs()
        return size @ x * (1 + 2 * gamma(size.shape[1] + 4))

    def convolution(self, x: Tensor, module: Any) -> Tensor:
        """Not on images."""
        raise Unbounded("entrywise bounds are for vectors only")

    def activate(self, x: Tensor, function: Activation, place: str) -> Tensor:
        """Times the largest absolute slope."""
        if place not in self.seen:
            return x * max(map(abs, function.slopes())) * (1 + 1e-15)
        slope = function.slope(self.seen[place]).magnitude
        return x * slope.reshape(len(x), -1).amax(1)[:, None] * (1 + 1e-15)

    def rescale(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Times |scale|."""
        size = exact(scale).abs()
        return x * (size if size.dim() == 0 else size[:, None]) * (1 + 1e-13)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum."""
        return (x + y) * (1 + 1e-15)

    def concatenate(self, parts: list[Tensor]) -> Tensor:
        """One above the other."""
        return torch.cat(parts)

    def flatten(self, x: Tensor) -> Tensor:
        """The same."""
        return x

    def rearrange(self, x: Tensor, move: LinearRearrangement) -> Tensor:
        """Every column moved, on vectors only."""
        moved = move.move(x.T)
        if moved.dim() != 2:
            raise Unbounded("entrywise bounds are for vectors only")
        return moved.T * (1 + 1e-12)

    def constant(self, value: Tensor, like: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros(value.shape[1], like.shape[1], dtype=torch.float64)


class Channelwise(EntrywiseBounds):
    """The same for networks on images: norms of the maps from one channel to another."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Not on images."""
        raise Unbounded("a dense layer on an image")

    def convolution(self, x: Tensor, module: Any) -> Tensor:
        """Times the sums of the kernels' absolute values (Young's inequality)."""
        if str(module.padding_mode) not in ("zeros", "circular"):
            raise Unbounded(f"{module.padding_mode} padding")
        sums = torch.block_diag(*(part.abs().flatten(2).sum(2) for part in kernels(module)))
        return (
            (sums.T if is_transposed(module) else sums)
            @ x
            * (1 + gamma(2 * module.weight.numel() + 4))
        )

    def flatten(self, x: Tensor) -> Tensor:
        """Not on images."""
        raise Unbounded("an image is flattened")

    def rearrange(self, x: Tensor, move: LinearRearrangement) -> Tensor:
        """Not on images."""
        raise Unbounded("entries are moved, repeated or averaged")


def over_channels(values: Tensor, like: Tensor) -> Tensor:
    """(channels,) broadcast over a sample (channels, ...); one number stays one."""
    return values if values.dim() == 0 else values.reshape(-1, *[1] * (like.dim() - 1))

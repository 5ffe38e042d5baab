"""Interpreters of a network: boxes of its values, Lipschitz constants by products of norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.execution.deadline import Deadline, spend
from inn_guard.lipschitz.networks.activations import Activation
from inn_guard.lipschitz.networks.graph import LinearRearrangement, Unbounded
from inn_guard.numerics.convolution_norm import (
    apply,
    cheap_convolution_norm,
    convolution_norm,
    convolution_operations,
)
from inn_guard.numerics.intervals import Interval, linear
from inn_guard.numerics.rounding import UNIT, Upper, enlarged, gamma, is_finite
from inn_guard.numerics.spectral_norm import cheap_norm, exact, norm_operations, spectral_norm

__all__ = [
    "Constant",
    "IntervalInterpreter",
    "JacobianInterpreter",
    "NormProduct",
    "over_channels",
]

DERIVED = 64  #: roundings allowed to scales that were computed from stored numbers
#: roundings allowed to one entry of a rearrangement, an average over a window
AVERAGE = 2**16


class IntervalInterpreter:
    """Interval bounds of every intermediate value, of the shape of one sample.

    Attributes:
        preactivations: the input of each activation, by its node; the local slopes follow from it.
    """

    def __init__(self) -> None:
        self.preactivations: dict[str, Interval] = {}

    def linear(self, x: Interval, weight: Tensor, bias: Tensor | None) -> Interval:
        """W x + b."""
        y = linear(exact(weight), x)
        if bias is None:
            return y
        return y + exact(bias)

    def convolution(self, x: Interval, module: Any) -> Interval:
        """Centre and radius, each convolved, with the rounding of both."""
        y = _convolved(x[None], module)[0]
        if module.bias is None:
            return y
        return y + over_channels(exact(module.bias), y.lo)

    def activate(self, x: Interval, function: Activation, node: str) -> Interval:
        """f(x); x is kept in ``preactivations``."""
        self.preactivations[node] = x
        return function.value(x)

    def rescale(self, x: Interval, scale: Tensor, shift: Tensor) -> Interval:
        """scale * x + shift, where scale and shift may have been computed with a few roundings."""
        scales = Interval.around(over_channels(exact(scale), x.lo))
        shifts = Interval.around(over_channels(exact(shift), x.lo))
        return x * scales + shifts

    def add(self, x: Interval, y: Interval) -> Interval:
        """The sum of two intervals of one shape: no norm counts entries that are repeated."""
        if x.shape != y.shape:
            shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise Unbounded(f"a sum of two values of different shapes, {shapes}, which broadcasts")
        return x + y

    def concatenate(self, parts: list[Interval], *, last: bool = False) -> Interval:
        """Both ends, concatenated along the channels."""
        if last and len(parts[0].shape) > 1:
            raise Unbounded("images are concatenated along their last dimension")
        return Interval.cat(parts)

    def flatten(self, x: Interval) -> Interval:
        """Both ends in one dimension."""
        return x.map(torch.flatten)

    def rearrange(self, x: Interval, move: LinearRearrangement) -> Interval:
        """Both ends, with the rounding of averages."""
        return _rearranged(x[None], move)[0]

    def constant(self, value: Tensor, like: Interval) -> Interval:
        """The hull of a batch (B, *shape) of constants; vectors are repeated over the pixels."""
        value = exact(value)
        hull = Interval(value.amin(0), value.amax(0))
        if value.dim() == 2 and len(like.shape) > 1:
            return hull.map(lambda t: over_channels(t, like.lo).expand(-1, *like.shape[1:]))
        return hull


@dataclass(frozen=True)
class Constant:
    """A Lipschitz constant of a value of ``shape`` (without batch) in the network's input."""

    lipschitz: Upper
    shape: tuple[int, ...]


class NormProduct:
    """Lipschitz constants by products of certified norms and largest slopes.

    Args:
        preactivations: the input of each activation, for local slopes; empty for global ones.
        deadline: norms that would take longer are bounded by sums of absolute values instead.
    """

    def __init__(
        self, preactivations: dict[str, Interval] | None = None, deadline: Deadline | None = None
    ) -> None:
        self.preactivations = preactivations or {}
        self.deadline = deadline or Deadline()

    def linear(self, x: Constant, weight: Tensor, bias: Tensor | None) -> Constant:
        """Times ||W||."""
        norm, operations = cheap_norm, norm_operations(*weight.shape)
        if self.deadline.can_afford(operations):
            spend(operations)
            norm = spectral_norm
        return Constant(x.lipschitz * norm(weight), (*x.shape[:-1], weight.shape[0]))

    def convolution(self, x: Constant, module: Any) -> Constant:
        """Times the norm of the convolution, by the torus bound."""
        zeros = torch.zeros(1, *x.shape, dtype=torch.float64)
        shape = tuple(apply(module, exact(module.weight), zeros).shape[1:])
        size = x.shape[1:]
        operations = convolution_operations(module, size)
        if self.deadline.can_afford(operations):
            spend(operations)
            return Constant(x.lipschitz * convolution_norm(module, size), shape)
        return Constant(x.lipschitz * cheap_convolution_norm(module, size), shape)

    def activate(self, x: Constant, function: Activation, node: str) -> Constant:
        """Times the largest absolute slope."""
        slope = largest_slopes(function, self.preactivations.get(node)).max()
        return Constant(x.lipschitz * float(slope), x.shape)

    def rescale(self, x: Constant, scale: Tensor, shift: Tensor) -> Constant:
        """Times the largest absolute scale."""
        largest = Upper.computed(float(exact(scale).abs().max()), DERIVED)
        return Constant(x.lipschitz * largest, x.shape)

    def add(self, x: Constant, y: Constant) -> Constant:
        """The sum of both constants."""
        if x.shape != y.shape:
            raise Unbounded("a sum that broadcasts")
        return Constant(x.lipschitz + y.lipschitz, x.shape)

    def concatenate(self, parts: list[Constant], *, last: bool = False) -> Constant:
        """The root of the sum of squares."""
        square = Upper(0.0)
        channels = 0
        for part in parts:
            square = square + part.lipschitz * part.lipschitz
            channels += part.shape[0]
        return Constant(square.sqrt(), (channels, *parts[0].shape[1:]))

    def flatten(self, x: Constant) -> Constant:
        """The same constant for a vector."""
        return Constant(x.lipschitz, (math.prod(x.shape),))

    def rearrange(self, x: Constant, move: LinearRearrangement) -> Constant:
        """Times the norm of the rearrangement."""
        shape = move.move(torch.zeros(1, *x.shape, dtype=torch.float64)).shape[1:]
        # each entry is repeated in every dimension of the image: the norm is the root of that
        repeated = Upper(1.0)
        for _ in x.shape[1:]:
            repeated = repeated * Upper(move.repeats).sqrt()
        return Constant(x.lipschitz * move.norm * repeated, tuple(shape))

    def constant(self, value: Tensor, like: Constant) -> Constant:
        """Zero: the value does not depend on the input."""
        return Constant(Upper(0.0), (value.shape[1], *like.shape[1:]))


def largest_slopes(function: Activation, preactivation: Interval | None) -> Tensor:
    """The largest absolute slopes over a box, entry by entry, or one number: over the real line."""
    if preactivation is not None:
        return function.slope(preactivation).magnitude
    low, high = function.slopes()
    return torch.tensor(max(abs(low), abs(high)), dtype=torch.float64)


class JacobianInterpreter:
    """Enclosures of the Jacobian: what each input moves in a value, (inputs, *shape).

    Exact zeros, as masks make them, stay zeros.

    Args:
        preactivations: the input of each activation.
    """

    def __init__(self, preactivations: dict[str, Interval]) -> None:
        self.preactivations = preactivations

    def linear(self, x: Interval, weight: Tensor, bias: Tensor | None) -> Interval:
        """W x."""
        W = exact(weight)
        reached = (x.magnitude > 0).double() @ (W != 0).double().mT > 0
        return _zero_unless(reached, linear(W, x))

    def convolution(self, x: Interval, module: Any) -> Interval:
        """The convolution without its bias."""
        return _convolved(x, module)

    def activate(self, x: Interval, function: Activation, node: str) -> Interval:
        """Times the slopes over the preactivations' box."""
        return _zero_unless(x.magnitude > 0, x * function.slope(self.preactivations[node]))

    def rescale(self, x: Interval, scale: Tensor, shift: Tensor) -> Interval:
        """Times the scale."""
        scales = Interval.around(over_channels(exact(scale), x.lo[0]))
        return _zero_unless(x.magnitude > 0, x * scales)

    def add(self, x: Interval, y: Interval) -> Interval:
        """x + y."""
        return _zero_unless((x.magnitude > 0) | (y.magnitude > 0), x + y)

    def concatenate(self, parts: list[Interval], *, last: bool = False) -> Interval:
        """The channels of all parts."""
        return Interval.cat(parts, 1)

    def flatten(self, x: Interval) -> Interval:
        """The same in one dimension."""
        return x.map(lambda end: end.flatten(1))

    def rearrange(self, x: Interval, move: LinearRearrangement) -> Interval:
        """Every input's share is rearranged."""
        return _rearranged(x, move)

    def constant(self, value: Tensor, like: Interval) -> Interval:
        """Zero: the value does not depend on the input."""
        shape = (len(like.lo), value.shape[1], *like.shape[2:])
        return Interval.of(torch.zeros(shape, dtype=torch.float64))


def _zero_unless(reached: Tensor, x: Interval) -> Interval:
    """x, and exactly zero where nothing reaches it: operations round zeros outwards."""
    return x.map(lambda end: torch.where(reached, end, 0.0))


def _convolved(x: Interval, module: Any) -> Interval:
    """Centre and radius of a batch, each convolved without bias, with the rounding of both."""
    weight = exact(module.weight)
    if not x.bounded or not is_finite(weight):
        everything = torch.full_like(apply(module, weight, torch.zeros_like(x.lo)), math.inf)
        return Interval(-everything, everything)
    centre, radius = apply(module, weight, x.centre), apply(module, weight.abs(), x.radius)
    operations = weight[0].numel() * weight.shape[0] + 4
    size = apply(module, weight.abs(), x.magnitude) + radius
    slack = 2 * gamma(operations) * enlarged(size, operations)
    return Interval.of(centre) + Interval(-radius - slack, radius + slack)


def _rearranged(x: Interval, move: LinearRearrangement) -> Interval:
    """Both ends of a batch, with the rounding of averages."""
    y = x.map(move.move)
    if move.norm >= 1:
        return y
    slack = AVERAGE * UNIT * y.magnitude
    return Interval(y.lo - slack, y.hi + slack)


def over_channels(values: Tensor, like: Tensor) -> Tensor:
    """(channels,) as (channels, 1, ...), to broadcast over a sample ``like``; numbers stay."""
    if values.dim() == 0:
        return values
    return values.reshape(-1, *[1] * (like.dim() - 1))

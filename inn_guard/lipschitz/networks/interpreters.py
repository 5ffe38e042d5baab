"""Interpreters of a network: boxes of its values, Lipschitz constants by products of norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.execution.deadline import Deadline, spend
from inn_guard.lipschitz.networks.activations import Activation
from inn_guard.lipschitz.networks.graph import LinearRearrangement, Unbounded
from inn_guard.numerics.convolution_norm import (
    apply,
    cheap_convolution_norm,
    convolution_norm,
    convolution_operations,
    is_transposed,
)
from inn_guard.numerics.intervals import Interval, linear
from inn_guard.numerics.rounding import (
    TINY,
    UNIT,
    Upper,
    enlarged,
    frobenius_norm,
    gamma,
    is_finite,
)
from inn_guard.numerics.spectral_norm import cheap_norm, exact, norm_operations, spectral_norm

__all__ = [
    "Columns",
    "Constant",
    "DeviationInterpreter",
    "IntervalInterpreter",
    "JacobianInterpreter",
    "NormProduct",
    "ReferenceJacobian",
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
    """A Lipschitz constant of a value of ``shape`` (without batch) in the network's input.

    Attributes:
        lipschitz: bounds ||J||.
        shape: of the value.
        deviation: bounds ||J - J_ref||, J_ref with the slopes of ``NormProduct.reference``.
        before: of the value before the last linear map, where that was the last operation.
        last: the norm of some rows (channels of the output) of that map.
    """

    lipschitz: Upper
    shape: tuple[int, ...]
    deviation: Upper = Upper(0.0)  # noqa: RUF009 - immutable
    before: Constant | None = None
    last: Callable[[Tensor], Upper] | None = None

    def rows(self, channels: Tensor) -> Constant:
        """The constants of some channels: those of the whole value, or less."""
        if self.before is None or self.last is None:
            return self
        norm = self.last(channels)
        lipschitz = Upper.min(self.lipschitz, self.before.lipschitz * norm)
        deviation = Upper.min(self.deviation, self.before.deviation * norm)
        return Constant(lipschitz, (len(channels), *self.shape[1:]), deviation)

    def scaled(self, factor: Upper, shape: tuple[int, ...]) -> Constant:
        """Of a linear map of this norm of the value."""
        return Constant(self.lipschitz * factor, shape, self.deviation * factor)


class NormProduct:
    """Lipschitz constants by products of certified norms and largest slopes.

    Args:
        preactivations: the input of each activation, for local slopes; empty for global ones.
        deadline: norms that would take longer are bounded by sums of absolute values instead.
        reference: points among the preactivations; deviations are those from their slopes.
    """

    def __init__(
        self,
        preactivations: dict[str, Interval] | None = None,
        deadline: Deadline | None = None,
        reference: dict[str, Interval] | None = None,
    ) -> None:
        self.preactivations = preactivations or {}
        self.deadline = deadline or Deadline()
        self.reference = reference or {}

    def linear(self, x: Constant, weight: Tensor, bias: Tensor | None) -> Constant:
        """Times ||W||."""

        def norm_of(W: Tensor) -> Upper:
            operations = norm_operations(*W.shape)
            if not self.deadline.can_afford(operations):
                return cheap_norm(W)
            spend(operations)
            return spectral_norm(W)

        scaled = x.scaled(norm_of(weight), (*x.shape[:-1], weight.shape[0]))
        return replace(scaled, before=x, last=lambda channels: norm_of(weight[channels]))

    def convolution(self, x: Constant, module: Any) -> Constant:
        """Times the norm of the convolution, by the torus bound."""
        zeros = torch.zeros(1, *x.shape, dtype=torch.float64)
        shape = tuple(apply(module, exact(module.weight), zeros).shape[1:])
        size = x.shape[1:]

        def norm_of(part: Any) -> Upper:
            operations = convolution_operations(part, size)
            if not self.deadline.can_afford(operations):
                return cheap_convolution_norm(part, size)
            spend(operations)
            return convolution_norm(part, size)

        scaled = x.scaled(norm_of(module), shape)
        if module.groups > 1 or is_transposed(module):
            return scaled
        return replace(scaled, before=x, last=lambda channels: norm_of(_rows_of(module, channels)))

    def activate(self, x: Constant, function: Activation, node: str) -> Constant:
        """Times the largest absolute slope; slopes that differ from the reference's deviate."""
        preactivation = self.preactivations.get(node)
        largest = Upper(float(largest_slopes(function, preactivation).max()))
        scaled = x.scaled(largest, x.shape)
        if preactivation is None or node not in self.reference:
            return scaled
        apart = slope_deviations(function, preactivation, self.reference[node])
        return replace(scaled, deviation=scaled.deviation + x.lipschitz * Upper(float(apart.max())))

    def rescale(self, x: Constant, scale: Tensor, shift: Tensor) -> Constant:
        """Times the largest absolute scale."""
        largest = Upper.computed(float(exact(scale).abs().max()), DERIVED)
        return x.scaled(largest, x.shape)

    def add(self, x: Constant, y: Constant) -> Constant:
        """The sum of both constants."""
        if x.shape != y.shape:
            raise Unbounded("a sum that broadcasts")
        return Constant(x.lipschitz + y.lipschitz, x.shape, x.deviation + y.deviation)

    def concatenate(self, parts: list[Constant], *, last: bool = False) -> Constant:
        """The root of the sum of squares."""
        square = deviation = Upper(0.0)
        channels = 0
        for part in parts:
            square = square + part.lipschitz * part.lipschitz
            deviation = deviation + part.deviation * part.deviation
            channels += part.shape[0]
        return Constant(square.sqrt(), (channels, *parts[0].shape[1:]), deviation.sqrt())

    def flatten(self, x: Constant) -> Constant:
        """The same constant for a vector."""
        return Constant(x.lipschitz, (math.prod(x.shape),), x.deviation)

    def rearrange(self, x: Constant, move: LinearRearrangement) -> Constant:
        """Times the norm of the rearrangement."""
        shape = move.move(torch.zeros(1, *x.shape, dtype=torch.float64)).shape[1:]
        # each entry is repeated in every dimension of the image: the norm is the root of that
        repeated = Upper(1.0)
        for _ in x.shape[1:]:
            repeated = repeated * Upper(move.repeats).sqrt()
        return x.scaled(move.norm * repeated, tuple(shape))

    def constant(self, value: Tensor, like: Constant) -> Constant:
        """Zero: the value does not depend on the input."""
        return Constant(Upper(0.0), (value.shape[1], *like.shape[1:]))


def _rows_of(module: Any, channels: Tensor) -> Any:
    """A convolution with some of the output channels of another one."""
    part = type(module)(
        module.in_channels,
        len(channels),
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        bias=False,
        padding_mode=module.padding_mode,
        device="meta",
    )
    part.weight = nn.Parameter(exact(module.weight)[channels], requires_grad=False)
    return part


def reference_slopes(function: Activation, point: Interval) -> Tensor:
    """The slopes of reference at a point, whose preactivations are known up to rounding."""
    return function.slope(point).centre


def slope_deviations(function: Activation, preactivation: Interval, point: Interval) -> Tensor:
    """How far slopes over a box lie from those of reference, entry by entry."""
    return (function.slope(preactivation) - reference_slopes(function, point)).magnitude


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


@dataclass(frozen=True)
class Columns:
    """What each input moves in a value by the slopes of reference.

    Attributes:
        values: (inputs, *shape), as computed.
        error: bounds the Frobenius norm of their rounding error.
    """

    values: Tensor
    error: Upper

    @property
    def size(self) -> Upper:
        """A bound of the Frobenius norm of the exact columns."""
        return frobenius_norm(self.values.reshape(1, -1)) + self.error

    def moved(self, values: Tensor, norm: Upper, operations: int) -> Columns:
        """Behind a linear map that was computed with so many roundings of an entry.

        Args:
            values: its computed values.
            norm: bounds the norm of the matrix of its absolute values.
            operations: roundings.
        """
        rounding = gamma(operations) * self.size * norm + TINY
        return Columns(values, self.error * norm + rounding)


class ReferenceJacobian:
    """Columns through a network, with the slopes of one point.

    Args:
        reference: the input of each activation at that point.
        sizes: called with the node and the columns in front of each activation.
    """

    def __init__(
        self,
        reference: dict[str, Interval],
        sizes: Callable[[str, Columns], None] = lambda node, x: None,
    ) -> None:
        self.reference = reference
        self.sizes = sizes

    def linear(self, x: Columns, weight: Tensor, bias: Tensor | None) -> Columns:
        """W x."""
        W = exact(weight)
        return x.moved(x.values @ W.mT, cheap_norm(W.abs()), W.shape[1] + 2)

    def convolution(self, x: Columns, module: Any) -> Columns:
        """The convolution without its bias."""
        weight = exact(module.weight)
        size = x.values.shape[2:]
        norm = cheap_convolution_norm(module, size)
        operations = weight[0].numel() * weight.shape[0] + 4
        return x.moved(apply(module, weight, x.values), norm, operations)

    def activate(self, x: Columns, function: Activation, node: str) -> Columns:
        """Times the slopes."""
        self.sizes(node, x)
        slopes = reference_slopes(function, self.reference[node])
        return x.moved(x.values * slopes, Upper(float(slopes.abs().max())), 2)

    def rescale(self, x: Columns, scale: Tensor, shift: Tensor) -> Columns:
        """Times the scale."""
        scales = over_channels(exact(scale), x.values[0])
        return x.moved(x.values * scales, Upper(float(scales.abs().max())), DERIVED + 2)

    def add(self, x: Columns, y: Columns) -> Columns:
        """x + y."""
        total = Columns(x.values + y.values, x.error + y.error)
        return replace(total, error=total.error + 2 * UNIT * (x.size + y.size))

    def concatenate(self, parts: list[Columns], *, last: bool = False) -> Columns:
        """The channels of all parts."""
        error = Upper(0.0)
        for part in parts:
            error = error + part.error
        return Columns(torch.cat([part.values for part in parts], 1), error)

    def flatten(self, x: Columns) -> Columns:
        """The same in one dimension."""
        return Columns(x.values.flatten(1), x.error)

    def rearrange(self, x: Columns, move: LinearRearrangement) -> Columns:
        """Every column is rearranged."""
        repeated = Upper(move.norm)
        for _ in x.values.shape[2:]:
            repeated = repeated * Upper(move.repeats).sqrt()
        return x.moved(move.move(x.values), repeated, AVERAGE)

    def constant(self, value: Tensor, like: Columns) -> Columns:
        """Zero: the value does not depend on the input."""
        shape = (len(like.values), value.shape[1], *like.values.shape[2:])
        return Columns(torch.zeros(shape, dtype=torch.float64), Upper(0.0))


class DeviationInterpreter:
    """How far values stray from their linear approximation at a point, entry by entry.

    Args:
        reference: the input of each activation at the point.
        spread: how far its linear approximation moves from there.

    Attributes:
        preactivations: boxes of the input of each activation, from both.
    """

    def __init__(self, reference: dict[str, Interval], spread: dict[str, Tensor]) -> None:
        self.reference = reference
        self.spread = spread
        self.preactivations: dict[str, Interval] = {}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """|W| x."""
        size = exact(weight).abs()
        return enlarged(x @ size.mT, size.shape[1] + 2)

    def convolution(self, x: Tensor, module: Any) -> Tensor:
        """The same with a convolution of absolute values."""
        size = exact(module.weight).abs()
        return enlarged(apply(module, size, x[None])[0], size[0].numel() * len(size) + 4)

    def activate(self, x: Tensor, function: Activation, node: str) -> Tensor:
        """|f'| x, and the deviation of slopes times all that moves."""
        moved = enlarged(self.spread[node] + x, 1)
        point = self.reference[node]
        self.preactivations[node] = point + Interval(-moved, moved)
        slopes = reference_slopes(function, point).abs()
        apart = slope_deviations(function, self.preactivations[node], point)
        return enlarged(slopes * x + apart * moved + function.jump, 4)

    def rescale(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Times the absolute scale."""
        return enlarged(x * over_channels(exact(scale).abs(), x), DERIVED + 2)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y."""
        return enlarged(x + y, 1)

    def concatenate(self, parts: list[Tensor], *, last: bool = False) -> Tensor:
        """All channels."""
        return torch.cat(parts)

    def flatten(self, x: Tensor) -> Tensor:
        """The same in one dimension."""
        return x.flatten()

    def rearrange(self, x: Tensor, move: LinearRearrangement) -> Tensor:
        """Rearranged as the values are."""
        return enlarged(move.move(x[None])[0], AVERAGE)

    def constant(self, value: Tensor, like: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros(value.shape[1], *like.shape[1:], dtype=torch.float64)


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

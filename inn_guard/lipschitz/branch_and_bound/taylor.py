"""Enclosures of a network's values and derivatives on many small boxes.

For scalar inputs there are second derivatives too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.lipschitz.networks.activations import Activation
from inn_guard.lipschitz.networks.graph import LinearRearrangement, Network, Unbounded
from inn_guard.numerics.intervals import Interval, linear
from inn_guard.numerics.spectral_norm import exact

__all__ = ["Jet", "JetInterpreter", "NetworkOnBoxes"]


@dataclass(frozen=True)
class Jet:
    """A value on boxes x = c + [-r, r] of k inputs.

    Attributes:
        centre: at c, (B, n), thin.
        value: over the box, (B, n).
        rate: the derivative at c, (B, k, n), thin.
        slope: the derivative over the box, (B, k, n).
        second_derivative: over the box, (B, k, n), for k = 1; None otherwise.
    """

    centre: Interval
    value: Interval
    rate: Interval
    slope: Interval
    second_derivative: Interval | None

    def each(self, function: Callable[[Interval], Interval]) -> Jet:
        """A linear map of values, applied to all of its parts."""
        second = _if_known(function, self.second_derivative)
        return Jet(
            function(self.centre),
            function(self.value),
            function(self.rate),
            function(self.slope),
            second,
        )


def _if_known(
    function: Callable[..., Interval], *second_derivatives: Interval | None
) -> Interval | None:
    if None in second_derivatives:
        return None
    return function(*second_derivatives)


class JetInterpreter:
    """A network on boxes: values by the mean-value form too, scalar derivatives by Taylor's.

    Args:
        radius: r of the boxes, (B, k).
    """

    def __init__(self, radius: Tensor) -> None:
        self.offset = Interval(-radius, radius)

    def start(self, centre: Tensor, embedding: Tensor) -> Jet:
        """The input ``embedding @ x`` of the network, embedding (n, k)."""
        point = Interval.of(centre)
        rate = Interval.of(embedding.T[None].expand(len(centre), -1, -1))
        second = None
        if centre.shape[1] == 1:
            second = Interval.of(torch.zeros_like(rate.lo))
        at_centre, over = linear(embedding, point), linear(embedding, point + self.offset)
        return Jet(at_centre, over, rate, rate, second)

    def linear(self, x: Jet, weight: Tensor, bias: Tensor | None) -> Jet:
        """W x + b."""
        W = exact(weight)
        shift = torch.zeros(())
        if bias is not None:
            shift = exact(bias)
        y = x.each(lambda part: linear(W, part))
        return self._tight(_shifted(y, Interval.of(shift)))

    def activate(self, x: Jet, function: Activation, node: str) -> Jet:
        """f(x) by the chain rule."""
        at_centre = function.slope(x.centre).map(lambda t: t[:, None])
        over = function.slope(x.value).map(lambda t: t[:, None])
        curvature = function.second_derivative(x.value).map(lambda t: t[:, None])
        second = _if_known(
            lambda second: curvature * x.slope.square() + over * second, x.second_derivative
        )
        centre, value = function.value(x.centre), function.value(x.value)
        return self._tight(Jet(centre, value, at_centre * x.rate, over * x.slope, second))

    def rescale(self, x: Jet, scale: Tensor, shift: Tensor) -> Jet:
        """scale * x + shift."""
        factor = Interval.around(exact(scale))
        return _shifted(x.each(lambda part: part * factor), Interval.around(exact(shift)))

    def add(self, x: Jet, y: Jet) -> Jet:
        """x + y."""
        second = _if_known(lambda a, b: a + b, x.second_derivative, y.second_derivative)
        return self._tight(
            Jet(x.centre + y.centre, x.value + y.value, x.rate + y.rate, x.slope + y.slope, second)
        )

    def concatenate(self, parts: list[Jet], *, last: bool = False) -> Jet:
        """Next to each other."""

        def joined(*intervals: Interval) -> Interval:
            return Interval.cat(intervals, -1)

        second = _if_known(joined, *[part.second_derivative for part in parts])
        return Jet(
            joined(*[part.centre for part in parts]),
            joined(*[part.value for part in parts]),
            joined(*[part.rate for part in parts]),
            joined(*[part.slope for part in parts]),
            second,
        )

    def convolution(self, x: Jet, module: Any) -> Jet:
        """Not on images."""
        raise Unbounded("boxes are branched in a few dimensions only, not on images")

    def flatten(self, x: Jet) -> Jet:
        """The same."""
        return x

    def rearrange(self, x: Jet, move: LinearRearrangement) -> Jet:
        """Not on boxes."""
        raise Unbounded("entries are moved, repeated or averaged")

    def constant(self, value: Tensor, like: Jet) -> Jet:
        """No derivative."""
        value = exact(value)
        count, k = like.rate.shape[:2]
        hull = Interval(value.amin(0), value.amax(0)).map(lambda t: t.expand(count, -1))
        zero = Interval.of(torch.zeros(count, k, value.shape[1], dtype=torch.float64))
        return Jet(hull, hull, zero, zero, _if_known(lambda _: zero, like.second_derivative))

    def _tight(self, x: Jet) -> Jet:
        slope = x.slope
        if x.second_derivative is not None:
            change = x.second_derivative * self.offset.map(lambda t: t[:, None])
            slope = slope.meet(x.rate + change)
        moved = (slope * self.offset.map(lambda t: t[:, :, None])).sum(1)
        value = x.value.meet(x.centre + moved)
        return Jet(x.centre, value, x.rate, slope, x.second_derivative)


def _shifted(x: Jet, shift: Interval) -> Jet:
    return Jet(x.centre + shift, x.value + shift, x.rate, x.slope, x.second_derivative)


class NetworkOnBoxes:
    """A network of k inputs, evaluated anew on every box.

    Args:
        module: the network.
        embedding: from the k inputs to the network's own, (n, k).
        context: its second argument.
    """

    def __init__(self, module: nn.Module, embedding: Tensor, context: Tensor | None = None) -> None:
        self.network, self.embedding = Network(module, context), embedding

    def jet(self, x: Interval) -> Jet:
        """Values and derivatives over boxes (B, k)."""
        interpreter = JetInterpreter(x.radius)
        return self.network.interpret(interpreter.start(x.centre, self.embedding), interpreter)

"""Enclosures of a network's values and derivatives on many small boxes, with second derivatives for scalar inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from inn_guard.lipschitz.networks.activations import Activation
from inn_guard.lipschitz.networks.graph import LinearRearrangement, Network, Unbounded
from inn_guard.numerics.intervals import Interval, linear
from inn_guard.numerics.spectral_norm import exact

__all__ = ["Direct", "Jet", "JetReading", "Jets"]


@dataclass(frozen=True)
class Jet:
    """A value on boxes x = c + [-r, r] of k inputs.

    Attributes:
        centre: at c, (B, n), thin.
        value: over the box, (B, n).
        rate: the derivative at c, (B, k, n), thin.
        slope: the derivative over the box, (B, k, n).
        bend: the second derivative over the box, (B, k, n), for k = 1; None otherwise.
    """

    centre: Interval
    value: Interval
    rate: Interval
    slope: Interval
    second_derivative: Interval | None


class JetReading:
    """A network on boxes: every value by the mean-value form too, every scalar derivative by Taylor's.

    Args:
        radius: r of the boxes, (B, k).
    """

    def __init__(self, radius: Tensor) -> None:
        self.offset = Interval(-radius, radius)

    def start(self, centre: Tensor, embedding: Tensor) -> Jet:
        """The input ``embedding @ x`` of the network, embedding (n, k)."""
        point = Interval.of(centre)
        rate = Interval.of(embedding.T[None].expand(len(centre), -1, -1))
        bend = Interval.of(torch.zeros_like(rate.lo)) if centre.shape[1] == 1 else None
        c, v = linear(embedding, point), linear(embedding, point + self.offset)
        return Jet(c, v, rate, rate, bend)

    def linear(self, x: Jet, weight: Tensor, bias: Tensor | None) -> Jet:
        """W x + b."""
        W = exact(weight)
        shift = Interval.of(torch.zeros(()) if bias is None else exact(bias))
        bend = None if x.second_derivative is None else linear(W, x.second_derivative)
        return self._tight(
            Jet(
                linear(W, x.centre) + shift,
                linear(W, x.value) + shift,
                linear(W, x.rate),
                linear(W, x.slope),
                bend,
            )
        )

    def activate(self, x: Jet, function: Activation, place: str) -> Jet:
        """f(x) by the chain rule."""
        at_centre, over = (
            function.slope(part).map(lambda t: t[:, None]) for part in (x.centre, x.value)
        )
        bend = None
        if x.second_derivative is not None:
            bend = (
                function.second_derivative(x.value).map(lambda t: t[:, None]) * x.slope.square()
                + over * x.second_derivative
            )
        rate, slope = at_centre * x.rate, over * x.slope
        return self._tight(
            Jet(function.value(x.centre), function.value(x.value), rate, slope, bend)
        )

    def rescale(self, x: Jet, scale: Tensor, shift: Tensor) -> Jet:
        """scale * x + shift."""
        a, b = Interval.around(exact(scale)), Interval.around(exact(shift))
        bend = None if x.second_derivative is None else x.second_derivative * a
        return Jet(x.centre * a + b, x.value * a + b, x.rate * a, x.slope * a, bend)

    def add(self, x: Jet, y: Jet) -> Jet:
        """x + y."""
        bend = (
            None
            if x.second_derivative is None or y.second_derivative is None
            else x.second_derivative + y.second_derivative
        )
        return self._tight(
            Jet(x.centre + y.centre, x.value + y.value, x.rate + y.rate, x.slope + y.slope, bend)
        )

    def concatenate(self, parts: list[Jet]) -> Jet:
        """Side by side."""
        bends = [part.second_derivative for part in parts if part.second_derivative is not None]
        return Jet(
            Interval.cat([part.centre for part in parts], -1), Interval.cat([part.value for part in parts], -1),
            Interval.cat([part.rate for part in parts], -1), Interval.cat([part.slope for part in parts], -1),
            Interval.cat(bends, -1) if len(bends) == len(parts) else None,
        )  # fmt: skip

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
        return Jet(hull, hull, zero, zero, None if like.second_derivative is None else zero)

    def _tight(self, x: Jet) -> Jet:
        slope = x.slope
        if x.second_derivative is not None:
            slope = slope.meet(x.rate + x.second_derivative * self.offset.map(lambda t: t[:, None]))
        moved = (slope * self.offset.map(lambda t: t[:, :, None])).sum(1)
        return Jet(x.centre, x.value.meet(x.centre + moved), x.rate, slope, x.second_derivative)


@runtime_checkable
class Jets(Protocol):
    """What a table is made of."""

    def jet(self, x: Interval) -> Jet:
        """Over boxes (B, 1)."""
        ...


class Direct:
    """A network of k inputs, evaluated anew on every box.

    Args:
        module: the network.
        embedding: from the k inputs to the network's own, (n, k).
        context: its second argument.
    """

    def __init__(self, module: nn.Module, embedding: Tensor, context: Tensor | None = None) -> None:
        self.network, self.embedding = Network(module, context), embedding

    def __call__(self, x: Interval) -> tuple[Interval, Interval]:
        """Values (B, n) and derivatives (B, k, n) over boxes (B, k)."""
        jet = self.jet(x)
        return jet.value, jet.slope

    def jet(self, x: Interval) -> Jet:
        """All that is known."""
        reading = JetReading(x.radius)
        return self.network.read(reading.start(x.centre, self.embedding), reading)

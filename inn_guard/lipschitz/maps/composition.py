"""Maps made of other maps: one after the other, on part of a vector, the other way round."""

# Methods without a docstring are documented in BoundedMap.
# ruff: noqa: D102

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap, for_last_box
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.elementary import Elementwise
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, Linear
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.interval_matrices import matmul
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import Upper

__all__ = ["Composition", "InverseLayer", "OnTail", "inverted"]


@dataclass(frozen=True)
class Composition(BoundedMap):
    """Several maps, the first one applied first."""

    parts: Sequence[BoundedMap]

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """Products of the parts' bounds, each on the box that the parts before it make."""
        forward, inverse = Upper(1.0), Upper(1.0)
        is_global, reason = True, ""
        for k, part in enumerate(self.parts):
            own = part.bounds(box, effort.fraction(1 / (len(self.parts) - k)))
            forward, inverse = forward * own.forward, inverse * own.inverse
            is_global, reason = is_global and own.is_global, reason or own.reason
            box = part.image(box)
        return BlockBounds(forward, inverse, is_global, reason, "product of parts")

    def image(self, box: Interval) -> Interval:
        for part in self.parts:
            box = part.image(box)
        return box

    def preimage(self, box: Interval) -> Interval:
        for part in reversed(self.parts):
            box = part.preimage(box)
        return box

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        forward, inverse = Upper(1.0), Upper(1.0)
        for part, state in self._with_boxes(box):
            own = part.paper_formula(state, effort)
            forward, inverse = forward * own.forward, inverse * own.inverse
        return Pair(forward, inverse)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        for part, state in self._with_boxes(box):
            x = part.lipsdp_jacobian(builder, x, state)
        return x

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        for part, state in reversed(self._with_boxes(box)):
            z = part.lipsdp_inverse(builder, z, state)
        return z

    def jacobians(self, box: Interval) -> tuple[Interval, Interval]:
        """The products of the parts'."""
        forward = inverse = Interval.of(torch.eye(box.shape.numel(), dtype=torch.float64))
        for part, state in self._with_boxes(box):
            first, last = part.jacobians(state)
            forward, inverse = matmul(first, forward), matmul(inverse, last)
        return forward, inverse

    def subnetworks(self) -> list[nn.Module]:
        return [module for part in self.parts for module in part.subnetworks()]

    def _with_boxes(self, box: Interval) -> list[tuple[BoundedMap, Interval]]:
        """Every part with its inputs."""
        pairs: list[tuple[BoundedMap, Interval]] = []
        for part in self.parts:
            if pairs:
                previous, state = pairs[-1]
                box = previous.image(state)
            pairs.append((part, box))
        return pairs


@dataclass(frozen=True)
class OnTail(BoundedMap):
    """A map of the last entries of a vector, laid out in ``shape``; the first entries are kept.

    Its Jacobian is block diagonal: every bound is the larger of one and the inner map's.
    """

    inner: BoundedMap
    shape: tuple[int, ...]

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        own = self.inner.bounds(self._tail(box), effort)
        forward, inverse = own.pair.at_least(1.0)
        return replace(own, forward=forward, inverse=inverse, proofs={})

    def image(self, box: Interval) -> Interval:
        tail = self.inner.image(self._tail(box)).map(torch.flatten)
        return Interval.cat([self._parted(box)[0], tail])

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        return self.inner.paper_formula(self._tail(box), effort).at_least(1.0)

    def _tail(self, box: Interval) -> Interval:
        return self._parted(box)[1].map(lambda t: t.reshape(self.shape))

    def _parted(self, box: Interval) -> tuple[Interval, Interval]:
        flat = box.map(torch.flatten)
        head = len(flat.lo) - math.prod(self.shape)
        return flat[:head], flat[head:]


@dataclass(frozen=True)
class InverseLayer(BoundedMap):
    """The inverse of another map, whose inputs are the box's preimage, as far as it is known."""

    inner: BoundedMap

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        inputs = self.image(box)
        own = self.inner.bounds(inputs, effort).swapped
        is_understood = own.method != "none"
        if own.reason and is_understood and box.bounded and not inputs.bounded:
            return replace(own, reason="its images of the box are not known to be bounded")
        return own

    @for_last_box
    def image(self, box: Interval) -> Interval:
        """The other's preimage."""
        return self.inner.preimage(box)

    def preimage(self, box: Interval) -> Interval:
        return self.inner.image(box)

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        return self.inner.paper_formula(self.image(box), effort).swapped

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        return self.inner.lipsdp_inverse(builder, x, self.image(box))

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        return self.inner.lipsdp_jacobian(builder, z, self.image(box))

    def jacobians(self, box: Interval) -> tuple[Interval, Interval]:
        forward, inverse = self.inner.jacobians(self.image(box))
        return inverse, forward

    def secant_chain(
        self, builder: ChainBuilder, x: Linear, box: Interval, centre: Tensor
    ) -> Linear:
        """Not known: derivatives of an inverse that share a slope do not enclose its secants."""
        raise Unbounded("the differences of an inverse are not chains")

    def subnetworks(self) -> list[nn.Module]:
        return self.inner.subnetworks()


def inverted(bounded: BoundedMap) -> BoundedMap:
    """The inverse map: the one that is known for an elementwise map, or the map run backwards."""
    if isinstance(bounded, Elementwise) and bounded.inverse is not None:
        return bounded.inverse
    return InverseLayer(bounded)

"""Maps made of other maps: one after the other, on part of a vector, the other way round."""

# Methods without a docstring are documented in BoundedMap.
# ruff: noqa: D102

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.elementary import Elementwise
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, Linear
from inn_guard.lipschitz.networks.conditioner import Proof, SearchBudget
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import Upper, enlarged

__all__ = ["Composition", "InverseLayer", "OnTail", "inverted"]


@dataclass(frozen=True)
class Composition(BoundedMap):
    """Several maps, the first one applied first."""

    parts: Sequence[BoundedMap]

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """Products of the parts' bounds, each on the box that the parts before it make."""
        forward, inverse = Upper(1.0), Upper(1.0)
        is_global, reason, proofs = True, "", {}
        for k, part in enumerate(self.parts):
            own = part.bounds(box, effort.fraction(1 / (len(self.parts) - k)))
            forward, inverse = forward * own.forward, inverse * own.inverse
            is_global, reason = is_global and own.is_global, reason or own.reason
            for name, proof in own.proofs.items():
                proofs[f"{k}.{name}"] = proof
            box = part.image(box)
        return BlockBounds(forward, inverse, is_global, reason, "product of parts", proofs)

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

    def comparison_matrices(self, box: Interval, bounds: BlockBounds) -> tuple[Tensor, Tensor]:
        """The products of the parts'."""
        forward = inverse = torch.eye(box.shape[0], dtype=torch.float64)
        for k, (part, state) in enumerate(self._with_boxes(box)):
            own = replace(bounds, proofs=_proofs_of_part(bounds.proofs, k))
            first, last = part.comparison_matrices(state, own)
            forward = enlarged(first @ forward, max(first.shape) + 2)
            inverse = enlarged(inverse @ last, max(first.shape) + 2)
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


def _proofs_of_part(proofs: dict[str, Proof], k: int) -> dict[str, Proof]:
    own = {}
    for name, proof in proofs.items():
        if name.startswith(f"{k}."):
            own[name.removeprefix(f"{k}.")] = proof
    return own


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
        return replace(own, forward=forward, inverse=inverse)

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
    _last: list[Interval] = field(default_factory=list, init=False, repr=False, compare=False)

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        inputs = self.image(box)
        own = self.inner.bounds(inputs, effort).swapped
        if own.reason and box.bounded and not inputs.bounded:
            return replace(own, reason="its images of the box are not known to be bounded")
        return own

    def image(self, box: Interval) -> Interval:
        """The other's preimage, cached for the last box: every method begins with it."""
        if not self._last or self._last[0] is not box:
            self._last[:] = [box, self.inner.preimage(box)]
        return self._last[1]

    def preimage(self, box: Interval) -> Interval:
        return self.inner.image(box)

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        return self.inner.paper_formula(self.image(box), effort).swapped

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        return self.inner.lipsdp_inverse(builder, x, self.image(box))

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        return self.inner.lipsdp_jacobian(builder, z, self.image(box))

    def comparison_matrices(self, box: Interval, bounds: BlockBounds) -> tuple[Tensor, Tensor]:
        own = replace(bounds.swapped, proofs={})
        forward, inverse = self.inner.comparison_matrices(self.image(box), own)
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

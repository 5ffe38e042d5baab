"""Maps made of other maps: one after the other, on a part of a vector, the other way round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.elementary import Elementwise
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, Linear
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import gamma, up

__all__ = ["Composition", "InverseLayer", "OnTail", "inverted"]

EXCHANGED = {"forward": "inverse", "inverse": "forward"}


@dataclass(frozen=True)
class Composition(BoundedMap):
    """Several maps, the first one applied first."""

    parts: Sequence[BoundedMap]

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """Products of the parts' bounds, each on the box that the parts before it make."""
        total, proofs = BlockBounds(1.0, 1.0), {}
        for k, part in enumerate(self.parts):
            own = part.bounds(box, effort.within(1 / (len(self.parts) - k)))
            proofs.update({f"{k}.{name}": proof for name, proof in own.proofs.items()})
            total = BlockBounds(
                up(total.forward * own.forward), up(total.inverse * own.inverse),
                total.is_global and own.is_global, total.reason or own.reason, "product of parts", proofs,
            )  # fmt: skip
            box = part.image(box)
        return total

    def image(self, box: Interval) -> Interval:
        """Through all parts."""
        for part in self.parts:
            box = part.image(box)
        return box

    def preimage(self, box: Interval) -> Interval:
        """Back through all parts."""
        for part in reversed(self.parts):
            box = part.preimage(box)
        return box

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        """The product."""
        forward = inverse = 1.0
        for part, state in zip(self.parts, self._boxes(box), strict=True):
            own = part.paper_formula(state, effort)
            forward, inverse = up(forward * own.forward), up(inverse * own.inverse)
        return Pair(forward, inverse)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        """One after the other."""
        for part, state in zip(self.parts, self._boxes(box), strict=True):
            x = part.lipsdp_jacobian(builder, x, state)
        return x

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        """The last one first."""
        for part, state in reversed(list(zip(self.parts, self._boxes(box), strict=True))):
            z = part.lipsdp_inverse(builder, z, state)
        return z

    def comparison_matrices(self, box: Interval, bounds: BlockBounds) -> tuple[Tensor, Tensor]:
        """The products of the parts'."""
        ahead = back = torch.eye(box.shape[0], dtype=torch.float64)
        for k, (part, state) in enumerate(zip(self.parts, self._boxes(box), strict=True)):
            own = {
                name.removeprefix(f"{k}."): p
                for name, p in bounds.proofs.items()
                if name.startswith(f"{k}.")
            }
            first, last = part.comparison_matrices(state, replace(bounds, proofs=own))
            rounding = 1 + 2 * gamma(len(first) + 2)
            ahead, back = (first @ ahead) * rounding, (back @ last) * rounding
        return ahead, back

    def subnetworks(self) -> list[torch.nn.Module]:
        """Of all parts."""
        return [module for part in self.parts for module in part.subnetworks()]

    def _boxes(self, box: Interval) -> list[Interval]:
        states = [box]
        for part in self.parts[:-1]:
            states.append(part.image(states[-1]))
        return states[: len(self.parts)]


@dataclass(frozen=True)
class OnTail(BoundedMap):
    """A map of the last entries of a vector, laid out in ``shape``; the first entries pass."""

    inner: BoundedMap
    shape: tuple[int, ...]

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """The larger of one and the inner map's: the Jacobian is block diagonal."""
        own = self.inner.bounds(self._tail(box), effort)
        return BlockBounds(
            max(1.0, own.forward),
            max(1.0, own.inverse),
            own.is_global,
            own.reason,
            own.method,
            own.proofs,
        )

    def image(self, box: Interval) -> Interval:
        """[head, inner image]."""
        tail = self.inner.image(self._tail(box)).map(torch.flatten)
        return Interval.cat([self._parted(box)[0], tail])

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        """The larger of one and the inner map's."""
        own = self.inner.paper_formula(self._tail(box), effort)
        return Pair(max(1.0, own.forward), max(1.0, own.inverse))

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
        """The other's bounds, exchanged."""
        inputs = self.image(box)
        own = self.inner.bounds(inputs, effort)
        proofs = {EXCHANGED[name]: proof for name, proof in own.proofs.items() if name in EXCHANGED}
        lost = own.reason and box.bounded and not inputs.bounded
        reason = "its images of the box are not known to be bounded" if lost else own.reason
        return BlockBounds(own.inverse, own.forward, own.is_global, reason, own.method, proofs)

    def image(self, box: Interval) -> Interval:
        """The other's preimage; that of the last box is kept, because every question about it begins there."""
        if not self._last or self._last[0] is not box:
            self._last[:] = [box, self.inner.preimage(box)]
        return self._last[1]

    def preimage(self, box: Interval) -> Interval:
        """The other's image."""
        return self.inner.image(box)

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        """SwappedOutputs."""
        forward, inverse = self.inner.paper_formula(self.image(box), effort)
        return Pair(inverse, forward)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        """The other's inverse."""
        return self.inner.lipsdp_inverse(builder, x, self.image(box))

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        """The other's forward map."""
        return self.inner.lipsdp_jacobian(builder, z, self.image(box))

    def comparison_matrices(self, box: Interval, bounds: BlockBounds) -> tuple[Tensor, Tensor]:
        """The other's, exchanged."""
        own = replace(bounds, forward=bounds.inverse, inverse=bounds.forward, proofs={})
        ahead, back = self.inner.comparison_matrices(self.image(box), own)
        return back, ahead

    def secant_chain(
        self, builder: ChainBuilder, x: Linear, box: Interval, centre: Tensor
    ) -> Linear:
        """Not known: derivatives of an inverse that share a slope do not enclose its secants."""
        raise Unbounded("the differences of an inverse are not chains")

    def subnetworks(self) -> list[torch.nn.Module]:
        """The other's."""
        return self.inner.subnetworks()


def inverted(described: BoundedMap) -> BoundedMap:
    """The inverse map: the one that was given, or the other one run backwards."""
    own = described.inverse if isinstance(described, Elementwise) else None
    return InverseLayer(described) if own is None else own

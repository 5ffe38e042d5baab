"""BoundedMap: a layer in the terms in which its bounds are known; and the register of rules."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from inn_guard.core.missing import Missing
from inn_guard.core.readable import RulesByClass
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.neighbourhood import Moved, Neighbourhood
from inn_guard.lipschitz.maps.preimage import everywhere
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, Linear
from inn_guard.lipschitz.networks.conditioner import Proof, SearchBudget, bound_chain, torus_of
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.intervals import Box, Interval

__all__ = ["BlockBounds", "BoundedMap", "NoRule", "bounded_map", "for_last_box"]

ROUNDED = 1 + 1e-9  #: bounds that differ by less are taken for equal


@dataclass(frozen=True)
class BlockBounds:
    """Certified bounds of one block on one box.

    Attributes:
        forward: bound of sup ||J||.
        inverse: bound of sup ||J^-1||, over the same x.
        is_global: whether they hold on all of R^d.
        reason: why a bound is infinite; empty where both are finite.
        method: what gave them.
        proofs: of ``forward`` and of ``inverse``, by these names, where a chain gave them.
    """

    forward: float
    inverse: float
    is_global: bool = True
    reason: str = ""
    method: str = "closed form"
    proofs: dict[str, Proof] = field(default_factory=dict, compare=False)

    @classmethod
    def none(cls, reason: str) -> BlockBounds:
        """No bound, and why."""
        return cls(math.inf, math.inf, is_global=False, reason=reason, method="none")

    @property
    def pair(self) -> Pair:
        """(forward, inverse)."""
        return Pair(self.forward, self.inverse)

    @property
    def swapped(self) -> BlockBounds:
        """Those of the inverse map."""
        other = {"forward": "inverse", "inverse": "forward"}
        proofs = {other[name]: proof for name, proof in self.proofs.items()}
        return replace(self, forward=self.inverse, inverse=self.forward, proofs=proofs)

    def meet(self, other: BlockBounds) -> BlockBounds:
        """The smaller bound of each direction, of two for the same box; if equal, its own."""
        best = self
        for name in ("forward", "inverse"):
            if getattr(other, name) * ROUNDED < getattr(self, name):
                proofs = dict(best.proofs)
                proofs.pop(name, None)
                if name in other.proofs:
                    proofs[name] = other.proofs[name]
                best = replace(best, **{name: getattr(other, name)}, proofs=proofs)
                best = replace(best, method=other.method, is_global=other.is_global)
        if best.pair.finite:
            best = replace(best, reason="")
        return best


Result = TypeVar("Result")


def for_last_box(method: Callable[[Any, Interval], Result]) -> Callable[[Any, Interval], Result]:
    """The method, whose result is kept for the last box: several bounds begin with it."""
    name = f"_last_{method.__name__}"

    @functools.wraps(method)
    def kept(self: Any, box: Interval) -> Result:
        last = self.__dict__.get(name)
        if last is None or last[0] is not box:
            last = (box, method(self, box))
            # the owner is a frozen dataclass
            self.__dict__[name] = last
        return last[1]

    return kept


class BoundedMap(abc.ABC):
    """A map whose bounds are known. Boxes have the shape of one sample, without batch.

    A subclass defines ``bounds`` and ``image``; ``preimage``, so that its inverse has bounds on
    boxes; ``lipsdp_jacobian`` and ``lipsdp_inverse`` where the Jacobian is made of linear maps and
    slopes, so that whole networks are bounded at once; ``paper_formula`` where the paper has one.
    """

    @abc.abstractmethod
    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """Bounds of J and J^-1 over the box."""

    @abc.abstractmethod
    def image(self, box: Interval) -> Interval:
        """A box that holds the image of the box."""

    def preimage(self, box: Interval) -> Interval:
        """A box that holds every x whose image is in the box; default: everything."""
        return everywhere(box)

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        """What Table 3 prints for this block; default: the certified bounds."""
        return self.bounds(box, replace(effort, steps=0)).pair

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        """The Jacobians over the box, applied to x, as layers of a builder.

        Raises:
            Unbounded: if they are not of that form.
        """
        raise Unbounded(f"{type(self).__name__} is not a chain of linear maps and slopes")

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        """The inverse Jacobians at the same x, applied to z, as layers of a builder.

        Raises:
            Unbounded: if they are not of that form.
        """
        raise Unbounded(f"{type(self).__name__} is not a chain of linear maps and slopes")

    def secant_chain(
        self, builder: ChainBuilder, x: Linear, box: Interval, centre: Tensor
    ) -> Linear:
        """F(centre + d) - F(centre) for d = x and centre + d in the box, as layers of a builder.

        Slopes of secants lie where the derivatives do.

        Raises:
            Unbounded: if the differences are not of that form.
        """
        return self.lipsdp_jacobian(builder, x, box)

    def jacobians(self, box: Interval) -> tuple[Interval, Interval]:
        """Enclosures over the box of J (outputs, inputs) and of J^-1, of flattened samples.

        Raises:
            Unbounded: if they are not known.
        """
        raise Unbounded(f"the Jacobian of {type(self).__name__} is not enclosed")

    def linearised(self, around: Neighbourhood) -> Moved:
        """The map to first order around a point.

        Raises:
            Unbounded: if that is not known.
        """
        raise Unbounded(f"{type(self).__name__} is not linearised")

    def subnetworks(self) -> list[nn.Module]:
        """The networks in it, whose paddings a torus must hold."""
        return []

    def recursion_proof(self, box: Interval, effort: SearchBudget) -> Proof | None:
        """A bound of J over the box by the recursion, with its proof; None if J is not a chain."""
        try:
            builder = ChainBuilder(box.shape[0], torus_of(self.subnetworks(), tuple(box.shape)))
            output = self.lipsdp_jacobian(builder, builder.start(), box)
            return bound_chain(builder.finish(output), effort)
        except Unbounded:
            return None


@functools.partial(RulesByClass, inside=True)
def bounded_map(why: Missing, block: Any, layer: Any) -> BoundedMap:
    """The bounded map of a block, by the rule of its class; see ``inn_guard.lipschitz.rules``.

    Args:
        why: why there is no rule; not an argument of a call.
        block: whose class is looked up: ``layer.block``.
        layer: the Invertible around it, with the context.

    Returns:
        The map; a ``NoRule`` with the reason where no rule is registered, or where the block or a
        module in it may compute something else than its class says.
    """
    return NoRule(why.reason)


@dataclass(frozen=True)
class NoRule(BoundedMap):
    """A block about which nothing is known; its bounds are infinite.

    Attributes:
        reason: why.
        shape_of: from the input shape to the output shape; default: the same.
    """

    reason: str
    shape_of: Callable[[torch.Size], torch.Size] = lambda shape: shape

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """Infinite, with the reason."""
        return BlockBounds.none(self.reason)

    def image(self, box: Interval) -> Interval:
        """Everything."""
        return Box.everywhere(self.shape_of(box.shape))

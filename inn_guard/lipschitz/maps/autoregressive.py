"""Maps that solve an autoregressive one, entry after entry: IAF, and MAF where a library calls sampling forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.composition import EXCHANGED
from inn_guard.lipschitz.maps.residual import Autoregressive
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, Linear
from inn_guard.lipschitz.networks.conditioner import SearchBudget, read
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.intervals import Interval

__all__ = ["Sequential"]

Undone = Callable[
    [Interval, list[Interval]], Interval
]  #: (x, parameters) -> z with h(z; parameters) = x


@dataclass(frozen=True)
class Sequential(BoundedMap):
    """x -> z with A(z) = x for an autoregressive A: z_i from x_i and z_1 ... z_{i-1}. Its Jacobian is A's inverse at z.

    Attributes:
        solved: A.
        undone: the inverse of A's map of one entry.
    """

    solved: Autoregressive
    undone: Undone

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """A's over the image, exchanged."""
        own = self.solved.bounds(self.image(box), effort)
        proofs = {EXCHANGED[name]: proof for name, proof in own.proofs.items()}
        return BlockBounds(own.inverse, own.forward, own.is_global, own.reason, own.method, proofs)

    def image(self, box: Interval) -> Interval:
        """By as many passes as there are entries: each makes one more of them right, from whatever start."""
        coupling = self.solved.coupling
        zero = torch.zeros_like(box.lo)
        z = Interval(zero, zero)
        try:
            for _ in range(len(zero)):
                output = read(coupling.network, z, coupling.context).output
                z = self.undone(box, [output[rows] for rows in coupling.rows])
        except Unbounded:
            everything = torch.full_like(zero, torch.inf)
            return Interval(-everything, everything)
        return z

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        """A's over the image, exchanged."""
        forward, inverse = self.solved.paper_formula(self.image(box), effort)
        return Pair(inverse, forward)

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        """A's Jacobians over the image."""
        return self.solved.lipsdp_jacobian(builder, z, self.image(box))

    def subnetworks(self) -> list[nn.Module]:
        """The masked network."""
        return self.solved.subnetworks()

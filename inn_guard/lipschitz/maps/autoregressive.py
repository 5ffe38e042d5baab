"""Autoregressive maps, and maps that invert one entry after entry.

The latter are IAF, and MAF where sampling is the forward direction.
"""

# Methods without a docstring are documented in BoundedMap.
# ruff: noqa: D102

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import inn_guard.lipschitz.maps.closed_forms as blocks
from inn_guard.execution.deadline import spend
from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair, supremum
from inn_guard.lipschitz.maps.coupling import Coupling, Derivatives, dependence
from inn_guard.lipschitz.maps.preimage import everywhere, is_everywhere
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, Linear
from inn_guard.lipschitz.networks.conditioner import SearchBudget, analyse
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import is_finite
from inn_guard.numerics.spectral_norm import inverse_with_error, norm_operations

__all__ = ["Autoregressive", "InverseAutoregressive"]

MAX_PARAMETERS = 128  #: read, one entry after the other, when the preimage of a map is sought

#: (x, parameters) -> z with h(z; parameters) = x
EntryInverse = Callable[[Interval, list[Interval]], Interval]


@dataclass(frozen=True)
class Autoregressive(BoundedMap):
    """z_i = h(x_i; theta_i(x_1..x_{i-1})) with a masked network: MAF, autoregressive splines.

    Attributes:
        coupling: the same data as a coupling's, with a split that keeps and changes everything.
    """

    coupling: Coupling

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """Forward by the recursion on all of J, inverse by the M-matrix of entrywise bounds."""
        coupling = self.coupling
        try:
            d = coupling.derivatives(box)
            off_diagonal = self._off_diagonal(d)
        except Unbounded as error:
            return BlockBounds.none(str(error))
        order = _triangular_order(off_diagonal)
        if order is None:
            return BlockBounds.none("the network's masks are not autoregressive")
        largest, is_global = supremum(d.slope), is_everywhere(box)
        forward = largest + coupling.norms(d, effort.deadline.fraction(0.3)).forward
        operations = 2 * norm_operations(*off_diagonal.shape)
        if not effort.deadline.can_afford(operations):
            return BlockBounds(forward, math.inf, is_global, "time ran out for its inverse")
        spend(operations)
        ordered = off_diagonal[order][:, order]
        pair = blocks.autoregressive(d.slope.lo[order], ordered, forward=forward)
        proof, proofs, reason = self.recursion_proof(box, effort), {}, ""
        if proof is not None and proof.bound < forward:
            pair, proofs = Pair(proof.bound, pair.inverse), {"forward": proof}
        if not pair.finite:
            reason = coupling.reason_for_infinity(d, Pair(largest, 1.0))
        return BlockBounds(*pair, is_global, reason, "LipSDP recursion, M-matrix", proofs)

    def image(self, box: Interval) -> Interval:
        return self.coupling.image(box)

    def preimage(self, box: Interval) -> Interval:
        """Entry after entry: bounds of the first ones bound the parameters of the next ones."""
        coupling, split, x = self.coupling, self.coupling.split, everywhere(box)
        images = box.map(split.changed)
        unknown = torch.ones(len(box.lo), dtype=torch.bool)
        for _ in range(max(1, MAX_PARAMETERS // coupling.transformer.count)):
            try:
                theta = coupling.parameters(x)
            except Unbounded:
                break
            known = torch.stack([part.magnitude.isfinite() for part in theta]).all(0)
            ready = unknown & known
            if not bool(ready.any()):
                break
            found = coupling.undone(images[ready], [part[ready] for part in theta])
            lo = split.changed(x.lo).masked_scatter(ready, found.lo)
            hi = split.changed(x.hi).masked_scatter(ready, found.hi)
            x = Interval(split.joined(x.lo, lo), split.joined(x.hi, hi))
            unknown = unknown & ~ready
        return x

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        return self.coupling.lipsdp_jacobian(builder, x, box)

    def comparison_matrices(self, box: Interval, bounds: BlockBounds) -> tuple[Tensor, Tensor]:
        """diag(slopes) + |N|, and the inverse of the M-matrix diag(least slopes) - |N|."""
        d = self.coupling.derivatives(box)
        off_diagonal, least = self._off_diagonal(d), d.slope.lo
        known = bool((least > 0).all()) and is_finite(off_diagonal)
        if not known or _triangular_order(off_diagonal) is None:
            raise Unbounded(
                "the network's masks are not autoregressive, or its bounds are infinite"
            )
        inverse, error = inverse_with_error(torch.diag(least) - off_diagonal)
        return torch.diag(d.slope.magnitude) + off_diagonal, inverse.clamp_min(0) + error

    def _off_diagonal(self, d: Derivatives) -> Tensor:
        """|N|, entry by entry."""
        entries = d.network.entries()
        off_diagonal = torch.zeros(len(d.slope.lo), entries.shape[1], dtype=torch.float64)
        for rows, factor in zip(self.coupling.rows, d.sensitivities, strict=True):
            off_diagonal = off_diagonal + dependence(factor.magnitude, entries[rows])
        return off_diagonal

    def subnetworks(self) -> list[nn.Module]:
        return self.coupling.subnetworks()


@dataclass(frozen=True)
class InverseAutoregressive(BoundedMap):
    """x -> z with A(z) = x for an autoregressive A, z_i from x_i and z_1 ... z_{i-1}.

    Its Jacobian is the inverse of A's at z.

    Attributes:
        solved: A.
        entry_inverse: the inverse of A's map of one entry.
    """

    solved: Autoregressive
    entry_inverse: EntryInverse

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        return self.solved.bounds(self.image(box), effort).swapped

    def image(self, box: Interval) -> Interval:
        """As many passes as entries: each makes one more of them right, whatever the start."""
        coupling = self.solved.coupling
        zero = torch.zeros_like(box.lo)
        z = Interval(zero, zero)
        try:
            for _ in range(len(zero)):
                output = analyse(coupling.network, z, coupling.context).output
                z = self.entry_inverse(box, [output[rows] for rows in coupling.rows])
        except Unbounded:
            return everywhere(box)
        return z

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        return self.solved.paper_formula(self.image(box), effort).swapped

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        return self.solved.lipsdp_jacobian(builder, z, self.image(box))

    def subnetworks(self) -> list[nn.Module]:
        return self.solved.subnetworks()


def _triangular_order(dependence: Tensor) -> Tensor | None:
    """An order of the entries in which each depends on earlier ones only; None if there is none."""
    depends = dependence != 0
    missing = depends.sum(1)
    placed: list[Tensor] = []
    left = torch.ones(len(depends), dtype=torch.bool)
    while bool(left.any()):
        ready = (left & (missing == 0)).nonzero().flatten()
        if not len(ready):
            return None
        placed.append(ready)
        left[ready] = False
        missing = missing - depends[:, ready].sum(1)
    return torch.cat(placed)

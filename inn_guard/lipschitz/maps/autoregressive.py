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

from inn_guard.execution.deadline import spend
from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap, for_last_box
from inn_guard.lipschitz.maps.closed_forms import Pair, supremum
from inn_guard.lipschitz.maps.coupling import Coupling, Derivatives
from inn_guard.lipschitz.maps.preimage import everywhere, is_everywhere
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, Linear
from inn_guard.lipschitz.networks.conditioner import SearchBudget, analyse
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.interval_matrices import diagonal, interval_norm, triangular_inverse
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import Upper
from inn_guard.numerics.spectral_norm import norm_operations

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
        """Forward by the recursion on all of J, or by norms; the inverse from the enclosed J."""
        coupling = self.coupling
        try:
            d = coupling.derivatives(box)
            J, order = self._jacobian(d)
        except Unbounded as error:
            return BlockBounds.none(str(error))
        largest, is_global, proofs, reason = supremum(d.slope), is_everywhere(box), {}, ""
        forward = largest + coupling.norms(d, effort.deadline.fraction(0.3)).forward
        operations = 2 * norm_operations(*J.shape)
        if not effort.deadline.can_afford(operations):
            return BlockBounds(forward, math.inf, is_global, "time ran out for its inverse")
        spend(operations)
        inverse = Upper(math.inf)
        if J.bounded:
            forward = Upper.min(forward, interval_norm(J)[0])
            inverse = interval_norm(_inverse(J, order))[0]
        proof = self.recursion_proof(box, effort)
        if proof is not None and proof.bound < forward:
            forward, proofs = proof.bound, {"forward": proof}
        if not Pair(forward, inverse).finite:
            reason = coupling.reason_for_infinity(d, Pair(largest, 1.0))
        method = "LipSDP recursion, enclosed Jacobian"
        return BlockBounds(forward, inverse, is_global, reason, method, proofs)

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

    def jacobians(self, box: Interval) -> tuple[Interval, Interval]:
        J, order = self._jacobian(self.coupling.derivatives(box))
        if not J.bounded:
            raise Unbounded("a slope is not finite")
        inverse = _inverse(J, order)
        if not inverse.bounded:
            raise Unbounded("a slope comes arbitrarily close to zero")
        return J, inverse

    def _jacobian(self, d: Derivatives) -> tuple[Interval, Tensor]:
        """J, and an order of the entries in which it is triangular.

        Raises:
            Unbounded: if there is none.
        """
        N = self.coupling.dependence(d, d.sensitivities)
        order = _triangular_order(N.magnitude)
        if order is None:
            raise Unbounded("the network's masks are not autoregressive")
        return N + diagonal(d.slope), order

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

    @for_last_box
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

    def jacobians(self, box: Interval) -> tuple[Interval, Interval]:
        J, inverse = self.solved.jacobians(self.image(box))
        return inverse, J

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        return self.solved.paper_formula(self.image(box), effort).swapped

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        return self.solved.lipsdp_jacobian(builder, z, self.image(box))

    def subnetworks(self) -> list[nn.Module]:
        return self.solved.subnetworks()


def _inverse(J: Interval, order: Tensor) -> Interval:
    """Of a J that is triangular in an order of its entries."""
    back = order.argsort()
    return triangular_inverse(J[order][:, order])[back][:, back]


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

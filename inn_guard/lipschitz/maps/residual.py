"""Residual maps and the flow of a neural ODE."""

# Methods without a docstring are documented in BoundedMap.
# ruff: noqa: D102

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import inn_guard.lipschitz.maps.closed_forms as blocks
from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.preimage import everywhere, is_everywhere
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, ChainInterpreter, Linear
from inn_guard.lipschitz.networks.conditioner import SearchBudget, analyse, subnetwork_lipschitz
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.interval_matrices import interval_inverse
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import Upper

__all__ = ["OdeFlow", "Residual"]

ROUNDED_STEPS = 1 + 1e-9  #: allows for a solver's rounding of times, and for a last step of nothing


@dataclass(frozen=True)
class Residual(BoundedMap):
    """x + g(x) with Lip(g) < 1."""

    network: nn.Module
    context: Any = None

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """1 / (1 - L) for the inverse; for the forward map the recursion on x + g(x), or 1 + L."""
        try:
            L = subnetwork_lipschitz(
                self.network, box, effort=effort.fraction(0.5), context=self.context
            )
        except Unbounded as error:
            return BlockBounds.none(str(error))
        forward, inverse = blocks.invertible_residual(L)
        proofs, reason = {}, ""
        proof = self.recursion_proof(box, effort)
        if proof is not None and proof.bound < forward:
            forward, proofs = proof.bound, {"forward": proof}
        if not L < 1:
            reason = f"Lip(g) <= {L:.4g} is not below one: the inverse is not proved to exist"
        return BlockBounds(forward, inverse, is_everywhere(box), reason, "LipSDP recursion", proofs)

    def image(self, box: Interval) -> Interval:
        try:
            return box + analyse(self.network, box, self.context).output
        except Unbounded:
            return everywhere(box)

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        """1 + L and 1 / (1 - L), L by the norm product."""
        try:
            L = analyse(self.network, box, self.context).product(effort.deadline)
        except Unbounded:
            return BlockBounds.none("").pair
        return blocks.invertible_residual(L)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        g = builder.masked(analyse(self.network, box, self.context).append_to(builder, x))
        return ChainInterpreter(builder).add(x, g)

    def jacobians(self, box: Interval) -> tuple[Interval, Interval]:
        """I + J_g, and its inverses."""
        g = analyse(self.network, box, self.context).jacobian()
        if not g.bounded:
            raise Unbounded("a slope is not finite")
        J = g + torch.eye(len(g.lo))
        K = interval_inverse(J)
        if not K.bounded:
            raise Unbounded("the inverse is not proved to exist")
        return J, K

    def subnetworks(self) -> list[nn.Module]:
        return [self.network]


class _TimeSecond(nn.Module):
    """A field (t, x) as a network of x with the context t."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, x: Any, t: Any) -> Any:
        return self.field(t, x)


@dataclass(frozen=True)
class OdeFlow(BoundedMap):
    """Equal steps x + g(x) of an explicit Runge-Kutta method: what a solver computes.

    With z = h L, Lip(g) <= l(z) for a polynomial l of the method. The map of all steps has the
    bounds (1 + l)^steps forward and, where l < 1, 1 / (1 - l)^steps for the inverse.

    Attributes:
        field: dx/dt of (t, x).
        duration: T.
        steps: number of steps; h = T / steps.
        polynomial: l's coefficients of z, z^2, ...
    """

    field: nn.Module
    duration: float
    steps: int
    polynomial: Sequence[float]

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        times = torch.tensor([[0.0], [self.duration]], dtype=torch.float64)
        # L on all of R^d: trajectories leave every box
        try:
            L = subnetwork_lipschitz(
                _TimeSecond(self.field), everywhere(box), effort=effort, context=times
            )
        except Unbounded as error:
            return BlockBounds.none(str(error))
        z = L * Upper(self.duration * ROUNDED_STEPS) / self.steps
        own, power = Upper(0.0), Upper(1.0)
        for coefficient in self.polynomial:
            power = power * z
            own = own + power * coefficient
        forward, inverse, least = Upper(1.0), Upper(1.0), 1 - own
        for _ in range(self.steps):
            forward, inverse = forward * (own + 1), inverse / least
        reason = ""
        if not math.isfinite(inverse):
            reason = f"Lip(f) <= {L:.4g}: {self.steps} steps are too few to be proved invertible"
        return BlockBounds(forward, inverse, reason=reason, method="Runge-Kutta steps")

    def image(self, box: Interval) -> Interval:
        """Everything: no invariant box is sought."""
        return everywhere(box)

    def subnetworks(self) -> list[nn.Module]:
        return [self.field]

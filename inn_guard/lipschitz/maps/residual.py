"""Bounded maps beyond couplings: maps of known constants, logit, residual, ODE, autoregressive."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import inn_guard.lipschitz.maps.closed_forms as blocks
from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.coupling import Coupling, Derivatives, dependence
from inn_guard.lipschitz.maps.preimage import everywhere
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, ChainReading, Linear
from inn_guard.lipschitz.networks.conditioner import (
    SearchBudget,
    bound_chain,
    read,
    subnetwork_lipschitz,
    torus_of,
)
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import up
from inn_guard.numerics.spectral_norm import inverse_with_error, norm_operations

__all__ = ["Autoregressive", "Flow", "KnownConstants", "LogitMap", "Residual"]

UNDONE = 128  #: parameters that may be looked at, one entry after the other, when an autoregressive map is undone


@dataclass(frozen=True)
class KnownConstants(BoundedMap):
    """A map of known constants on all of R^d: planar, radial, Sylvester, splines with fixed knots, ...

    Attributes:
        pair: its bounds.
        drift: a bound of |F(x) - x| per entry, from which the image follows; infinite if unknown.
        shape_of: from the input shape to the output shape; the same unless given.
        inside: the interval that every entry is mapped to itself in, if there is one: [-B, B] of a spline with tails.
    """

    pair: Pair
    drift: float = math.inf
    inside: tuple[float, float] | None = None
    shape_of: Callable[[torch.Size], torch.Size] = lambda shape: shape

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """The constants."""
        finite = math.isfinite(self.pair.forward) and math.isfinite(self.pair.inverse)
        return BlockBounds(
            *self.pair,
            reason="" if finite else "the block is not invertible everywhere, or not Lipschitz",
        )

    def image(self, box: Interval) -> Interval:
        """The box, widened by the drift."""
        if self.inside is not None:
            return box.hull(
                Interval(
                    torch.full_like(box.lo, self.inside[0]), torch.full_like(box.hi, self.inside[1])
                )
            )
        if not math.isfinite(self.drift):
            everything = torch.full(self.shape_of(box.shape), math.inf, dtype=torch.float64)
            return Interval(-everything, everything)
        return box + Interval(
            torch.full_like(box.lo, -self.drift), torch.full_like(box.hi, self.drift)
        )

    def preimage(self, box: Interval) -> Interval:
        """The same, of maps that keep the shape."""
        return self.image(box) if self.shape_of(box.shape) == box.shape else everywhere(box)


@dataclass(frozen=True)
class LogitMap(BoundedMap):
    """logit(alpha + (1 - 2 alpha) x) / temperature for data in [0, 1]; local."""

    alpha: float
    temperature: float = 1.0

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """Over the box within (0, 1)."""
        p = self._inside(box)
        if p.inf() <= 0 or p.sup() >= 1:
            return BlockBounds.none(
                "the logit is unbounded at 0 and 1: give domain=Box(lo, hi) inside"
            )
        # p (1 - p) in one piece, largest at 1/2
        ends = [Interval(end, end) * (1.0 - Interval(end, end)) for end in (p.lo, p.hi)]
        product = ends[0].hull(ends[1])
        product = Interval(
            product.lo,
            torch.where((p.lo <= 0.5) & (p.hi >= 0.5), product.hi.clamp_min(0.25), product.hi),
        )
        slope = (1.0 - Interval.of(self.alpha) * 2.0) / product / self.temperature
        return BlockBounds(*blocks.elementwise(slope), is_global=False)

    def image(self, box: Interval) -> Interval:
        """The logits of both ends."""
        p = self._inside(box)
        safe = Interval(p.lo.clamp(0, 1), p.hi.clamp(0, 1))
        return (safe.log() - (1.0 - safe).log()) / self.temperature

    def _inside(self, box: Interval) -> Interval:
        return box * (1.0 - Interval.of(self.alpha) * 2.0) + self.alpha


@dataclass(frozen=True)
class Residual(BoundedMap):
    """x + g(x) with Lip(g) < 1."""

    network: nn.Module
    context: Any = None

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """1 / (1 - L) for the inverse; for the forward map the recursion on x + g(x) at once, or 1 + L."""
        try:
            L = subnetwork_lipschitz(
                self.network, box, effort=effort.within(0.5), context=self.context
            )
        except Unbounded as error:
            return BlockBounds.none(str(error))
        pair, proofs = blocks.invertible_residual(L), {}
        try:
            builder = ChainBuilder(box.shape[0], torus_of([self.network], tuple(box.shape)))
            proof = bound_chain(
                builder.finish(self.lipsdp_jacobian(builder, builder.start(), box)), effort
            )
            if proof.bound < pair.forward:
                pair, proofs = Pair(proof.bound, pair.inverse), {"forward": proof}
        except Unbounded:
            pass
        reason = (
            ""
            if L < 1
            else f"Lip(g) <= {L:.4g} is not below one: the inverse is not proved to exist"
        )
        everywhere = bool((box.lo == -math.inf).all() and (box.hi == math.inf).all())
        return BlockBounds(*pair, everywhere, reason, "LipSDP recursion", proofs)

    def image(self, box: Interval) -> Interval:
        """x + g over the box."""
        try:
            return box + read(self.network, box, self.context).output
        except Unbounded:
            everything = torch.full_like(box.lo, math.inf)
            return Interval(-everything, everything)

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        """1 + L and 1 / (1 - L) with the norm product."""
        try:
            return blocks.invertible_residual(
                read(self.network, box, self.context).product(effort.deadline), paper=True
            )
        except Unbounded:
            return Pair(math.inf, math.inf)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        """x + g(x)."""
        g = builder.masked(read(self.network, box, self.context).into(builder, x))
        return ChainReading(builder).add(x, g)

    def subnetworks(self) -> list[nn.Module]:
        """g."""
        return [self.network]


class _Field(nn.Module):
    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, x: Any, t: Any) -> Any:
        return self.field(t, x)


@dataclass(frozen=True)
class Flow(BoundedMap):
    """The flow of dx/dt = field(t, x) over a duration: exp(L T) both ways.

    It bounds the map of every explicit fixed-step method with nonnegative coefficients too (Euler, midpoint, RK4): a
    step's Lipschitz constant is at most the exponential series' first terms. Of an adaptive solver nothing is proved.
    """

    field: nn.Module
    duration: float

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """exp(L T), L on all of R^d: trajectories leave every box."""
        everywhere = torch.full_like(box.lo, math.inf)
        times = torch.tensor([[0.0], [self.duration]], dtype=torch.float64)
        try:
            L = subnetwork_lipschitz(
                _Field(self.field), Interval(-everywhere, everywhere), effort=effort, context=times
            )
        except Unbounded as error:
            return BlockBounds.none(str(error))
        return BlockBounds(*blocks.neural_ode(L, self.duration), method="logarithmic norm")

    def image(self, box: Interval) -> Interval:
        """Everything: no invariant box is looked for."""
        everywhere = torch.full_like(box.lo, math.inf)
        return Interval(-everywhere, everywhere)

    def subnetworks(self) -> list[nn.Module]:
        """The field."""
        return [self.field]


@dataclass(frozen=True)
class Autoregressive(BoundedMap):
    """z_i = h(x_i; theta_i(x_1..x_{i-1})) with a masked network: MAF, IAF, spline autoregressive flows.

    Attributes:
        coupling: the same data as a coupling's, with split that keeps and changes everything.
    """

    coupling: Coupling

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """Forward by the recursion on the whole Jacobian, inverse by the M-matrix of entrywise bounds."""
        c = self.coupling
        try:
            d = c._derivatives(box)
            off = self._off_diagonal(d)
        except Unbounded as error:
            return BlockBounds.none(str(error))
        order = _triangular_order(off)
        if order is None:
            return BlockBounds.none("the network's masks are not autoregressive")
        ordered = off[order][:, order]
        norm = up(
            float(d.slope.magnitude.max()) + c._norms(d, effort.deadline.fraction(0.3)).forward
        )
        if not effort.deadline.can_afford(2 * norm_operations(*off.shape)):
            return BlockBounds(
                norm, math.inf, c._holds_everywhere(box), "time ran out for its inverse"
            )
        pair = blocks.autoregressive(d.slope.lo[order], ordered, forward=norm)
        proofs = {}
        try:
            builder = ChainBuilder(box.shape[0])
            proof = bound_chain(
                builder.finish(c.lipsdp_jacobian(builder, builder.start(), box)), effort
            )
            if proof.bound < norm:
                pair, proofs = Pair(proof.bound, pair.inverse), {"forward": proof}
        except Unbounded:
            pass
        finite = math.isfinite(pair.forward + pair.inverse)
        reason = "" if finite else c._why(d, Pair(float(d.slope.magnitude.max()), 1.0))
        return BlockBounds(
            *pair, c._holds_everywhere(box), reason, "LipSDP recursion, M-matrix", proofs
        )

    def image(self, box: Interval) -> Interval:
        """h over the boxes."""
        return self.coupling.image(box)

    def preimage(self, box: Interval) -> Interval:
        """Entry after entry: what is known of the first ones bounds the next ones' parameters."""
        c, x = self.coupling, everywhere(box)
        changed, unknown = box.map(c.split.changed), torch.ones(len(box.lo), dtype=torch.bool)
        for _ in range(max(1, UNDONE // c.transformer.count)):
            try:
                theta = c.parameters(x)
            except Unbounded:
                break
            ready = unknown & torch.stack([part.magnitude.isfinite() for part in theta]).all(0)
            if not bool(ready.any()):
                break
            found = c.undone(changed[ready], [part[ready] for part in theta])
            lo, hi = (
                c.split.changed(end).masked_scatter(ready, new)
                for end, new in ((x.lo, found.lo), (x.hi, found.hi))
            )
            x, unknown = (
                Interval(c.split.joined(x.lo, lo), c.split.joined(x.hi, hi)),
                unknown & ~ready,
            )
        return x

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        """As of a coupling."""
        return self.coupling.lipsdp_jacobian(builder, x, box)

    def comparison_matrices(self, box: Interval, bounds: BlockBounds) -> tuple[Tensor, Tensor]:
        """diag(slopes) + |N|, and the inverse of the M-matrix diag(least slopes) - |N|."""
        d = self.coupling._derivatives(box)
        off, least = self._off_diagonal(d), d.slope.lo
        if (
            _triangular_order(off) is None
            or not bool((least > 0).all())
            or not bool(off.isfinite().all())
        ):
            raise Unbounded("the network's masks are not autoregressive, or nothing is known of it")
        inverse, error = inverse_with_error(torch.diag(least) - off)
        return torch.diag(d.slope.magnitude) + off, inverse.clamp_min(0) + error

    def _off_diagonal(self, d: Derivatives) -> Tensor:
        """|N|, entry by entry."""
        entries = d.network.entries()
        off = torch.zeros(len(d.slope.lo), entries.shape[1], dtype=torch.float64)
        for rows, factor in zip(self.coupling.rows, d.sensitivities, strict=True):
            off = off + dependence(factor.magnitude, entries[rows])
        return off

    def subnetworks(self) -> list[nn.Module]:
        """The masked network."""
        return [self.coupling.network]


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

"""Couplings: one part is kept, the other goes through z = h(x; theta(kept)) entry by entry.

J = [[I, 0], [M, D]] with D = diag(dh/dx) and M = sum_k diag(dh/dtheta_k) J_theta_k;
J^-1 = [[I, 0], [-D^-1 M, D^-1]]. The diagonal factors are slopes in known intervals, so M, D^-1 M,
and the whole J and J^-1, are chains of linear maps and slopes: the recursion bounds them directly,
scale and shift networks together.
"""

# Methods without a docstring are documented in BoundedMap and Split.
# ruff: noqa: D102

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

import inn_guard.lipschitz.maps.closed_forms as blocks
from inn_guard.execution.deadline import Deadline
from inn_guard.lipschitz.lipsdp.chain import Chain
from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap, for_last_box
from inn_guard.lipschitz.maps.closed_forms import Pair, supremum
from inn_guard.lipschitz.maps.elementary import per_channel
from inn_guard.lipschitz.maps.neighbourhood import Moved, Neighbourhood
from inn_guard.lipschitz.maps.preimage import everywhere, is_everywhere, preimage
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, ChainInterpreter, Linear
from inn_guard.lipschitz.networks.conditioner import (
    AnalysedNetwork,
    SearchBudget,
    analyse,
    bound_chain,
    linearise,
    torus_of,
    trace_network,
)
from inn_guard.lipschitz.networks.graph import Network, Unbounded
from inn_guard.lipschitz.networks.interpreters import Columns, Constant
from inn_guard.lipschitz.transformers.affine import Affine
from inn_guard.lipschitz.transformers.base import Transformer, where
from inn_guard.numerics.interval_matrices import diagonal
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import UNIT, Upper

APART = 4  #: parameters of an entry up to which each has a constant of its own

__all__ = [
    "ByChannel",
    "ByMask",
    "Coupling",
    "Derivatives",
    "Split",
    "blocked_rows",
    "interleaved_rows",
]


@runtime_checkable
class Split(Protocol):
    """Which entries a coupling keeps and which it changes, for samples (C, *size)."""

    def kept(self, x: Tensor) -> Tensor:
        """The network's input."""
        ...

    def changed(self, x: Tensor) -> Tensor:
        """The entries that change."""
        ...

    def joined(self, x: Tensor, changed: Tensor) -> Tensor:
        """x with its changed entries replaced."""
        ...

    @property
    def is_partition(self) -> bool:
        """Whether every entry is either kept or changed."""
        ...

    def matrices(self) -> tuple[Tensor, Tensor]:
        """K (network inputs, C) and S (changed, C) of zeros and ones: kept = K x, changed = S x.

        Raises:
            Unbounded: if the split is not one of channels.
        """
        ...


@dataclass(frozen=True)
class ByChannel:
    """Channels of two index lists; an autoregressive map keeps and changes all of them."""

    keep: Tensor
    change: Tensor

    @classmethod
    def halves(cls, channels: int, first: int) -> ByChannel:
        """The first ``first`` of ``channels`` are kept."""
        return cls(torch.arange(first), torch.arange(first, channels))

    @classmethod
    def all_of(cls, channels: int) -> ByChannel:
        """All channels are kept, and all changed: an autoregressive map."""
        return cls(torch.arange(channels), torch.arange(channels))

    @property
    def swapped(self) -> ByChannel:
        """The other way round."""
        return ByChannel(self.change, self.keep)

    @property
    def is_partition(self) -> bool:
        """Whether every channel is either kept or changed."""
        order = torch.cat([self.keep, self.change]).sort().values
        return torch.equal(order, torch.arange(len(order)))

    def kept(self, x: Tensor) -> Tensor:
        return x[self.keep]

    def changed(self, x: Tensor) -> Tensor:
        return x[self.change]

    def joined(self, x: Tensor, changed: Tensor) -> Tensor:
        return x.index_copy(0, self.change, changed)

    def matrices(self) -> tuple[Tensor, Tensor]:
        unit = torch.eye(int(torch.cat([self.keep, self.change]).max()) + 1, dtype=torch.float64)
        return unit[self.keep], unit[self.change]


@dataclass(frozen=True)
class ByMask:
    """Entries where ``mask`` (of a sample's shape) is true are kept; both parts have that shape."""

    mask: Tensor
    is_partition = True

    def kept(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0.0)

    def changed(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, 0.0, x)

    def joined(self, x: Tensor, changed: Tensor) -> Tensor:
        return torch.where(self.mask, x, changed)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Diagonal, for vectors and for masks that are the same at every pixel."""
        flat = self.mask.reshape(len(self.mask), -1)
        if not bool((flat == flat[:, :1]).all()):
            raise Unbounded("a mask that differs from pixel to pixel")
        keep = flat[:, 0].double()
        return torch.diag(keep), torch.diag(1 - keep)


@dataclass(frozen=True)
class Derivatives:
    """Enclosures over a box.

    Attributes:
        network: the network, analysed on the box.
        x: the changed entries.
        theta: parameters of h.
        slope: dh/dx.
        sensitivities: dh/dtheta_k.
        log_sensitivities: (dh/dtheta_k) / (dh/dx).
    """

    network: AnalysedNetwork
    x: Interval
    theta: list[Interval]
    slope: Interval
    sensitivities: list[Interval]
    log_sensitivities: list[Interval]

    @property
    def is_additive(self) -> bool:
        """Whether h is x plus a sum of its parameters: J^-1 is J with the opposite sign in M."""
        return _is_one(self.slope) and all(_is_one(part) for part in self.sensitivities)

    @property
    def scale(self) -> Pair:
        """sup dh/dx and sup 1 / (dh/dx)."""
        return Pair(supremum(self.slope), supremum(self.slope.reciprocal()))


@dataclass(frozen=True)
class _Constants:
    """Constants of the Jacobian of all parameters together, and of each alone."""

    joint: Constant
    parts: list[Constant]

    def weighted(self, factors: list[Interval]) -> Upper:
        """||sum_k D_k J_k||."""
        return self._sum(factors, [part.lipschitz for part in self.parts], self.joint.lipschitz)

    def apart(self, factors: list[Interval], reference: list[Interval]) -> Upper:
        """||sum_k D_k J_k - D_k,c J_k,c||."""
        deviations = [part.deviation for part in self.parts]
        moved = [f - c for f, c in zip(factors, reference, strict=True)]
        return self._sum(factors, deviations, self.joint.deviation) + self.weighted(moved)

    @staticmethod
    def _sum(factors: list[Interval], parts: list[Upper], joint: Upper) -> Upper:
        total = Upper(0.0)
        for factor, part in zip(factors, parts, strict=True):
            total = total + supremum(factor) * part
        return Upper.min(total, _row_norm(factors) * joint)


@dataclass(frozen=True)
class Coupling(BoundedMap):
    """kept -> kept, changed -> h(changed; network(kept)).

    Attributes:
        split: which is which.
        network: gives the parameters.
        transformer: h.
        rows: for every parameter of h the channels of the network's output that hold it, in the
            order of the changed entries.
        context: the network's second argument, or None.
    """

    split: Split
    network: nn.Module
    transformer: Transformer
    rows: Sequence[Tensor]
    context: Any = None

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """||[[1, 0], [m, c]]|| each way, m by the recursion or by norms, whichever is less."""
        try:
            d = self.derivatives(box)
        except Unbounded as error:
            return BlockBounds.none(str(error))
        norms = self.norms(d, effort.deadline.fraction(0.5))
        proofs = self._recursion(d, effort)
        m, method, reason = norms, "norm product", ""
        if proofs is not None:
            m = Pair(*map(Upper.min, norms, proofs))
        if m != norms:
            method = "LipSDP recursion"
        pair = blocks.affine_coupling(m, d.scale)
        if not pair.finite:
            reason = self.reason_for_infinity(d, d.scale)
        return BlockBounds(*pair, is_everywhere(box), reason, method)

    def image(self, box: Interval) -> Interval:
        changed = box.map(self.split.changed)
        try:
            value = self.transformer.value(changed, self.parameters(box))
        except Unbounded:
            value = everywhere(changed)
        return self._joined(box, value)

    def preimage(self, box: Interval) -> Interval:
        changed = box.map(self.split.changed)
        try:
            found = self.undone(changed, self.parameters(box))
        except Unbounded:
            found = everywhere(changed)
        return self._joined(box, found)

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        """1 + Lip(t), or max(1, c) + M, Lipschitz constants of the networks by norm products."""
        try:
            d = self.derivatives(box)
        except Unbounded:
            return Pair(math.inf, math.inf)
        if not isinstance(self.transformer, Affine):
            return blocks.affine_coupling(self.norms(d, effort.deadline), d.scale, paper=True)
        L = Upper(d.network.product(effort.deadline))
        return _paper_affine(self.transformer, d, L)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        """kept x + [dh/dx x + sum dh/dtheta theta] in the changed channels."""
        d = self.derivatives(box)
        return self._assembled(builder, x, d.network, d.slope, d.sensitivities)

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        """The same with 1 / (dh/dx), and minus the log-sensitivities."""
        d = self.derivatives(box)
        if d.is_additive:
            factors = [-part for part in d.sensitivities]
            return self._assembled(builder, z, d.network, d.slope, factors)
        # (z - t) / slope: a parameter of sensitivity one goes through the slope of z
        before_slope = [_is_one(part) for part in d.sensitivities]
        factors = [-part for part in d.log_sensitivities]
        return self._assembled(builder, z, d.network, d.slope.reciprocal(), factors, before_slope)

    def secant_chain(
        self, builder: ChainBuilder, x: Linear, box: Interval, centre: Tensor
    ) -> Linear:
        """As the forward map, with dh/dtheta where the changed entries are the centre's."""
        d = self.derivatives(box)
        at_centre = self.transformer.sensitivities(Interval.of(self.split.changed(centre)), d.theta)
        return self._assembled(builder, x, d.network, d.slope, at_centre)

    def jacobians(self, box: Interval) -> tuple[Interval, Interval]:
        """[[I, 0], [M, D]] and [[I, 0], [-D^-1 M, D^-1]]."""
        d = self.derivatives(box)
        unit = torch.eye(box.shape.numel(), dtype=torch.float64).reshape(-1, *box.shape)
        # of zeros and ones: kept = K x, changed = S x
        K = torch.stack([self.split.kept(e).flatten() for e in unit], 1)
        S = torch.stack([self.split.changed(e).flatten() for e in unit], 1)
        if not torch.equal(K.T @ K + S.T @ S, torch.eye(len(unit), dtype=torch.float64)):
            raise Unbounded("kept and changed entries that are no partition")

        def assembled(slope: Interval, M: Interval) -> Interval:
            if not slope.bounded or not M.bounded:
                raise Unbounded("a slope is not finite")
            changed = diagonal(slope.map(torch.flatten)).map(lambda t: S.T @ t @ S)
            return changed + M.map(lambda t: S.T @ t @ K) + (torch.eye(len(unit)) - S.T @ S)

        M = self.dependence(d, d.sensitivities)
        log_M = -self.dependence(d, d.log_sensitivities)
        return assembled(d.slope, M), assembled(d.slope.reciprocal(), log_M)

    def linearised(self, around: Neighbourhood) -> Moved:
        """C = [[I, 0], [M_c, D_c]] with the derivatives of one point, and its exact inverse.

        ||J - C|| <= ||[M - M_c, D - D_c]||, and M - M_c is the sum of dh/dtheta_k (J_k - J_k,c) and
        (dh/dtheta_k - its value at the point) J_k,c; the same with log-sensitivities for J^-1.
        """
        if not self.split.is_partition:
            raise Unbounded("kept and changed entries that are no partition")
        box, keep = around.range(), torch.vmap(self.split.kept)
        inputs = keep(around.columns)
        near = linearise(
            self._graph,
            around.point.map(self.split.kept),
            box.map(self.split.kept),
            inputs,
            around.directions,
        )
        over = self._derivatives_of(near.near, box.map(self.split.changed))
        at = self._derivatives_of(near.point, around.point.map(self.split.changed))
        slope = at.slope.centre
        changed = torch.vmap(self.split.changed)(around.columns)
        total = Columns(changed, Upper(0.0)).moved(changed * slope, _largest(slope), 2)
        J = self._constants(near.constant())
        sensitivities = [s.centre for s in at.sensitivities]
        for rows, sensitivity in zip(self.rows, sensitivities, strict=True):
            part = Columns(near.columns.values[:, rows], near.columns.error)
            part = part.moved(part.values * sensitivity, _largest(sensitivity), 2)
            values = total.values + part.values
            rounding = 2 * UNIT * (total.size + part.size)
            total = Columns(values, total.error + part.error + rounding)
        forward = J.apart(over.sensitivities, [Interval.of(s) for s in sensitivities])
        # the inverse of C has exact quotients
        quotients = [Interval.of(s) / Interval.of(slope) for s in sensitivities]
        inverse = J.apart(over.log_sensitivities, quotients)
        reciprocal = Interval.of(slope).reciprocal()
        scale = _largest((over.slope - slope).magnitude)
        inverse_scale = _largest((over.slope.reciprocal() - reciprocal).magnitude)
        values = torch.vmap(self.split.joined)(around.columns, total.values)
        centre = self._joined(around.point, self.transformer.value(at.x, at.theta))
        return Moved(
            centre,
            Columns(values, total.error),
            (forward * forward + scale * scale).sqrt(),
            (inverse * inverse + inverse_scale * inverse_scale).sqrt(),
        )

    def dependence(self, d: Derivatives, factors: list[Interval]) -> Interval:
        """sum_k diag(factor_k) J_theta_k, (changed entries, network inputs); zeros stay zeros."""
        entries = d.network.jacobian()
        channels = torch.arange(len(entries.lo)).reshape(d.network.output.shape)
        terms = []
        for rows, factor in zip(self.rows, factors, strict=True):
            J = entries[channels[rows].flatten()]
            term = factor.map(torch.flatten)[:, None] * J
            terms.append(where(J.magnitude > 0, term, J))
        total = terms[0]
        for term in terms[1:]:
            nonzero = (total.magnitude > 0) | (term.magnitude > 0)
            total = where(nonzero, total + term, total)
        return total

    def subnetworks(self) -> list[nn.Module]:
        return [self.network]

    def parameters(self, box: Interval) -> list[Interval]:
        """Those of h over a box.

        Raises:
            Unbounded: if the network is not understood.
        """
        output = self.analysed(box).output
        return [output[rows] for rows in self.rows]

    def undone(self, changed: Interval, theta: list[Interval]) -> Interval:
        """Every x that h(.; theta) moves into ``changed``, for all changed entries or some."""

        def values(x: Interval) -> Interval:
            """h at many points (points, *changed), which stand in one long list of channels."""
            repeated = [part.map(lambda t: t.expand(x.shape).flatten(0, 1)) for part in theta]
            value = self.transformer.value(x.map(lambda t: t.flatten(0, 1)), repeated)
            return value.map(lambda t: t.unflatten(0, x.shape[:2]))

        return preimage(values, changed)

    @for_last_box
    def derivatives(self, box: Interval) -> Derivatives:
        """Enclosures of h's derivatives over a box.

        Raises:
            Unbounded: if the network is not understood.
        """
        return self._derivatives_of(self.analysed(box), box.map(self.split.changed))

    def _derivatives_of(self, network: AnalysedNetwork, x: Interval) -> Derivatives:
        h = self.transformer
        theta = [network.output[rows] for rows in self.rows]
        return Derivatives(
            network,
            x,
            theta,
            h.slope(x, theta),
            h.sensitivities(x, theta),
            h.log_sensitivities(x, theta),
        )

    def norms(self, d: Derivatives, deadline: Deadline) -> Pair:
        """Bounds of ||M|| and ||D^-1 M||.

        ||sum_k D_k J_k|| is at most max_i sqrt(sum_k D_k,i^2) ||J||, J of all parameters together,
        and at most sum_k ||D_k|| ||J_k||.
        """
        try:
            J = self._constants(d.network.constant(deadline))
        except Unbounded:
            return Pair(math.inf, math.inf)
        return Pair(*[J.weighted(factors) for factors in (d.sensitivities, d.log_sensitivities)])

    def _constants(self, joint: Constant) -> _Constants:
        parts = [joint] * len(self.rows)
        if len(self.rows) <= APART:
            parts = [joint.rows(rows) for rows in self.rows]
        # of an output that serves as several parameters J_k is stacked as often
        most = int(torch.cat(list(self.rows)).bincount().max())
        if most > 1:
            joint = joint.scaled(Upper(float(most)).sqrt(), joint.shape)
        return _Constants(joint, parts)

    def reason_for_infinity(self, d: Derivatives, scale: Pair) -> str:
        """Why a bound is infinite."""
        if not d.x.bounded:
            return (
                "the changed entries are unbounded: this coupling has local bounds only; "
                "pass domain=Box(lo, hi)"
            )
        if not math.isfinite(d.network.product(Deadline(-math.inf))):
            return "the conditioner's Lipschitz constant is not finite"
        if not math.isfinite(scale.forward):
            return "the scale is unbounded"
        return "the scale comes arbitrarily close to zero, so the inverse has no bound"

    @for_last_box
    def analysed(self, box: Interval) -> AnalysedNetwork:
        """The network over a box of samples.

        Raises:
            Unbounded: if it is not understood.
        """
        return analyse(self._graph, box.map(self.split.kept))

    @functools.cached_property
    def _graph(self) -> Network:
        return trace_network(self.network, self.context)

    def _joined(self, box: Interval, changed: Interval) -> Interval:
        lo = self.split.joined(box.lo, changed.lo)
        return Interval(lo, self.split.joined(box.hi, changed.hi))

    def _recursion(self, d: Derivatives, effort: SearchBudget) -> Pair | None:
        """Bounds of M and of M* = D^-1 M by the recursion; None where they are no chains."""
        try:
            forward = self._chain(d, d.sensitivities)
            inverse = forward
            if not d.is_additive:
                inverse = self._chain(d, d.log_sensitivities)
            if forward.width > effort.width:
                return None
            if d.is_additive:
                bound = bound_chain(forward, effort).bound
                return Pair(bound, bound)
            first = bound_chain(forward, effort.fraction(0.5)).bound
            return Pair(first, bound_chain(inverse, effort).bound)
        except Unbounded:
            return None

    def _chain(self, d: Derivatives, factors: list[Interval]) -> Chain:
        """sum_k diag(factor_k) J_theta_k as a chain from the network's input."""
        shape = tuple(d.network.box.shape)
        builder = ChainBuilder(shape[0], torus_of([self.network], shape))
        raw = d.network.append_to(builder, builder.start())
        parts = [raw.rows(rows) for rows in self.rows]
        return builder.finish(_weighted(builder, parts, factors))

    def _assembled(
        self,
        builder: ChainBuilder,
        x: Linear,
        network: AnalysedNetwork,
        slope: Interval,
        factors: list[Interval],
        before_slope: list[bool] | None = None,
    ) -> Linear:
        """kept x + S^T (slope S x + sum_k factor_k theta_k).

        Parameters that are ``before_slope`` have the factor -slope: they are subtracted from S x.
        """
        K, S = self.split.matrices()
        arithmetic = ChainInterpreter(builder)
        raw = network.append_to(builder, x.mapped(K[None]))
        first, parts, weights = x.mapped(S[None]), [], []
        for k, (rows, factor) in enumerate(zip(self.rows, factors, strict=True)):
            part = raw.rows(rows)
            if before_slope is not None and before_slope[k]:
                first = arithmetic.add(first, _negated(part))
            elif _is_one(-factor):
                # a factor that is one needs no layer
                parts.append(_negated(part))
                weights.append(-factor)
            else:
                parts.append(part)
                weights.append(factor)
        new = _weighted(builder, [first, *parts], [slope, *weights]).mapped(S.T[None])
        rest = torch.eye(x.channels, dtype=torch.float64) - S.T @ S
        return arithmetic.add(x.mapped(rest[None]), new)


def blocked_rows(entries: int, parameters: int) -> Sequence[Tensor]:
    """Channels of parameter p of entry i where parameters are outermost: p * entries + i."""
    return torch.arange(parameters * entries).split(entries)


def interleaved_rows(entries: int, parameters: int) -> Sequence[Tensor]:
    """Channels of parameter p of entry i where entries are outermost: i * parameters + p."""
    return [torch.arange(entries) * parameters + p for p in range(parameters)]


def _weighted(builder: ChainBuilder, parts: list[Linear], factors: list[Interval]) -> Linear:
    """sum_k factor_k part_k: parts of factor one are added, the others go through one layer."""
    arithmetic = ChainInterpreter(builder)
    terms, others, lower, upper = [], [], [], []
    for part, factor in zip(parts, factors, strict=True):
        if _is_one(factor):
            terms.append(builder.masked(part))
        else:
            low, high = builder.slopes(part, *per_channel(factor, part.channels))
            others.append(part)
            lower.append(low)
            upper.append(high)
    if others:
        stacked = replace(arithmetic.concatenate(others), zero_outside=True)
        active = builder.activated(stacked, torch.cat(lower), torch.cat(upper))
        start = 0
        for part in others:
            terms.append(active.rows(torch.arange(start, start + part.channels)))
            start += part.channels
    total = terms[0]
    for term in terms[1:]:
        total = arithmetic.add(total, term)
    return total


def _negated(x: Linear) -> Linear:
    return x.mapped(-torch.eye(x.channels, dtype=torch.float64)[None])


def _paper_affine(transformer: Affine, d: Derivatives, L: Upper) -> Pair:
    """M = sup|x| c_g' L + L and M* = sup|y| c_h' L + c_h' L sup|t| + c_h L, h = 1/g, as printed."""
    t, s = d.theta[transformer.order[0]], d.theta[transformer.order[1]]
    g, slope = transformer.scale.value(s), transformer.scale.slope(s)
    inverse_slope = supremum(slope * g.reciprocal().square())
    scale = Pair(supremum(g), supremum(g.reciprocal()))
    x, y = supremum(d.x), supremum(transformer.value(d.x, d.theta))
    M = x * supremum(slope) * L + L
    M_star = y * inverse_slope * L + inverse_slope * L * supremum(t) + scale.inverse * L
    return blocks.affine_coupling(Pair(M, M_star), scale, paper=True)


def _largest(x: Tensor) -> Upper:
    return Upper(float(x.abs().max()))


def _is_one(factor: Interval) -> bool:
    return bool((factor.lo == 1).all() and (factor.hi == 1).all())


def _row_norm(parts: list[Interval]) -> Upper:
    total = parts[0].square()
    for part in parts[1:]:
        total = total + part.square()
    return Upper(float(total.sqrt().hi.max()))

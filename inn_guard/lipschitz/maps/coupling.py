"""Couplings of every kind: one part is kept, the other goes through z = h(x; theta(kept)) entry by entry.

J = [[I, 0], [M, D]] with D = diag(dh/dx) and M = sum_k diag(dh/dtheta_k) J_theta_k; J^-1 = [[I, 0], [-D^-1 M, D^-1]].
The diagonal factors are slopes in known intervals, so M, D^-1 M, and the whole J and J^-1, are chains of linear maps
and slopes: the recursion bounds them directly, scale and shift networks together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

import inn_guard.lipschitz.maps.closed_forms as blocks
from inn_guard.execution.deadline import Deadline
from inn_guard.lipschitz.lipsdp.chain import Chain
from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.elementary import per_channel
from inn_guard.lipschitz.maps.preimage import everywhere, preimage
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, ChainReading, Linear
from inn_guard.lipschitz.networks.conditioner import (
    Proof,
    Read,
    SearchBudget,
    bound_chain,
    graph_of,
    read,
    torus_of,
)
from inn_guard.lipschitz.networks.graph import Network, Unbounded
from inn_guard.lipschitz.transformers.affine import Affine, Transformer
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import up

__all__ = ["ByChannel", "ByMask", "Coupling", "Derivatives", "Split"]


@runtime_checkable
class Split(Protocol):
    """Which entries a coupling keeps and which it changes, for samples (C, *size) and batches of boxes (B, C)."""

    def kept(self, x: Tensor) -> Tensor:
        """The network's input."""
        ...

    def changed(self, x: Tensor) -> Tensor:
        """The entries that change."""
        ...

    def joined(self, x: Tensor, changed: Tensor) -> Tensor:
        """x with its changed entries replaced."""
        ...

    def matrices(self) -> tuple[Tensor, Tensor]:
        """K (network inputs, C) and S (changed, C), of zeros and ones, with kept = K x and changed = S x.

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

    @property
    def swapped(self) -> ByChannel:
        """The other way round."""
        return ByChannel(self.change, self.keep)

    def kept(self, x: Tensor) -> Tensor:
        """Kept channels."""
        return x[self.keep]

    def changed(self, x: Tensor) -> Tensor:
        """Changed channels."""
        return x[self.change]

    def joined(self, x: Tensor, changed: Tensor) -> Tensor:
        """x with other values in the changed channels."""
        return x.index_copy(0, self.change, changed)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Rows of the identity."""
        unit = torch.eye(int(torch.cat([self.keep, self.change]).max()) + 1, dtype=torch.float64)
        return unit[self.keep], unit[self.change]


@dataclass(frozen=True)
class ByMask:
    """Entries where ``mask`` (the shape of one sample) is true are kept; both parts have the whole shape."""

    mask: Tensor

    def kept(self, x: Tensor) -> Tensor:
        """Zero where x changes."""
        return torch.where(self.mask, x, 0.0)

    def changed(self, x: Tensor) -> Tensor:
        """Zero where x is kept."""
        return torch.where(self.mask, 0.0, x)

    def joined(self, x: Tensor, changed: Tensor) -> Tensor:
        """x with other values where it changes."""
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
    """Over a box: the network as read, dh/dx, dh/dtheta_k, and the latter over the former."""

    network: Read
    x: Interval
    theta: list[Interval]
    slope: Interval
    sensitivities: list[Interval]
    relative: list[Interval]


@dataclass(frozen=True)
class Coupling(BoundedMap):
    """kept -> kept, changed -> h(changed; network(kept)).

    Attributes:
        split: which is which.
        network: gives the parameters.
        transformer: h.
        rows: for every parameter of h the channels of the network's output that hold it, in the changed ones' order.
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
            d = self._derivatives(box)
        except Unbounded as error:
            return BlockBounds.none(str(error))
        scale = Pair(float(d.slope.magnitude.max()), float(d.slope.reciprocal().magnitude.max()))
        norms = self._norms(d, effort.deadline.fraction(0.5))
        proofs = self._proofs(d, effort)
        m = (
            Pair(*(min(norm, proof.bound) for norm, proof in zip(norms, proofs, strict=True)))
            if proofs
            else norms
        )
        pair = blocks.affine_coupling(m, scale)
        reason = "" if math.isfinite(pair.forward + pair.inverse) else self._why(d, scale)
        used = (
            {}
            if not proofs
            else {
                name: p
                for name, p in zip(("M", "M*"), proofs, strict=True)
                if math.isfinite(p.bound)
            }
        )
        method = "LipSDP recursion" if proofs and m != norms else "norm product"
        return BlockBounds(*pair, self._holds_everywhere(box), reason, method, used)

    def image(self, box: Interval) -> Interval:
        """Kept entries as they are, h over the boxes of x and of the parameters."""
        try:
            network = self._read(box)
        except Unbounded:
            value = everywhere(box.map(self.split.changed))
        else:
            value = self.transformer.value(
                box.map(self.split.changed), self._parameters(network.output)
            )
        return Interval(self.split.joined(box.lo, value.lo), self.split.joined(box.hi, value.hi))

    def preimage(self, box: Interval) -> Interval:
        """Kept entries as they are, h undone over the boxes of z and of the parameters."""
        changed = box.map(self.split.changed)
        try:
            found = self.undone(changed, self.parameters(box))
        except Unbounded:
            found = everywhere(changed)
        return Interval(self.split.joined(box.lo, found.lo), self.split.joined(box.hi, found.hi))

    def parameters(self, box: Interval) -> list[Interval]:
        """Those of h over a box.

        Raises:
            Unbounded: if the network is not understood.
        """
        return self._parameters(self._read(box).output)

    def undone(self, changed: Interval, theta: list[Interval]) -> Interval:
        """Every entry that h, with parameters ``theta``, moves into ``changed``; of all changed entries or of some."""
        return preimage(functools.partial(self._values, theta), changed)

    def _values(self, theta: list[Interval], x: Interval) -> Interval:
        """h at many points (points, *changed): entry by entry, so that all stand in one long list of channels."""
        repeated = [part.map(lambda t: t.expand(x.shape).flatten(0, 1)) for part in theta]
        value = self.transformer.value(x.map(lambda t: t.flatten(0, 1)), repeated)
        return value.map(lambda t: t.unflatten(0, x.shape[:2]))

    def paper_formula(self, box: Interval, effort: SearchBudget) -> Pair:
        """1 + Lip(t), or max(1, c) + M, with constants over the box and Lipschitz constants by norm products."""
        try:
            d = self._derivatives(box)
        except Unbounded:
            return Pair(math.inf, math.inf)
        if not isinstance(self.transformer, Affine):
            return blocks.affine_coupling(self._norms(d, effort.deadline), _scales(d), paper=True)
        L = d.network.product(effort.deadline)
        return self._printed_affine(self.transformer, d, L)

    def lipsdp_jacobian(self, builder: ChainBuilder, x: Linear, box: Interval) -> Linear:
        """x kept + [dh/dx x + sum dh/dtheta theta] in the changed channels."""
        d = self._derivatives(box)
        return self._assembled(builder, x, d, d.slope, d.sensitivities)

    def lipsdp_inverse(self, builder: ChainBuilder, z: Linear, box: Interval) -> Linear:
        """The same with 1 / (dh/dx), and minus the relative sensitivities."""
        d = self._derivatives(box)
        if all(_is_one(part) for part in d.sensitivities) and _is_one(d.slope):
            return self._assembled(builder, z, d, d.slope, [-part for part in d.sensitivities])
        return self._assembled(
            builder,
            z,
            d,
            d.slope.reciprocal(),
            [-part for part in d.relative],
            joint=d.sensitivities,
        )

    def secant_chain(
        self, builder: ChainBuilder, x: Linear, box: Interval, centre: Tensor
    ) -> Linear:
        """As the forward map, with dh/dtheta where the changed entries are the centre's."""
        d = self._derivatives(box)
        at_centre = self.transformer.sensitivities(Interval.of(self.split.changed(centre)), d.theta)
        return self._assembled(builder, x, d, d.slope, at_centre)

    def comparison_matrices(self, box: Interval, bounds: BlockBounds) -> tuple[Tensor, Tensor]:
        """[[I, 0], [M, D]] and [[I, 0], [-D^-1 M, D^-1]], no block of M above what is proved of all of it."""
        d = self._derivatives(box)
        K, S = self.split.matrices()
        entries = d.network.entries()
        rest = torch.eye(box.shape[0], dtype=torch.float64) - S.T @ S
        found = []
        for name, slope, factors in (
            ("M", d.slope, d.sensitivities),
            ("M*", d.slope.reciprocal(), d.relative),
        ):
            M = torch.zeros(len(S), len(K), dtype=torch.float64)
            for rows, factor in zip(self.rows, factors, strict=True):
                M = M + dependence(_largest(factor), entries[rows])
            proof = bounds.proofs.get(name)
            M = M.clamp_max(proof.bound if proof is not None else math.inf)
            found.append(rest + S.T @ torch.diag(_largest(slope)) @ S + S.T @ M @ K)
        return found[0], found[1]

    def subnetworks(self) -> list[nn.Module]:
        """The conditioner."""
        return [self.network]

    def _read(self, box: Interval) -> Read:
        return read(self._graph, box.map(self.split.kept))

    @functools.cached_property
    def _graph(self) -> Network:
        return graph_of(self.network, self.context)

    def _parameters(self, output: Interval) -> list[Interval]:
        return [output[rows] for rows in self.rows]

    def _derivatives(self, box: Interval) -> Derivatives:
        network, x = self._read(box), box.map(self.split.changed)
        theta, h = self._parameters(network.output), self.transformer
        return Derivatives(
            network, x, theta, h.slope(x, theta), h.sensitivities(x, theta), h.relative(x, theta)
        )

    def _norms(self, d: Derivatives, deadline: Deadline) -> Pair:
        """||sum_k D_k J_k|| <= max_i sqrt(sum_k D_k,i^2) ||J||."""
        L = d.network.product(deadline)
        return Pair(*(up(_row_norm(parts) * L, 2) for parts in (d.sensitivities, d.relative)))

    def _proofs(self, d: Derivatives, effort: SearchBudget) -> tuple[Proof, Proof] | None:
        try:
            ahead = self._chain(d, d.sensitivities)
            same = all(_is_one(part) for part in (*d.sensitivities, d.slope))
            back = ahead if same else self._chain(d, d.relative)
            if max((len(layer.lower) for layer in ahead.layers), default=0) > effort.width:
                return None
            first = bound_chain(ahead, effort if same else effort.within(0.5))
            return first, first if same else bound_chain(back, effort)
        except Unbounded:
            return None

    def _chain(self, d: Derivatives, factors: list[Interval]) -> Chain:
        """sum_k diag(factor_k) J_theta_k as a chain from the network's input."""
        builder = self._builder(d)
        raw = d.network.into(builder, builder.start())
        return builder.finish(
            self._weighted(builder, [raw.rows(rows) for rows in self.rows], factors)
        )

    def _builder(self, d: Derivatives) -> ChainBuilder:
        shape = tuple(d.network.box.shape)
        return ChainBuilder(shape[0], torus_of([self.network], shape))

    def _weighted(
        self, builder: ChainBuilder, parts: list[Linear], factors: list[Interval]
    ) -> Linear:
        """sum_k factor_k part_k: parts with factor one are added as they are, the others go through one layer."""
        arithmetic = ChainReading(builder)
        plain = [
            builder.masked(part)
            for part, factor in zip(parts, factors, strict=True)
            if _is_one(factor)
        ]
        others = [
            (part, factor)
            for part, factor in zip(parts, factors, strict=True)
            if not _is_one(factor)
        ]
        if others:
            stacked = arithmetic.concatenate([part for part, _ in others])
            ends = [
                builder.slopes(part, *per_channel(factor, part.channels)) for part, factor in others
            ]
            lower, upper = (torch.cat(side) for side in zip(*ends, strict=True))
            active = builder.activated(replace(stacked, zero_outside=True), lower, upper)
            plain += [
                active.rows(index)
                for index in torch.arange(active.channels).split([p.channels for p, _ in others])
            ]
        total = plain[0]
        for part in plain[1:]:
            total = arithmetic.add(total, part)
        return total

    def _assembled(
        self, builder: ChainBuilder, x: Linear, d: Derivatives, slope: Interval, factors: list[Interval],
        joint: list[Interval] | None = None,
    ) -> Linear:  # fmt: skip
        """kept x + S^T (slope S x + sum_k factor_k theta_k); parts of sensitivity one share the slope of x if joint."""
        K, S = self.split.matrices()
        changed, arithmetic = x.mapped(S[None]), ChainReading(builder)
        raw = d.network.into(builder, x.mapped(K[None]))
        parts, weights = [changed], [slope]
        for k, (rows, factor) in enumerate(zip(self.rows, factors, strict=True)):
            if joint is not None and _is_one(joint[k]):
                parts[0] = arithmetic.add(
                    parts[0],
                    raw.rows(rows).mapped(-torch.eye(len(rows), dtype=torch.float64)[None]),
                )
            elif _is_one(-factor):
                parts, weights = (
                    [
                        *parts,
                        raw.rows(rows).mapped(-torch.eye(len(rows), dtype=torch.float64)[None]),
                    ],
                    [*weights, -factor],
                )
            else:
                parts, weights = [*parts, raw.rows(rows)], [*weights, factor]
        new = self._weighted(builder, parts, weights).mapped(S.T[None])
        rest = torch.eye(x.channels, dtype=torch.float64) - S.T @ S
        return arithmetic.add(x.mapped(rest[None]), new)

    def _printed_affine(self, transformer: Affine, d: Derivatives, L: float) -> Pair:
        t, s = (d.theta[k] for k in transformer.order)
        g, slope = transformer.scale.value(s), transformer.scale.slope(s)
        c, c_inverse, c_slope = (
            float(g.magnitude.max()),
            float(g.reciprocal().magnitude.max()),
            float(slope.magnitude.max()),
        )
        c_inverse_slope = float((slope * g.reciprocal().square()).magnitude.max())
        x, y, t_size = (
            float(part.magnitude.max()) for part in (d.x, transformer.value(d.x, d.theta), t)
        )
        M = up(up(up(x * c_slope) * L) + L, 2)
        M_star = up(
            up(up(y * c_inverse_slope) * L, 2)
            + up(up(c_inverse_slope * L) * t_size, 2)
            + up(c_inverse * L),
            3,
        )
        return blocks.affine_coupling(Pair(M, M_star), Pair(c, c_inverse), paper=True)

    def _holds_everywhere(self, box: Interval) -> bool:
        return bool((box.lo == -math.inf).all() and (box.hi == math.inf).all())

    def _why(self, d: Derivatives, scale: Pair) -> str:
        if not d.x.bounded:
            return "the changed entries are unbounded: this coupling has local bounds only; give domain=Box(lo, hi)"
        if not math.isfinite(d.network.product(Deadline(-math.inf))):
            return "the conditioner's Lipschitz constant is not finite"
        if not math.isfinite(scale.forward):
            return "the scale is unbounded"
        return "the scale comes arbitrarily close to zero, so the inverse has no bound"


def _scales(d: Derivatives) -> Pair:
    return Pair(float(d.slope.magnitude.max()), float(d.slope.reciprocal().magnitude.max()))


def _is_one(factor: Interval) -> bool:
    return bool((factor.lo == 1).all() and (factor.hi == 1).all())


def dependence(factor: Tensor, entries: Tensor) -> Tensor:
    """factor (C,) times the rows of entries (C, K), rounded up: 0 where either is, and inf where either is unknown."""
    none = (factor[:, None] == 0) | (entries == 0)
    product = (factor[:, None] * entries * (1 + 1e-12)).nan_to_num(math.inf, math.inf, math.inf)
    return torch.where(none, 0.0, product)


def _largest(factor: Interval) -> Tensor:
    """Per channel."""
    return factor.magnitude.reshape(len(factor.lo), -1).amax(1)


def _row_norm(parts: list[Interval]) -> float:
    total = parts[0].square()
    for part in parts[1:]:
        total = total + part.square()
    return float(total.sqrt().hi.max())


Rule = Callable[[Any, Any], BoundedMap]

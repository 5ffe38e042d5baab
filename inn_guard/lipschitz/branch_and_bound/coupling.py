"""What couplings do to small boxes, in affine forms: to first order where the transformer's curvature is known.

z = h(x; theta(u)) with dz/du = sum_k diag(dh/dtheta_k) dtheta_k/du.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from inn_guard.lipschitz.branch_and_bound.affine_forms import AffineForm
from inn_guard.lipschitz.branch_and_bound.lookup_table import Table
from inn_guard.lipschitz.branch_and_bound.taylor import Direct
from inn_guard.lipschitz.transformers.affine import Additive, Affine, Transformer
from inn_guard.numerics.intervals import Interval

__all__ = ["ByParameters", "Coupled", "Local", "Parameters", "evaluated", "looked_up"]


class Local(NamedTuple):
    """z = h(x; theta(u)) over boxes of the kept u (B, k) and the changed x (B, e), in coordinates of u, then of x.

    Attributes:
        value: z, (B, e).
        slope: dz/dx, (B, e).
        flat: one over dz/dx, (B, e).
        moves: dz/du, (B, e, k).
        relative: dz/du over dz/dx, (B, e, k).
    """

    value: AffineForm
    slope: AffineForm
    flat: AffineForm
    moves: AffineForm
    relative: AffineForm


@runtime_checkable
class Coupled(Protocol):
    """A coupling on boxes."""

    def __call__(self, kept: Interval, x: Interval) -> Local:
        """Over boxes of its kept entries (B, k) and of its changed ones (B, e)."""
        ...


class Parameters(NamedTuple):
    """What a network gives over boxes of its k inputs.

    Attributes:
        value: theta, (B, n).
        rate: dtheta/du, (B, n, k).
    """

    value: AffineForm
    rate: AffineForm


Network = Callable[[AffineForm], Parameters]


def looked_up(table: Table) -> Network:
    """A network of one input."""

    def network(u: AffineForm) -> Parameters:
        found = table(u[:, 0])
        return Parameters(found.value.map(torch.t), found.rate.map(torch.t)[..., None])

    return network


def evaluated(direct: Direct) -> Network:
    """A network of several inputs, anew on every box: its derivatives are intervals."""

    def network(u: AffineForm) -> Parameters:
        box = u.range
        jet = direct.jet(box)
        rate = AffineForm.of(jet.slope.map(lambda t: t.mT), len(u.slopes))
        moved = (rate * (u - box.centre)[:, None]).sum(2)
        return Parameters(moved + AffineForm.of(jet.centre, len(u.slopes)), rate)

    return network


class _Factors(NamedTuple):
    """Over boxes, (B, e) each.

    Attributes:
        value: h.
        slope: dh/dx.
        flat: one over dh/dx.
        sensitivities: dh/dtheta_k.
        relative: the same over dh/dx.
    """

    value: AffineForm
    slope: AffineForm
    flat: AffineForm
    sensitivities: Sequence[AffineForm]
    relative: Sequence[AffineForm]


@functools.singledispatch
def _factors(h: Transformer, x: AffineForm, theta: Sequence[AffineForm]) -> _Factors:
    """By intervals: the value by the mean-value form, derivatives without linear parts."""
    m, box, over = len(x.slopes), x.range, [part.range for part in theta]
    slope, sensitivities = h.slope(box, over), h.sensitivities(box, over)
    form = functools.partial(AffineForm.of, coordinates=m)
    thin = [Interval.of(part.middle) for part in theta]
    moved = [
        form(f) * (t - t.middle) for f, t in zip([slope, *sensitivities], [x, *theta], strict=True)
    ]
    value = _sum([form(h.value(Interval.of(x.middle), thin)), *moved])
    relative = [form(part) for part in h.relative(box, over)]
    return _Factors(
        value,
        form(slope),
        form(slope.reciprocal()),
        [form(part) for part in sensitivities],
        relative,
    )


@_factors.register
def _(h: Additive, x: AffineForm, theta: Sequence[AffineForm]) -> _Factors:
    one = AffineForm(
        torch.ones_like(x.middle), torch.zeros_like(x.slopes), torch.zeros_like(x.rest)
    )
    return _Factors(x + theta[0], one, one, [one], [one])


@_factors.register
def _(h: Affine, x: AffineForm, theta: Sequence[AffineForm]) -> _Factors:
    t, s = theta[h.order[0]], theta[h.order[1]]
    point, over = Interval.of(s.middle), s.range
    scale, rise = h.scale.value(over), h.scale.slope(over)
    g_rate = s.weighted(h.scale.second_derivative(over), h.scale.slope(point)).better(rise)
    g = s.weighted(rise, h.scale.value(point)).better(scale)
    flat = g.reciprocal()
    one = AffineForm(
        torch.ones_like(x.middle), torch.zeros_like(x.slopes), torch.zeros_like(x.rest)
    )
    sensitivities, relative = [one, x * g_rate], [flat, x * (g_rate * flat)]
    if h.order != (0, 1):
        sensitivities, relative = sensitivities[::-1], relative[::-1]
    return _Factors(x * g + t, g, flat, sensitivities, relative)


@dataclass(frozen=True)
class ByParameters:
    """Any transformer.

    Attributes:
        h: the transformer.
        network: of its parameters.
        rows: for every parameter the outputs that hold it, one for each changed entry.
    """

    h: Transformer
    network: Network
    rows: Sequence[Tensor]

    def __call__(self, kept: Interval, x: Interval) -> Local:
        """Value and derivatives."""
        both, k = AffineForm.coordinates(Interval.cat([kept, x], 1)), kept.shape[1]
        raw = self.network(both[:, :k])
        theta, rates = zip(
            *((raw.value[:, index], raw.rate[:, index]) for index in self.rows), strict=True
        )
        f = _factors(self.h, both[:, k:], theta)
        moves, relative = (
            _sum([factor[..., None] * rate for factor, rate in zip(factors, rates, strict=True)])
            for factors in (f.sensitivities, f.relative)
        )
        return Local(f.value, f.slope, f.flat, moves, relative)


def _sum(parts: Sequence[AffineForm]) -> AffineForm:
    return functools.reduce(operator.add, parts)

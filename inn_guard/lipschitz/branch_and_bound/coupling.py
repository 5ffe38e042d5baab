"""Couplings on small boxes, in affine forms: to first order where h'' is known.

z = h(x; theta(u)) with dz/du = sum_k diag(dh/dtheta_k) dtheta_k/du.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inn_guard.lipschitz.branch_and_bound.affine_forms import AffineForm
from inn_guard.lipschitz.branch_and_bound.lookup_table import Table
from inn_guard.lipschitz.branch_and_bound.taylor import NetworkOnBoxes
from inn_guard.lipschitz.transformers.affine import Additive, Affine
from inn_guard.lipschitz.transformers.base import Transformer
from inn_guard.numerics.intervals import Interval

__all__ = ["ByParameters", "CoupledEntries", "CouplingOnBoxes", "evaluated", "looked_up"]


class CoupledEntries(NamedTuple):
    """z = h(x; theta(u)) over boxes of the kept u (B, k) and of the changed x (B, e).

    The coordinates of the forms are those of u, then those of x.

    Attributes:
        value: z, (B, e).
        slope: dz/dx, (B, e).
        inverse_slope: one over dz/dx, (B, e).
        partials: dz/du, (B, e, k).
        log_partials: dz/du over dz/dx, (B, e, k).
    """

    value: AffineForm
    slope: AffineForm
    inverse_slope: AffineForm
    partials: AffineForm
    log_partials: AffineForm


#: a coupling: boxes of kept entries (B, k), of changed entries (B, e) -> images of the latter
CouplingOnBoxes = Callable[[Interval, Interval], CoupledEntries]


class Parameters(NamedTuple):
    """What a network gives over boxes of its k inputs.

    Attributes:
        value: theta, (B, n).
        rate: dtheta/du, (B, n, k).
    """

    value: AffineForm
    rate: AffineForm


ParametersOf = Callable[[AffineForm], Parameters]


def looked_up(table: Table) -> ParametersOf:
    """A network of one input, by a table."""

    def network(u: AffineForm) -> Parameters:
        found = table(u[:, 0])
        return Parameters(found.value.map(torch.t), found.rate.map(torch.t)[..., None])

    return network


def evaluated(network: NetworkOnBoxes) -> ParametersOf:
    """A network of several inputs, evaluated on every box: its derivatives are intervals."""

    def parameters(u: AffineForm) -> Parameters:
        box = u.range
        jet = network.jet(box)
        rate = AffineForm.of(jet.slope.map(lambda t: t.mT), len(u.slopes))
        moved = (rate * (u - box.centre)[:, None]).sum(2)
        return Parameters(moved + AffineForm.of(jet.centre, len(u.slopes)), rate)

    return parameters


class _Factors(NamedTuple):
    """Over boxes, (B, e) each.

    Attributes:
        value: h.
        slope: dh/dx.
        inverse_slope: one over dh/dx.
        sensitivities: dh/dtheta_k.
        log_sensitivities: the same over dh/dx.
    """

    value: AffineForm
    slope: AffineForm
    inverse_slope: AffineForm
    sensitivities: Sequence[AffineForm]
    log_sensitivities: Sequence[AffineForm]


@functools.singledispatch
def _factors(h: Transformer, x: AffineForm, theta: Sequence[AffineForm]) -> _Factors:
    """By intervals: the value by the mean-value form, derivatives without linear parts."""
    form = functools.partial(AffineForm.of, coordinates=len(x.slopes))
    box, over = x.range, [part.range for part in theta]
    slope = h.slope(box, over)
    sensitivities = [form(part) for part in h.sensitivities(box, over)]
    log_sensitivities = [form(part) for part in h.log_sensitivities(box, over)]
    value = form(h.value(Interval.of(x.middle), [Interval.of(part.middle) for part in theta]))
    value = value + form(slope) * (x - x.middle)
    for sensitivity, part in zip(sensitivities, theta, strict=True):
        value = value + sensitivity * (part - part.middle)
    return _Factors(value, form(slope), form(slope.reciprocal()), sensitivities, log_sensitivities)


@_factors.register
def factors_of_additive(h: Additive, x: AffineForm, theta: Sequence[AffineForm]) -> _Factors:
    """x + t, whose derivatives are exactly one."""
    one = x.constant(1.0)
    return _Factors(x + theta[0], one, one, [one], [one])


@_factors.register
def factors_of_affine(h: Affine, x: AffineForm, theta: Sequence[AffineForm]) -> _Factors:
    """x g(s) + t, g and g' to first order in s."""
    t, s = theta[h.order[0]], theta[h.order[1]]
    point, over = Interval.of(s.middle), s.range
    scale, rise = h.scale.value(over), h.scale.slope(over)
    curvature = h.scale.second_derivative(over)
    g_rate = s.weighted(curvature, h.scale.slope(point)).better(rise)
    g = s.weighted(rise, h.scale.value(point)).better(scale)
    inverse = g.reciprocal()
    sensitivities = [x.constant(1.0), x * g_rate]
    log_sensitivities = [inverse, x * (g_rate * inverse)]
    if h.order != (0, 1):
        sensitivities.reverse()
        log_sensitivities.reverse()
    return _Factors(x * g + t, g, inverse, sensitivities, log_sensitivities)


@dataclass(frozen=True)
class ByParameters:
    """A coupling with any transformer.

    Attributes:
        h: the transformer.
        network: of its parameters.
        rows: for every parameter the outputs that hold it, one for each changed entry.
    """

    h: Transformer
    network: ParametersOf
    rows: Sequence[Tensor]

    def __call__(self, kept: Interval, x: Interval) -> CoupledEntries:
        """Value and derivatives."""
        both, k = AffineForm.coordinates(Interval.cat([kept, x], 1)), kept.shape[1]
        raw = self.network(both[:, :k])
        rates = [raw.rate[:, index] for index in self.rows]
        f = _factors(self.h, both[:, k:], [raw.value[:, index] for index in self.rows])
        return CoupledEntries(
            f.value,
            f.slope,
            f.inverse_slope,
            _chain_rule(f.sensitivities, rates),
            _chain_rule(f.log_sensitivities, rates),
        )


def _chain_rule(factors: Sequence[AffineForm], rates: Sequence[AffineForm]) -> AffineForm:
    products = [factor[..., None] * rate for factor, rate in zip(factors, rates, strict=True)]
    return functools.reduce(operator.add, products)

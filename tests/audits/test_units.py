"""A flow and the same flow of data in other units get the same verdicts for every use.

Units that are powers of two change no rounding: figures have to be the same to the last bit. In
other units roundings differ, and with them every error: there the flows are far from every limit.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import inn_guard as ig
from inn_guard.audits.layer_blame import layer_blame
from inn_guard.audits.precision.audit import precision
from inn_guard.core.invertible import Invertible
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.scales import ExpScale
from inn_guard.report.uses import USES

FEATURES = 4
GAINS = (1.0, 2.0, 8.0)
CHECKS = ("density", "log_det", "reconstruction", "gradient_angle", "out_of_distribution")
EVERY = (*CHECKS, "sampling", "jacobian_spectrum", "layer_blame", "precision")


def flow(gain: float, units: Tensor, offset: Tensor) -> Chain:
    """Couplings with unbounded scales, after an affine layer that undoes the units."""
    torch.manual_seed(0)
    first = Diagonal(FEATURES)
    with torch.no_grad():
        first.log_scale.copy_(-units.log())
        first.shift.copy_(-offset)
    layers = []
    for _ in range(2):
        coupling = AffineCoupling(MLP([2, 16, 4]), scale=ExpScale())
        with torch.no_grad():
            coupling.network[-1].weight.mul_(gain)
        layers += [coupling, Permutation.reverse(FEATURES)]
    return Chain(first, *layers).float()


def verdicts(gain: float, units: Tensor, offset: Tensor, checks: tuple[str, ...]) -> dict[str, str]:
    x = torch.randn(16, FEATURES, generator=torch.Generator().manual_seed(1))
    data = ((x + offset) * units).float()
    report = ig.audit(flow(gain, units, offset), data, uses=list(USES), checks=list(checks))
    found = {result.name: str(result.verdict) for result in report}
    return found | {use: str(one.verdict) for use, one in report.uses.items()}


@pytest.mark.parametrize("gain", GAINS)
def test_the_gains_are_far_from_every_limit(gain):
    """Errors in other units were up to four times as large or as small: other roundings."""
    x = torch.randn(16, FEATURES, generator=torch.Generator().manual_seed(1)).float()
    model = flow(gain, torch.ones(FEATURES), torch.zeros(FEATURES))
    report = ig.audit(model, x, checks=["density", "reconstruction", "gradient_angle"])
    for use in ("density", "reconstruction", "gradients"):
        share = report.uses[use].figure / report.uses[use].limit
        assert share < 0.1 / 4 or share > 4, use


@functools.cache
def standardised(gain: float, checks: tuple[str, ...]) -> dict[str, str]:
    return verdicts(gain, torch.ones(FEATURES), torch.zeros(FEATURES), checks)


@pytest.mark.parametrize(
    ("gain", "units"),
    [
        (1.0, (1e-6, 1.0, 1e6, 1.0)),
        pytest.param(1.0, (1.0, 10.0, 0.1, 1.0), marks=pytest.mark.thorough),
        pytest.param(8.0, (1e-3, 1.0, 1e3, 10.0), marks=pytest.mark.thorough),
    ],
)
def test_the_same_verdicts_in_other_units(gain, units):
    offset = torch.tensor([0.0, -2.0, 1.0, 3.0])
    assert verdicts(gain, torch.tensor(units), offset, CHECKS) == standardised(gain, CHECKS)


UNITS = {
    "gain": st.sampled_from(GAINS),
    "powers": st.lists(st.floats(-6, 6), min_size=FEATURES, max_size=FEATURES),
    "offset": st.lists(st.floats(-3, 3), min_size=FEATURES, max_size=FEATURES),
}


@settings(max_examples=2)  # one audit each
@given(**UNITS)
def test_every_use_has_the_same_verdict_in_any_units(gain, powers, offset):
    units = 10 ** torch.tensor(powers)
    checks = (*CHECKS, "sampling")
    found = verdicts(gain, units, torch.tensor(offset), checks)
    assert found == standardised(gain, checks)


class OffInOne(Diagonal):
    """Its inverse is off by a share in one feature alone."""

    share, feature = 0.0, 0

    def inverse(self, z: Tensor) -> Tensor:
        x = super().inverse(z)
        wrong = torch.ones(FEATURES)
        wrong[self.feature] += self.share
        return x * wrong.to(x)


@pytest.mark.parametrize("share", [1e-5, 0.003, 0.1])
@pytest.mark.parametrize("feature", range(FEATURES))
def test_an_error_in_one_feature_has_the_same_verdict_in_any_units(share, feature):
    """Below the limit, marginal, and above it, whichever unit the feature has."""
    found = []
    for units in (torch.ones(FEATURES), torch.tensor([1e-6, 1.0, 1e3, 1e6])):
        first = OffInOne(FEATURES)
        with torch.no_grad():
            first.log_scale.copy_(-units.log())
        first.share, first.feature = share, feature
        model = Chain(
            first, *list(flow(1.0, torch.ones(FEATURES), torch.zeros(FEATURES)).steps)[1:]
        )
        x = torch.randn(16, FEATURES, generator=torch.Generator().manual_seed(1)) * units
        report = ig.audit(
            model.float(), x.float(), level="quick", prior=lambda n: torch.randn(n, FEATURES)
        )
        found.append({use: str(one.verdict) for use, one in report.uses.items()})
    assert found[0] == found[1]
    expected = {1e-5: "stable", 0.003: "marginal", 0.1: "unstable"}[share]
    assert found[0]["reconstruction"] == expected


@pytest.mark.thorough
@settings(max_examples=60)  # one audit each, of every check
@given(**UNITS)
@example(gain=8.0, powers=[-3.0, 0.0, -4.0, -4.0], offset=[0.0, 0.0, 0.0, 0.0])
def test_the_same_verdicts_in_any_units(gain, powers, offset):
    units = 10 ** torch.tensor(powers)
    found = verdicts(gain, units, torch.tensor(offset), EVERY)
    assert found == standardised(gain, EVERY)


class InUnits(Invertible):
    """A layer whose input and output are in other units, one for each entry."""

    def __init__(self, inner: Invertible, before: Tensor, after: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("before", before)
        self.register_buffer("after", after)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x / self.before) * self.after

    def inverse(self, z: Tensor) -> Tensor:
        return self.inner.inverse(z / self.after) * self.before

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.inner.forward_and_log_det(x / self.before)
        return z * self.after, log_det + (self.after / self.before).log().sum()

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = self.inner.inverse_and_log_det(z / self.after)
        return x * self.before, log_det + (self.before / self.after).log().sum()


def couplings(gain: float, units: list[Tensor]) -> Chain:
    """The flow of couplings with every state but the latents in units of its own."""
    steps = list(flow(gain, torch.ones(FEATURES), torch.zeros(FEATURES)).steps)[1:]
    ends = [*units, torch.ones(FEATURES)]
    layers = [InUnits(step, *ends[k : k + 2]) for k, step in enumerate(steps)]
    return Chain(*layers).float()


GAUGES = {
    "gain": st.sampled_from([0.5, 2.0, 8.0]),
    "powers": st.lists(
        st.lists(st.integers(-10, 10), min_size=FEATURES, max_size=FEATURES),
        min_size=4,
        max_size=4,
    ),
}
PLAIN = [[0] * FEATURES] * 4


def in_gauge(gain: float, powers: list[list[int]]) -> tuple[Chain, Tensor]:
    # even and odd powers in turn: every layer computes every entry, so that roundings are counted
    # alike
    exponents = [2 * torch.tensor(power) + k % 2 for k, power in enumerate(powers)]
    units = [2.0 ** exponent.double() for exponent in exponents]
    x = torch.randn(16, FEATURES, generator=torch.Generator().manual_seed(1))
    return couplings(gain, units), (x.float() * units[0]).float()


@given(**GAUGES)
def test_precision_is_the_same_in_any_units_of_every_state(gain, powers):
    """Up to float16, whose range ends at 6e4."""
    plain, found = (precision(*in_gauge(gain, each)) for each in (PLAIN, powers))
    assert found.verdict == plain.verdict
    assert torch.equal(found.per_sample["error"], plain.per_sample["error"])
    for row, other in zip(*(one.tables["number format"] for one in (found, plain)), strict=True):
        if row["number format"] == "float16":
            continue
        for name in ("measured", "measured verdict", "reconstruction error", "lost of 256 draws"):
            assert row[name] == other[name], (row["number format"], name)
        assert row["forecast"] == pytest.approx(other["forecast"], rel=0.01)
        assert row["forecast verdict"] == other["forecast verdict"]


@given(**GAUGES)
def test_the_error_of_each_layer_is_the_same_in_any_units_of_every_state(gain, powers):
    plain, found = (layer_blame(*in_gauge(gain, each)) for each in (PLAIN, powers))
    assert found.verdict == plain.verdict
    assert found.settings["worst_sample"] == plain.settings["worst_sample"]
    for row, other in zip(found.per_layer, plain.per_layer, strict=True):
        assert row["contribution"] == pytest.approx(other["contribution"], rel=1e-3)


@given(**{**GAUGES, "gain": st.just(8.0)})
def test_the_blamed_layer_is_the_same_in_any_units_of_x(gain, powers):
    """And in any units of the states between layers in which all entries change alike."""
    powers = [powers[0], *([power[0]] * FEATURES for power in powers[1:])]
    plain, found = (layer_blame(*in_gauge(gain, each)) for each in (PLAIN, powers))
    blamed = [one.settings["worst_layer"].split(":")[0] for one in (plain, found)]
    assert blamed[0] == blamed[1]
    # the first layer's own growth is known up to the spread of x over its entries
    lost, other = (one.values["digits_lost"] for one in (plain, found))
    assert lost > 5
    assert lost == pytest.approx(other, rel=0.1)

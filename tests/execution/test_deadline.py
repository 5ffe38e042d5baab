"""The time budget, on counted clocks: no computation continues for long after its deadline."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from inn_guard.execution import deadline as clock
from inn_guard.execution.deadline import Deadline
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.lipschitz.bounds import lipschitz_bounds
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.numerics.convolution_norm import cheap_convolution_norm, convolution_norm
from inn_guard.numerics.intervals import Box
from inn_guard.numerics.spectral_norm import cheap_norm, spectral_norm
from tests.cases.trials import first
from tests.execution.clocks import CountedClock
from tests.lipschitz.soundness import ROUNDING
from tests.lipschitz.test_whole_network import dense, ratios


@pytest.fixture
def counted(monkeypatch):
    def set_tick(tick: float) -> CountedClock:
        made = CountedClock(tick)
        monkeypatch.setattr(clock, "now", made)
        return made

    return set_tick


@pytest.fixture
def model():
    torch.manual_seed(0)
    return dense(affine=True, size=2, blocks=4)


LOOKS = 16  #: with which all methods of one layer find out that there is no time
BOX = Box(-torch.ones(2), torch.ones(2))


def test_parts_of_a_deadline(counted):
    counted(1.0)
    deadline = Deadline.after(11.0)  # at 1: ends at 12
    assert deadline.left == 10.0
    assert deadline.fraction(0.5).end == pytest.approx(12 - 0.5 * 9)
    assert deadline.at_most(2.0).end == 6.0
    assert Deadline().left == math.inf
    assert Deadline().fraction(0.1) == Deadline()
    assert not Deadline().passed
    assert Deadline(0.0).passed
    assert Deadline().can_afford(1e300)
    assert Deadline(0.0).can_afford(clock.NEGLIGIBLE)
    assert not Deadline(0.0).can_afford(2 * clock.NEGLIGIBLE)


@pytest.mark.parametrize("seconds", first(2, [0.0, 3.0, 20.0]))
def test_no_method_looks_at_the_clock_long_after_the_deadline(model, counted, seconds):
    """Every loop reads the clock, so readings count iterations; 60 s let all methods begin."""
    watch = counted(0.02)
    bounds = lipschitz_bounds(model, BOX, seconds=seconds)
    late = watch.reads - seconds / watch.tick
    assert late < LOOKS * len(model.layers())
    assert bounds.lower_forward > 0


def test_more_time_is_used(model, counted):
    looks = []
    for seconds in (1.0, 20.0):
        watch = counted(0.1)
        lipschitz_bounds(model, BOX, seconds=seconds)

        looks.append(watch.reads)
    assert looks[1] > looks[0]


@pytest.mark.parametrize("data", [torch.zeros(0, 2), torch.zeros(4, 3), torch.zeros(2)])
def test_data_that_are_no_samples_of_the_box_are_an_error(model, data):
    with pytest.raises(
        ValueError, match=r"expected data of the domain's shape, \(B >= 1, 2\), got"
    ):
        lipschitz_bounds(model, BOX, data=data, seconds=1.0)


def test_what_cannot_be_afforded_is_replaced_by_cheap_norms(model, monkeypatch):
    monkeypatch.setattr(clock, "SPEED", 1e-3)
    monkeypatch.setattr(clock, "NEGLIGIBLE", 0.0)

    def refuse(*args):
        raise AssertionError("a norm that could not be afforded")

    monkeypatch.setattr("inn_guard.lipschitz.networks.interpreters.spectral_norm", refuse)
    monkeypatch.setattr("inn_guard.lipschitz.networks.conditioner.certify", refuse)
    couplings = [layer for layer in model.layers() if isinstance(layer, AffineCoupling)]
    for coupling in couplings:
        bounds = lipschitz_bounds(coupling, BOX, seconds=0.5)
        true = ratios(coupling, BOX)
        assert true.forward <= bounds.forward * ROUNDING < math.inf
        assert true.inverse <= bounds.inverse * ROUNDING < math.inf
    assert couplings


def test_without_time_bounds_are_bounds_and_layers_keep_theirs(model, counted):
    counted(1.0)
    bounds = lipschitz_bounds(model, BOX, seconds=0.0)
    true = ratios(model, BOX)
    assert Pair(bounds.forward, bounds.inverse) >= Pair(
        true.forward / ROUNDING, true.inverse / ROUNDING
    )
    assert math.isnan(bounds.paper_bound.forward)
    assert all(
        math.isfinite(layer.bounds.forward + layer.bounds.inverse) for layer in bounds.per_layer
    )


def test_cheap_norms_are_bounds():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        rows, columns = (int(torch.randint(1, 9, (), generator=generator)) for _ in range(2))
        A = torch.randn(rows, columns, generator=generator)
        assert float(torch.linalg.matrix_norm(A, 2)) <= cheap_norm(A) * ROUNDING
        assert spectral_norm(A) <= cheap_norm(A) * ROUNDING
    for mode in ("zeros", "circular", "reflect", "replicate"):
        for stride in (1, 2):
            module = nn.Conv2d(2, 4, 3, stride, 1, groups=2, padding_mode=mode)
            x = torch.eye(2 * 36).reshape(-1, 2, 6, 6)
            with torch.no_grad():
                truth = float(torch.linalg.matrix_norm((module(x) - module(0 * x)).flatten(1), 2))
            assert truth <= cheap_convolution_norm(module, (6, 6)) * ROUNDING
            assert truth <= convolution_norm(module, (6, 6)) * ROUNDING


def test_norms_of_two_hundred_features_are_not_begun_in_a_millisecond(counted, monkeypatch):
    counted(1e-6)
    monkeypatch.setattr(
        "inn_guard.lipschitz.networks.interpreters.spectral_norm",
        lambda A: pytest.fail("begun"),
    )
    layer = AffineCoupling(MLP([100, 80, 200]))
    bounds = lipschitz_bounds(layer, Box(-torch.ones(200), torch.ones(200)), seconds=1e-3)
    assert math.isfinite(bounds.forward)

"""AdaptiveCoefficient: its arithmetic, and that it holds a slowly responding model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inn_guard.training.regularizer_hook import Regularizer, RegularizerHook
from inn_guard.training.regularizers import (
    AdaptiveCoefficient,
    FiniteDifferences,
    NormalizingFlowLoss,
)
from tests.oracles.regularizers import TwoCouplings


def coefficient(**settings):
    return AdaptiveCoefficient(
        NormalizingFlowLoss(1.0), **{"target": 100.0, "initial": 1e-4, **settings}
    )


def decades(before, after):
    return math.log10(after / before)


def test_it_multiplies_the_penalty_and_its_gradient():
    model, x = TwoCouplings().double(), torch.randn(5, 6)
    adaptive = coefficient(initial=0.25)
    plain = NormalizingFlowLoss(1.0)(model, x)
    assert adaptive(model, x).item() == pytest.approx(0.25 * plain.item(), rel=1e-14)
    expected = [0.25 * g for g in torch.autograd.grad(plain, model.parameters())]
    found = torch.autograd.grad(adaptive(model, x), model.parameters())
    torch.testing.assert_close(list(found), expected)


def test_one_step_of_control_by_hand():
    adaptive = coefficient(gain=0.2, damping=0.5, rate=0.5, tolerance=0.1)
    assert decades(adaptive.value, adaptive.update(3.0)) == pytest.approx(
        0.2
    )  # e = 1, nothing known before
    assert decades(adaptive.value, adaptive.update(2.9)) == pytest.approx(0.2 * 0.9 - 0.5 * 0.1)
    assert decades(adaptive.value, adaptive.update(2.2)) == pytest.approx(0.2 * 0.2 - 0.5 * 0.7)


def test_clipped_rate_tolerance_bounds_and_non_finite():
    adaptive = coefficient(gain=1.0, damping=0.0, rate=0.5, tolerance=0.1, bounds=(1e-5, 1e-3))
    assert decades(adaptive.value, adaptive.update(9.0)) == pytest.approx(0.5)
    value = adaptive.value
    assert adaptive.update(2.09) == value
    assert adaptive.update(1.91) == value
    assert adaptive.update(math.inf) == pytest.approx(1e-3)
    assert adaptive.update(math.nan) == 1e-3
    for _ in range(9):
        adaptive.update(0.0)
    assert adaptive.value == 1e-5
    adaptive.update(4.0)  # it leaves a bound at once: nothing has been wound up
    assert decades(1e-5, adaptive.value) == pytest.approx(0.5)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30))
def test_no_measurement_leads_out_of_the_bounds_or_beyond_the_rate(measurements):
    adaptive = coefficient(rate=0.4, bounds=(1e-6, 1e-1))
    for measurement in measurements:
        before = adaptive.value
        after = adaptive.update(measurement)
        assert 1e-6 <= after <= 1e-1
        assert abs(decades(before, after)) <= 0.4 + 1e-9


def settled(adaptive, plant, rounds=150):
    """log10 of the condition number over a run that responds late to the coefficient."""
    log_condition, history = 0.0, []
    for _ in range(rounds):
        log_condition += 0.15 * (plant(math.log10(adaptive.value)) - log_condition)
        adaptive.update(log_condition)
        history.append(log_condition)
    return history


@pytest.mark.parametrize("initial", [1e-8, 1e-4, 1e-1])
@pytest.mark.parametrize("slope", [0.3, 0.7, 1.0])
def test_it_settles_at_the_target_from_any_start(initial, slope):
    """A condition number that falls by ``slope`` decades per decade of value, with a lag."""
    history = settled(coefficient(initial=initial), lambda c: 3.0 - slope * (c + 5.0))
    assert max(abs(value - 2.0) for value in history[-50:]) < 0.1
    assert max(history) < max(2.0, 3.0 - slope * (math.log10(initial) + 5.0)) + 0.3


def test_it_gives_up_the_penalty_where_none_is_needed():
    adaptive = coefficient(bounds=(1e-8, 1.0))
    settled(adaptive, lambda c: 0.5)
    assert adaptive.value == 1e-8


def test_in_a_hook_with_its_generator_saved():
    adaptive = AdaptiveCoefficient(FiniteDifferences(1.0, seed=3), target=10.0)
    assert isinstance(adaptive, Regularizer)
    hook = RegularizerHook(TwoCouplings().double(), [adaptive, coefficient()], every=1)
    x = torch.randn(4, 6)
    state = hook.state_dict()
    first = hook(x)
    assert set(hook.last) == {"AdaptiveCoefficient[0]", "AdaptiveCoefficient[1]"}
    assert hook(x) != first
    hook.load_state_dict(state)
    assert hook(x) == first
    assert adaptive.generator is adaptive.regularizer.generator
    assert coefficient().generator is None


def test_state_is_all_that_the_next_step_depends_on():
    first, second = coefficient(), coefficient(initial=1e-2)
    first.update(3.0)
    second.load_state_dict(first.state_dict())
    assert first.update(2.7) == second.update(2.7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": 1.0},
        {"target": math.nan},
        {"initial": 0.0},
        {"initial": 1.0, "bounds": (1e-3, 1e-1)},
        {"bounds": (0.0, 1.0)},
        {"gain": 0.0},
        {"damping": -1.0},
        {"rate": 0.0},
        {"tolerance": -0.1},
        {"gain": math.inf},
        {"damping": math.inf},
        {"rate": math.inf},
        {"rate": math.nan},
    ],
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        coefficient(**wrong)

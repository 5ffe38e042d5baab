"""Scale functions: value, logarithm, slope and the constants that bound them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inn_guard.layers.scales import ClampedScale, ExpScale, SigmoidScale, squashed_sigmoid

SCALES = [SigmoidScale(), SigmoidScale(1e-3, 1.001), squashed_sigmoid(), ExpScale(), ClampedScale(), ClampedScale(0.5)]


@pytest.mark.parametrize("scale", SCALES, ids=repr)
def test_logarithm_and_slope_belong_to_the_value(scale):
    h = torch.linspace(-6, 6, 1001).requires_grad_()
    value = scale.value(h)
    (slope,) = torch.autograd.grad(value.sum(), h)
    assert torch.allclose(scale.log(h), value.log(), atol=1e-13)
    assert torch.allclose(scale.slope(h), slope, atol=1e-13)


@pytest.mark.parametrize("scale", SCALES, ids=repr)
def test_constants_are_bounds_and_the_slopes_of_log_are_reached(scale):
    h = torch.linspace(-40, 40, 400_001)
    value, ratio = scale.value(h), (scale.slope(h) / scale.value(h)).abs()
    assert bool((value >= scale.lower).all())
    assert bool((value <= scale.upper).all())
    assert bool((scale.slope(h).abs() <= scale.max_slope).all())
    assert ratio.max() <= scale.max_log_slope * (1 + 1e-12)
    assert ratio.max() >= scale.max_log_slope * (1 - 1e-6)


def test_constants_in_closed_form():
    assert squashed_sigmoid().max_log_slope == pytest.approx(3 - 2 * math.sqrt(2), abs=1e-15)
    assert SigmoidScale().max_log_slope == 1
    e = 1e-3
    assert SigmoidScale(e, 1 + e).max_log_slope == pytest.approx(1 + 2 * e - 2 * math.sqrt(e + e * e), abs=1e-15)


@given(st.floats(-700, 700))
def test_logarithm_of_the_sigmoid_stays_finite(h):
    assert math.isfinite(float(SigmoidScale().log(torch.tensor(h))))


def test_impossible_ranges_are_refused():
    with pytest.raises(ValueError, match="0 <= lower < upper"):
        SigmoidScale(1.0, 0.5)
    with pytest.raises(ValueError, match="positive clamp"):
        ClampedScale(0.0)

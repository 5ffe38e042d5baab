"""Scale functions: value, logarithm, slope and the constants that bound them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inn_guard.layers.scales import (
    ClampedScale,
    ExpScale,
    SigmoidScale,
    SoftplusScale,
    squashed_sigmoid,
)

SCALES = [
    *(SigmoidScale(), SigmoidScale(1e-3, 1.001), squashed_sigmoid()),
    *(ExpScale(), ClampedScale(), ClampedScale(0.5), SoftplusScale()),
]


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
    assert SigmoidScale(e, 1 + e).max_log_slope == pytest.approx(
        1 + 2 * e - 2 * math.sqrt(e + e * e), abs=1e-15
    )


@given(st.floats(-700, 700))
def test_logarithm_of_the_sigmoid_stays_finite(h):
    assert math.isfinite(float(SigmoidScale().log(torch.tensor(h))))


def test_softplus_with_a_floor_keeps_it_and_its_constants_bound():
    scale, h = SoftplusScale(1e-3), torch.linspace(-40, 40, 400_001)
    assert scale.value(h).min() == pytest.approx(1e-3, rel=1e-9)
    assert (scale.slope(h) / scale.value(h)).max() <= scale.max_log_slope
    assert torch.equal(scale.log(h), scale.value(h).log())


@given(st.floats(-700, 700))
def test_logarithm_of_softplus_against_its_series(h):
    """log log(1 + e^h) = h - e^h / 2 + O(e^2h) on the left, log h + O(e^-h / h) on the right."""
    actual = float(SoftplusScale().log(torch.tensor(h)))
    expected = math.log(math.log1p(math.exp(h))) if -30 < h < 30 else h if h < 0 else math.log(h)
    assert actual == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_impossible_ranges_are_refused():
    with pytest.raises(ValueError, match="0 <= lower < upper"):
        SigmoidScale(1.0, 0.5)
    with pytest.raises(ValueError, match="lower >= 0"):
        SoftplusScale(-1.0)
    with pytest.raises(ValueError, match="positive clamp"):
        ClampedScale(0.0)

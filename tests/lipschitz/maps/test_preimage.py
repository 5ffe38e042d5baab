"""Boxes of inputs of monotone maps, against the maps' inverses."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from inn_guard.lipschitz.maps.preimage import everywhere, preimage
from inn_guard.numerics.intervals import Interval

SIZES = st.floats(-6, 6)


@given(SIZES, SIZES, st.floats(-30, 30), st.floats(0, 10))
def test_ends_of_a_line_are_enclosed_and_met(log_slope, shift, low, width):
    slope = math.exp(log_slope)
    image = Interval(
        torch.tensor([low], dtype=torch.float64), torch.tensor([low + width], dtype=torch.float64)
    )
    found = preimage(lambda x: x * slope + shift, image)
    lo, hi = (low - shift) / slope, (low + width - shift) / slope
    slack = 1e-9 * (1 + abs(lo) + abs(hi))
    assert float(found.lo) <= lo + slack
    assert float(found.hi) >= hi - slack
    reach = 16 * max(1.0, abs(lo), abs(hi))
    assert float(found.hi) - float(found.lo) <= hi - lo + 1e-4 * reach


@given(st.floats(-3, 3), st.floats(0, 2), st.floats(0, 2))
def test_every_point_of_a_family_of_curves_is_enclosed(low, width, spread):
    """y = x + t + sinh(x) with t anywhere in [0, spread]."""
    t = Interval(torch.zeros(1), torch.full((1,), spread))
    image = Interval(
        torch.tensor([low], dtype=torch.float64), torch.tensor([low + width], dtype=torch.float64)
    )
    found = preimage(lambda x: x + t + x.increasing(torch.sinh), image)
    x = torch.linspace(-4, 4, 2001, dtype=torch.float64)
    for shift in (0.0, spread / 3, spread):
        y = x + shift + x.sinh()
        inside = x[(y >= low) & (y <= low + width)]
        assert bool(((found.lo <= inside) & (inside <= found.hi)).all())


def test_ends_that_are_never_passed_are_infinite():
    image = Interval.of(torch.tensor([0.0, 5.0]))
    flat = preimage(lambda x: x.increasing(torch.tanh), image)
    assert flat.lo[0] > -1e-3
    assert flat.hi.tolist() == [flat.hi[0].item(), math.inf]
    unknown = preimage(lambda x: everywhere(x), image)
    assert not unknown.lo.isfinite().any()
    unbounded = preimage(lambda x: x * 2.0, everywhere(image))
    assert not unbounded.hi.isfinite().any()

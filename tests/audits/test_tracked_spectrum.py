"""tracked_spectrum: bounds that hold at every look, and close in where the map stays the same."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inn_guard.audits.jacobian_spectrum import jacobian_spectrum
from inn_guard.audits.tracked_spectrum import tracked_spectrum
from inn_guard.layers import MLP, AffineCoupling, Chain, Halves
from inn_guard.report.verdict import Verdict
from tests.cases.toys import Linear
from tests.oracles.regularizers import Embedding


def looks(model, x, count, **arguments):
    starts = {}
    return [tracked_spectrum(model, x, starts=starts, **arguments) for _ in range(count)]


def flow() -> Chain:
    torch.manual_seed(0)
    halves = [Halves(swapped=k % 2 == 1) for k in range(4)]
    return Chain(*[AffineCoupling(MLP([4, 16, 8]), partition=half) for half in halves])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 7))
def test_no_bound_is_beyond_the_singular_values_at_any_look(seed, size):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(matrix).log10()
    for result in looks(Linear(matrix), torch.randn(3, size, dtype=torch.float64), 3, seed=seed):
        assert result.values["log10_sigma_max"] <= values[0].item() + 1e-9
        assert result.values["log10_sigma_min"] >= values[-1].item() - 1e-9


def test_the_bounds_close_in_on_the_spectrum_of_a_net_that_stays():
    model, x = flow().double(), torch.randn(2, 8, dtype=torch.float64)
    truth = jacobian_spectrum(model, x[:1], tolerance=1e-6).values
    found = looks(model, x, 60)
    # of sigma^2 the power method leaves 0.871 ln D / (k - 1) after k steps, whatever the spectrum:
    # Kuczynski and Wozniakowski 1992, Theorem 3.1
    left = math.log10(1 + 0.871 * math.log(8) / 59) / 2
    for name in ("log10_sigma_max", "log10_sigma_min"):
        assert found[-1].values[name] == pytest.approx(truth[name], abs=left)
    product = found[-1].values["log10_sigma_max"] - found[-1].values["log10_sigma_min"]
    assert found[-1].values["log10_condition_number"] == pytest.approx(product)
    assert found[-1].values["sigma_max_residual"] < 0.1 < found[0].values["sigma_max_residual"]
    assert found[0].verdict is Verdict.UNDECIDED
    assert "not found yet" in found[0].reason
    assert found[-1].verdict is Verdict.STABLE
    assert found[-1].values["looks"] == 60
    assert found[-1].values["samples"] == 1


def test_a_direction_that_begins_to_stretch_more_is_found():
    starts = {}
    x = torch.randn(1, 3, dtype=torch.float64)
    before = Linear(torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)))
    for _ in range(20):
        tracked_spectrum(before, x, starts=starts)
    # the vector tracked is orthogonal to the new one
    after = Linear(torch.diag(torch.tensor([4.0, 2.0, 9.0], dtype=torch.float64)))
    for _ in range(12):
        last = tracked_spectrum(after, x, starts=starts)
    assert last.values["log10_sigma_max"] == pytest.approx(math.log10(9), abs=1e-3)


def test_a_bound_that_is_too_large_already_is_unstable():
    matrix = torch.diag(torch.tensor([1e4, 1.0, 1e-4])).float()
    last = looks(Linear(matrix), torch.randn(1, 3).float(), 8)[-1]
    assert last.verdict is Verdict.UNSTABLE
    assert "at least" in last.reason
    assert "1 of 1 samples" in last.reason


def test_what_cannot_be_looked_at_says_why():
    assert tracked_spectrum(flow(), torch.full((2, 8), math.nan)).verdict is Verdict.NON_FINITE
    injective = tracked_spectrum(Embedding(torch.randn(3, 6)), torch.randn(5, 6))
    assert injective.verdict is Verdict.NOT_APPLICABLE
    with pytest.raises(ValueError, match="expected at least 1 sample; got 0"):
        tracked_spectrum(flow(), torch.randn(2, 8), samples=0)

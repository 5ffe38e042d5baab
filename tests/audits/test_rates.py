"""Clopper-Pearson intervals against scipy's beta distribution, and the draws that decide a rate."""

from __future__ import annotations

import math

import pytest
from scipy.stats import beta

from inn_guard.audits.rates import MOST_DRAWS, draws_that_decide, percent, rate_interval

LIMIT = 1e-3


@pytest.mark.parametrize("of", [1, 7, 256, 4096])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_the_interval_is_that_of_the_beta_distribution(of, confidence):
    tail = (1 - confidence) / 2
    for count in {0, 1, of // 3, of - 1, of}:
        low, high = rate_interval(count, of, confidence=confidence)
        if count == 0:
            assert low == 0
        else:
            assert low == pytest.approx(beta.ppf(tail, count, of - count + 1), rel=1e-9)
        if count == of:
            assert high == 1
        else:
            assert high == pytest.approx(beta.ppf(1 - tail, count + 1, of - count), rel=1e-9)


@pytest.mark.parametrize(
    ("lost", "draws"), [(0, 3688), (1, 5570), (2, 7223), (3, 8765), (5, 11665), (10, 18387)]
)
def test_the_fewest_draws_that_prove_a_rate_below_a_thousandth(lost, draws):
    assert rate_interval(lost, draws)[1] < LIMIT
    assert rate_interval(lost, draws - 1)[1] >= LIMIT


@pytest.mark.parametrize(("lost", "of"), [(3, 256), (4, 1024), (9, 4096), (26, 16384)])
def test_the_fewest_lost_draws_that_prove_a_rate_above_a_thousandth(lost, of):
    assert rate_interval(lost, of)[0] > LIMIT
    assert rate_interval(lost - 1, of)[0] <= LIMIT


@pytest.mark.parametrize(
    ("count", "of"), [(0, 256), (0, 1024), (1, 1024), (1, 4096), (8, 4096), (2, 256), (20, 16384)]
)
def test_the_number_named_decides_at_the_rate_seen(count, of):
    needed = draws_that_decide(count, of, LIMIT)
    assert needed is not None
    assert needed > of
    rate = 0.0 if count == 0 else (count + 0.5) / (of + 1)
    seen = math.ceil(rate * needed) if rate < LIMIT else math.floor(rate * needed)
    low, high = rate_interval(seen, needed)
    assert low > LIMIT or high < LIMIT


def test_a_rate_at_the_limit_needs_too_many():
    assert draws_that_decide(1, 1499, LIMIT) is None
    assert MOST_DRAWS == 2**20


def test_nothing_lost_needs_as_many_as_prove_it():
    assert draws_that_decide(0, 1024, LIMIT) == 3688


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.00123, "0.12"), (0.5, "50"), (0.99999, "100"), (0.9996, "99.96"), (0.0, "0")],
)
def test_per_cent(rate, text):
    assert percent(rate) == text

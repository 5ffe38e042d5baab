"""Limits refuse what cannot be one, and turn figures into verdicts."""

from __future__ import annotations

import math

import pytest
import torch

from inn_guard.report.limits import Limits
from inn_guard.report.verdict import Verdict


@pytest.mark.parametrize(
    ("figure", "label"),
    [
        (0.0, "stable"),
        (0.01, "stable"),
        (0.0101, "marginal"),
        (0.1, "marginal"),
        (0.1001, "unstable"),
        (math.inf, "non_finite"),
        (math.nan, "non_finite"),
    ],
)
def test_a_tenth_of_the_limit_is_stable_and_the_limit_itself_passes(figure, label):
    assert Limits().verdict(figure, 0.1) == label


def test_the_share_that_is_marginal_can_be_set():
    assert Limits(marginal=1.0).verdict(0.09, 0.1) is Verdict.STABLE


def test_a_round_trip_is_not_asked_for_more_than_the_dtype_can_hold():
    limits = Limits(reconstruction=1e-4)
    assert limits.round_trip(torch.float64) == 1e-4
    assert limits.round_trip(torch.float16) == 8 * torch.finfo(torch.float16).eps


def test_no_family_may_fail_is_a_limit():
    assert Limits(other_inputs=0.0).other_inputs == 0.0


@pytest.mark.parametrize(
    "wrong", [{"density": 0.0}, {"draw": -1.0}, {"sampling": math.nan}, {"density": math.inf}]
)
def test_limits_are_positive_and_finite(wrong):
    with pytest.raises(ValueError, match=f"a positive limit {next(iter(wrong))}"):
        Limits(**wrong)


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_a_share_of_zero_is_allowed_and_the_message_says_so(wrong):
    with pytest.raises(ValueError, match="a non-negative limit other_inputs"):
        Limits(other_inputs=wrong)


@pytest.mark.parametrize("wrong", [{"sampling": 1.5}, {"marginal": 2.0}, {"confidence": 1.01}])
def test_shares_are_at_most_one(wrong):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Limits(**wrong)


def test_certainty_is_refused():
    with pytest.raises(ValueError, match="a confidence below 1"):
        Limits(confidence=1.0)


@pytest.mark.parametrize("value", ["0.1", None, True])
def test_a_limit_is_a_number(value):
    with pytest.raises(TypeError, match="density"):
        Limits(density=value)

"""The audit around the certified bounds: closed forms, samples that are not finite, conditions of
long batches.
"""

from __future__ import annotations

import math

import pytest
import torch

from inn_guard.audits.lipschitz_bounds import SAMPLED, lipschitz_bounds
from inn_guard.layers import MLP, AffineCoupling, Chain, Conditional, Diagonal, InvertibleLinear
from inn_guard.report.verdict import Verdict


def stretching(*factors: float) -> Diagonal:
    layer = Diagonal(len(factors))
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor(factors).log())
    return layer


def test_the_bounds_of_a_diagonal_map_are_its_entries():
    result = lipschitz_bounds(stretching(0.25, 1.0, 8.0), torch.randn(5, 3))
    assert result.verdict is Verdict.STABLE
    for side, expected in (("forward", 8.0), ("inverse", 4.0)):
        assert result.values[f"upper_{side}"] == pytest.approx(expected, rel=1e-9)
        assert result.values[f"lower_{side}"] == pytest.approx(expected, rel=1e-6)
        assert result.values[f"lower_{side}"] <= result.values[f"upper_{side}"]


def test_a_map_beyond_rounding_is_unstable():
    assert (
        lipschitz_bounds(stretching(1e-15, 1.0), torch.randn(5, 2), seconds=1.0).verdict
        is Verdict.UNSTABLE
    )


def test_the_advice_names_the_layers_that_make_the_product_large():
    model = Chain(stretching(1.0, 1.0), stretching(1.0, 100.0), stretching(1.0, 1.0))
    result = lipschitz_bounds(model, torch.randn(5, 2), seconds=2.0)
    assert [row["makes_it_large"] for row in result.per_layer] == [False, True, False]
    assert "large: 1 (Diagonal)" in result.advice
    for remedy in ("spectral normalisation", "(0.5, 1)", "additive"):
        assert remedy in result.advice
    alike = lipschitz_bounds(Chain(*[stretching(5.0, 5.0)] * 3), torch.randn(5, 2), seconds=2.0)
    assert "all layers make the product large alike" in alike.advice
    assert lipschitz_bounds(stretching(1.0, 2.0), torch.randn(5, 2), seconds=1.0).advice == ""


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite_are_left_out(bad):
    model, x = Chain(InvertibleLinear(3), stretching(1.0, 2.0, 3.0)), torch.randn(6, 3)
    poisoned = x.clone()
    poisoned[4, 1] = bad
    clean = lipschitz_bounds(model, x[[0, 1, 2, 3, 5]], seconds=5.0)
    assert lipschitz_bounds(model, poisoned, seconds=5.0).values == clean.values
    assert lipschitz_bounds(model, torch.full_like(x, bad)).verdict is Verdict.NOT_APPLICABLE


@pytest.mark.thorough
def test_a_batch_longer_than_what_is_sampled_keeps_its_conditions():
    rows = SAMPLED + 3
    model = AffineCoupling(Conditional(MLP([3, 8, 4]))).with_context(torch.randn(rows, 1))
    result = lipschitz_bounds(model, torch.randn(rows, 4), seconds=2.0)
    (row,) = result.per_layer
    assert 0 < row["lower_forward"] <= row["upper_forward"]

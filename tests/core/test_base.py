"""BaseDistribution: seeds, contexts, dtypes, deviations."""

from __future__ import annotations

import pytest
import torch

from inn_guard.core.base import BaseDistribution, seeded
from inn_guard.core.missing import NotApplicable

LIKE = torch.empty(0, dtype=torch.float32)
SHIFTS = torch.tensor([0, 100, 0, 100, 0], dtype=torch.float32)


def scaled(n, context):
    """Latents of deviation 1 and 3, shifted by the context."""
    z = torch.randn(n, 2) * torch.tensor([1.0, 3.0])
    return z if context is None else z + context


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    base = BaseDistribution(scaled, LIKE)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = base.draw(4, seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(base.draw(4, seed=0), first)
    assert not torch.equal(base.draw(4, seed=1), first)
    assert first.shape == (4, 2)


def test_draws_have_the_dtype_of_the_model_and_no_graph():
    weight = torch.ones(2, requires_grad=True)
    base = BaseDistribution(lambda n, context: torch.randn(n, 2) * weight, LIKE.double())
    assert base.draw(3, seed=0).dtype == torch.float64
    assert not base.draw(3, seed=0).requires_grad


def test_the_own_context_is_repeated_and_another_one_must_fit():
    context = torch.tensor([[0.0, 0.0], [100.0, 100.0]])
    base = BaseDistribution(scaled, LIKE, context=context)
    shift = base.draw(5, seed=0) - BaseDistribution(scaled, LIKE).draw(5, seed=0)
    torch.testing.assert_close(shift[:, 0], SHIFTS, atol=1e-4, rtol=0)
    assert torch.equal(base.repeated_context(3), context[[0, 1, 0]])
    with pytest.raises(ValueError, match="a context with 3 rows, one for each latent; got 2 rows"):
        base.draw(3, seed=0, context=context)


def test_the_deviation_is_the_exact_one_or_estimated():
    estimated = BaseDistribution(scaled, LIKE).deviation
    torch.testing.assert_close(
        estimated.double(), torch.tensor([1.0, 3.0]).double(), rtol=0.05, atol=0
    )
    exact = BaseDistribution(scaled, LIKE.double(), exact_deviation=torch.tensor([1.0, 3.0]))
    assert torch.equal(exact.deviation, torch.tensor([1.0, 3.0], dtype=torch.float64))


def test_a_library_that_cannot_sample_says_so():
    def sampler(n, context):
        raise NotImplementedError

    base = BaseDistribution(sampler, LIKE, description="DiagonalNormal of nflows")
    with pytest.raises(NotApplicable, match="no samples of the DiagonalNormal of nflows"):
        base.draw(2, seed=0)


def test_seeded_equals_manual_seed():
    torch.manual_seed(3)
    expected = torch.randn(4)
    with seeded(3, torch.device("cpu")):
        assert torch.equal(torch.randn(4), expected)

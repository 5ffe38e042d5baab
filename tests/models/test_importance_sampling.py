"""Importance sampling against integrals that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from inn_guard.models.aef.importance_sampling import Proposal, importance_log_prob, tuned_width

SPREAD = torch.tensor([0.5, 1.5], dtype=torch.float64)
MEAN = torch.tensor([[0.3, -0.2], [1.0, 2.0], [-4.0, 0.0]], dtype=torch.float64)
LOG_EVIDENCE = torch.tensor([-3.0, 2.0, 500.0], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def joint(w):
    """p(x) N(w; mean(x), diag spread^2): its integral over w is p(x)."""
    return LOG_EVIDENCE[:, None] + Normal(MEAN[:, None], SPREAD).log_prob(w).sum(2)


def estimate(width, **settings):
    return importance_log_prob(joint, Proposal(MEAN, width), generator=generator(), **settings)


def test_the_proposal_draws_from_its_own_density():
    w, log_q = Proposal(MEAN, 0.7).sample(50_000, generator=generator())
    density = MultivariateNormal(MEAN[:, None], 0.49 * torch.eye(2))
    assert torch.allclose(log_q, density.log_prob(w), rtol=1e-12)
    assert torch.allclose(w.mean(1), MEAN, atol=5 * 0.7 / math.sqrt(50_000))
    assert torch.allclose(w.std(1), torch.tensor(0.7), rtol=0.02)


@pytest.mark.parametrize("draws", [1, 16, 256])
def test_the_estimate_is_the_integral_within_its_error_bars_for_every_number_of_draws(draws):
    """A missing 1/K would be off by log K."""
    result = estimate(2.0, draws=draws, repetitions=4000 // draws + 20)
    assert bool((result.standard_error < 0.2).all())
    assert bool(((result.log_prob - LOG_EVIDENCE).abs() < 5 * result.standard_error).all())


@pytest.mark.thorough
def test_the_error_bars_are_the_spread_of_independent_estimates():
    results = [
        importance_log_prob(
            joint, Proposal(MEAN, 2.0), draws=32, repetitions=20, generator=generator(k)
        )
        for k in range(200)
    ]
    spread = torch.stack([result.log_prob for result in results]).std(0)
    claimed = torch.stack([result.standard_error for result in results]).square().mean(0).sqrt()
    assert torch.allclose(spread, claimed, rtol=0.2)


def test_the_posterior_as_proposal_is_exact():
    same = MEAN.new_tensor([1.0, 1.0])

    def isotropic(w):
        return LOG_EVIDENCE[:, None] + Normal(MEAN[:, None], same).log_prob(w).sum(2)

    result = importance_log_prob(
        isotropic, Proposal(MEAN, 1.0), draws=8, repetitions=3, generator=generator()
    )
    for value in (result.log_prob, result.lower_bound):
        assert torch.allclose(value, LOG_EVIDENCE, rtol=1e-12)
    assert torch.allclose(result.effective_draws, torch.tensor(24.0), rtol=1e-9)
    assert torch.allclose(result.standard_error, torch.tensor(0.0), atol=1e-12)


@pytest.mark.thorough
def test_the_mean_of_logarithms_is_below_and_rises_with_the_draws():
    few, many = (estimate(3.0, draws=draws, repetitions=2000) for draws in (1, 64))
    assert bool((few.lower_bound < many.lower_bound).all())
    assert bool((many.lower_bound < LOG_EVIDENCE).all())
    assert bool((few.lower_bound <= few.log_prob).all())
    assert bool((few.effective_draws < 2000).all())


def test_the_tuned_width_is_the_one_that_bounds_best():
    """At K = 1 the bound is -KL(q | p) + const, whose maximum is known."""
    widths = [2.0 ** (k / 2) for k in range(-6, 7)]

    def score(width):
        w, log_q = Proposal(MEAN, width).sample(20_000, generator=generator())
        return (joint(w) - log_q).mean(1)

    best = math.sqrt(2 / (1 / SPREAD.square()).sum().item())
    assert tuned_width(score, widths) == min(widths, key=lambda width: abs(math.log(width / best)))


def test_widths_without_a_finite_score_lose():
    assert (
        tuned_width(lambda width: torch.tensor([-1.0 if width == 2 else math.nan]), [1.0, 2.0]) == 2
    )
    with pytest.raises(ValueError, match="finite"):
        tuned_width(lambda width: torch.tensor([-math.inf]), [1.0])

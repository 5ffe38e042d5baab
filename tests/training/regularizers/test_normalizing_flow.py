from __future__ import annotations

import math

import pytest
import torch

from inn_guard.core.invertible import NotApplicable
from inn_guard.training.regularizers import NormalizingFlowLoss
from tests.oracles.regularizers import (
    LinearMap,
    Scaling,
    TwoCouplings,
    literal_normalizing_flow_loss,
)


def data(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


def test_linear_map_against_the_multivariate_normal():
    weight, x = data(4, 4), data(9, 4)
    inverse = torch.linalg.inv(weight)
    density = torch.distributions.MultivariateNormal(
        torch.zeros(4, dtype=weight.dtype), inverse @ inverse.T
    )
    expected = -0.5 * density.log_prob(x).mean()
    torch.testing.assert_close(NormalizingFlowLoss(0.5)(LinearMap(weight), x), expected)


@pytest.mark.parametrize("context_size", [0, 2])
def test_value_and_gradients_equal_the_literal_copy(context_size):
    x = data(5, 6).requires_grad_()
    model = TwoCouplings(context_size=context_size).double()
    model = model.with_context(data(5, 2)) if context_size else model
    mine = NormalizingFlowLoss(0.3)(model, x)
    theirs = 0.3 * literal_normalizing_flow_loss(model, x)
    torch.testing.assert_close(mine, theirs)
    wanted = [*model.parameters(), x]
    for got, expected in zip(
        torch.autograd.grad(mine, wanted), torch.autograd.grad(theirs, wanted), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_base_is_standard_normal_whatever_the_model_says():
    class OtherBase(TwoCouplings):
        def log_prob(self, x):
            return torch.full((len(x),), 123.0)

    x = data(5, 6)
    model, other = TwoCouplings().double(), OtherBase().double()
    assert torch.equal(NormalizingFlowLoss(1.0)(other, x), NormalizingFlowLoss(1.0)(model, x))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_the_likelihood(x_dtype):
    model, x = TwoCouplings().float(), data(32, 6, dtype=torch.float32).to(x_dtype)
    expected = NormalizingFlowLoss(1.0)(model, x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = NormalizingFlowLoss(1.0)(model, x, model(x))
        rounded = -model.log_prob(x).mean()
    assert torch.equal(got, expected)
    assert not torch.equal(rounded.float(), expected)


def test_what_cannot_be_had_is_said():
    with pytest.raises(NotApplicable, match="log-determinant"):
        NormalizingFlowLoss(1.0)(Scaling().with_context(torch.ones(3, 1)), torch.ones(3, 2))
    with pytest.raises(ValueError, match="expected"):
        NormalizingFlowLoss(math.inf)
    assert (
        NormalizingFlowLoss(1.0)(LinearMap(torch.zeros(2, 2)), torch.ones(3, 2)).item() == math.inf
    )

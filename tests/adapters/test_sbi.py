"""Density estimators of sbi itself, where it is installed, and of stand-ins."""

from __future__ import annotations

import math

import pytest
import torch
import zuko
from nflows import distributions, flows, transforms
from nflows.nn.nets import ResidualNet
from torch import nn

import inn_guard as ig
from inn_guard.adapters import wrap

THETA, X, EMBEDDED = 3, 5, 4


class StandIn(nn.Module):
    """What sbi's estimators are: a flow in ``net`` and an embedding net."""

    __module__ = "sbi.neural_nets.estimators.stand_in"

    def __init__(self, net: nn.Module, embedding: nn.Module) -> None:
        super().__init__()
        self.net = net
        self._embedding_net = embedding

    @property
    def embedding_net(self) -> nn.Module:
        return self._embedding_net


def nflows_estimator() -> StandIn:
    embedding = nn.Linear(X, EMBEDDED)

    def subnet(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(
            inputs, outputs, 8, context_features=EMBEDDED, num_blocks=1, activation=torch.tanh
        )

    mask = torch.arange(THETA) % 2
    chain = transforms.CompositeTransform(
        [
            transforms.AffineCouplingTransform(mask, subnet),
            transforms.AffineCouplingTransform(1 - mask, subnet),
        ]
    )
    flow = flows.Flow(chain, distributions.StandardNormal([THETA]), embedding)
    return StandIn(flow, embedding).double()


def zuko_estimator() -> StandIn:
    return StandIn(
        zuko.flows.NSF(THETA, EMBEDDED, transforms=2, bins=4), nn.Linear(X, EMBEDDED)
    ).double()


def log_prob(estimator: StandIn, theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if isinstance(estimator.net, flows.Flow):
        return estimator.net.log_prob(theta, x)
    return estimator.net(estimator.embedding_net(x)).log_prob(theta)


@pytest.mark.parametrize("make", [nflows_estimator, zuko_estimator])
def test_the_flow_is_run_in_the_embedded_observation(make):
    estimator, theta, x = make(), torch.randn(6, THETA), torch.randn(6, X)
    model = wrap(estimator, context=x)
    torch.testing.assert_close(model.log_prob(theta), log_prob(estimator, theta, x))
    torch.testing.assert_close(model.inverse(model(theta)), theta)
    z = theta
    for layer in model.layers():
        z = layer(z)
    torch.testing.assert_close(z, model(theta))
    first = model.select(torch.tensor([2]))
    torch.testing.assert_close(first(theta[2:3]), model(theta)[2:3])


@pytest.mark.parametrize("make", [nflows_estimator, zuko_estimator])
def test_an_audit_gives_a_report(make):
    report = ig.audit(
        make().eval(), torch.randn(6, THETA), context=torch.randn(6, X), level="quick"
    )
    assert report.verdict is ig.Verdict.STABLE


def test_a_posterior_is_its_estimator():
    class Posterior:
        __module__ = "sbi.inference.posteriors.stand_in"
        posterior_estimator = zuko_estimator()

    theta, x = torch.randn(4, THETA), torch.randn(4, X)
    expected = wrap(Posterior.posterior_estimator, context=x)(theta)
    assert torch.equal(wrap(Posterior(), context=x)(theta), expected)


def test_one_observation_serves_many_theta_and_a_posterior_has_its_own():
    class Posterior:
        __module__ = "sbi.inference.posteriors.stand_in"

        def __init__(self, x):
            self.posterior_estimator, self.default_x = zuko_estimator(), x

    theta, x = torch.randn(16, THETA), torch.randn(1, X)
    posterior = Posterior(x)
    estimator = posterior.posterior_estimator
    expected = wrap(estimator, context=x.expand(16, X))(theta)
    assert torch.equal(wrap(posterior, x=theta)(theta), expected)
    assert torch.equal(wrap(estimator, context=x, x=theta)(theta), expected)
    assert ig.audit(posterior, theta, level="quick").verdict.passed
    with pytest.raises(ValueError, match="one for all; pass wrap"):
        wrap(estimator)(theta)


@pytest.mark.unchecked
def test_vector_fields_are_integrated_between_their_own_times():
    class Field(nn.Module):
        __module__ = "sbi.neural_nets.estimators.stand_in"
        t_min, t_max = 0.0, 1.0
        mean_base, std_base = torch.full((1, THETA), 0.5), torch.full((1, THETA), 3.0)

        def ode_fn(self, input, condition, times):
            return (condition - 1).sum(1, keepdim=True) * input * times[:, None]

    theta, x = torch.randn(8, THETA), torch.ones(1, 1) + 0.5
    model = wrap(Field(), context=x, x=theta)
    torch.testing.assert_close(model(theta), theta * math.exp(0.25), rtol=1e-4, atol=1e-4)
    assert model.name == "Field"
    noise = torch.distributions.Normal(0.5, 3.0)
    expected = noise.log_prob(theta * math.exp(0.25)).sum(1) + THETA * 0.25
    torch.testing.assert_close(model.log_prob(theta), expected, rtol=1e-4, atol=1e-4)
    drawn = model.base().draw(4096, seed=0)
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.1)
    assert drawn.std().item() == pytest.approx(3.0, abs=0.1)
    assert model.to_dtype(torch.float32)(theta.float()).dtype == torch.float32


def test_without_an_observation_it_says_what_to_type():
    with pytest.raises(ValueError, match=r"pass wrap\(estimator, context=x\)"):
        wrap(zuko_estimator())(torch.randn(2, THETA))


def test_estimators_without_a_flow_are_refused():
    class Bare(nn.Module):
        __module__ = "sbi.neural_nets.estimators.stand_in"

    with pytest.raises(TypeError, match="with a flow in its attribute net, got Bare"):
        wrap(Bare())
    with pytest.raises(TypeError, match="expected an Invertible"):
        wrap(StandIn(nn.Linear(2, 2), nn.Identity()))


@pytest.mark.library("sbi")
@pytest.mark.parametrize("kind", ["nsf", "maf", "zuko_nsf", "zuko_maf"])
def test_estimators_that_sbi_itself_trained(kind):
    import sbi.inference as sbi

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        generator = torch.Generator().manual_seed(0)
        theta = 4 * torch.rand(300, THETA, generator=generator) - 2
        x = torch.cat([theta, theta[:, :2] ** 2], 1) + 0.3 * torch.randn(
            300, X, generator=generator
        )
        prior = torch.distributions.Independent(
            torch.distributions.Uniform(-2 * torch.ones(THETA), 2 * torch.ones(THETA)), 1
        )
        net = sbi.posterior_nn if hasattr(sbi, "posterior_nn") else _posterior_nn()
        trainer = sbi.NPE(
            prior=prior, density_estimator=net(model=kind, hidden_features=16, num_transforms=2)
        )
        estimator = trainer.append_simulations(theta, x).train(max_num_epochs=3)
        posterior = trainer.build_posterior(estimator)
        own = estimator.log_prob(theta[:8].unsqueeze(0), x[:8])[0]
        for model in (estimator, posterior):
            torch.testing.assert_close(wrap(model, context=x[:8]).log_prob(theta[:8]), own)
        report = ig.audit(posterior, theta[:32], context=x[:32], level="quick")
        assert report["reconstruction"].values["max_error"] < 1e-2
    finally:
        torch.set_default_dtype(before)


def _posterior_nn():
    from sbi.neural_nets import posterior_nn

    return posterior_nn

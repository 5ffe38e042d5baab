"""NIF against torch's MultivariateNormal, numerical integrals and its own limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

import inn_guard as ig
from inn_guard.core.invertible import NotApplicable, standard_normal_log_prob
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.permutation import Permutation
from inn_guard.models.nif.model import NIF, GaussianNIF
from inn_guard.models.nif.widening import DenseWidening, NearestUpsampling
from tests.cases.trials import first
from tests.oracles import transforms as reference


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randomized(module, scale=0.5):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator(7)))
    return module


def dense():
    return randomized(GaussianNIF(DenseWidening(2, 5), (5,))), torch.randn(6, 5), (2,)


def upsampling():
    return (
        randomized(GaussianNIF(NearestUpsampling(), (2, 4, 4))),
        torch.randn(3, 2, 4, 4),
        (2, 2, 2),
    )


CASES = pytest.mark.parametrize("make", [dense, upsampling])


def matrix(layer, latent):
    """A as a D x d matrix, column by column."""
    size = math.prod(latent)
    return layer.widening(torch.eye(size).reshape(size, *latent)).flatten(1).T


def parts(layer, latent):
    return matrix(layer, latent), layer.log_variance.exp().flatten().diag(), layer.bias.flatten()


@CASES
def test_the_closed_form_is_the_marginal_gaussian(make):
    layer, x, latent = make()
    a, sigma, b = parts(layer, latent)
    expected = MultivariateNormal(b, sigma + a @ a.T).log_prob(x.flatten(1))
    assert torch.allclose(layer.log_prob(x), expected, rtol=1e-10)


@CASES
def test_the_stochastic_inverse_is_the_normalised_likelihood(make):
    """ln p(x|z) = ln q(z|x) + manifold term for every z, which defines the two."""
    layer, x, latent = make()
    a, sigma, _ = parts(layer, latent)
    z = torch.randn(len(x), *latent)
    likelihood = MultivariateNormal(layer.inverse(z).flatten(1), sigma).log_prob(x.flatten(1))
    posterior = MultivariateNormal(layer(x).flatten(1), precision_matrix=a.T @ sigma.inverse() @ a)
    assert torch.allclose(
        likelihood, posterior.log_prob(z.flatten(1)) + layer.manifold_term(x), rtol=1e-9
    )


def test_the_manifold_term_is_the_integral_of_the_likelihood():
    layer = randomized(GaussianNIF(DenseWidening(1, 3), (3,)))
    x = torch.randn(2, 3)
    grid = torch.linspace(-60, 60, 200001)[:, None]
    means = layer.inverse(grid)
    for row, term in zip(x, layer.manifold_term(x), strict=True):
        density = MultivariateNormal(means, layer.log_variance.exp().diag()).log_prob(row).exp()
        assert torch.trapezoid(density, grid[:, 0]).log().item() == pytest.approx(
            term.item(), rel=1e-6
        )


@CASES
def test_posterior_samples_have_the_posterior_s_mean_and_covariance(make):
    layer, x, latent = make()
    a, sigma, _ = parts(layer, latent)
    many = x[:1].expand(100_000, *x.shape[1:])
    z = layer.posterior_sample(many, generator=generator()).flatten(1).detach()
    covariance = (a.T @ sigma.inverse() @ a).inverse()
    spread = covariance.diag().sqrt()
    assert ((z.mean(0) - layer(x[:1]).flatten()).abs() / spread).max() < 5 / math.sqrt(len(z))
    assert torch.allclose(z.T.cov(), covariance, atol=0.03 * covariance.abs().max().item())


@pytest.mark.parametrize("make", first(1, [dense, upsampling]))
def test_the_bound_lies_below_the_closed_form_by_the_divergence(make):
    layer, x, latent = make()
    a, sigma, _ = parts(layer, latent)
    gram = a.T @ sigma.inverse() @ a
    bound = layer.bound(x, standard_normal_log_prob, generator=generator(), samples=4000)
    mu = layer(x).flatten(1)
    expected = -0.5 * (
        mu.square().sum(1) + gram.inverse().trace() + mu.shape[1] * math.log(2 * math.pi)
    )
    assert torch.allclose(bound, expected + layer.manifold_term(x), atol=0.3)
    assert (bound < layer.log_prob(x)).all()


@CASES
def test_it_is_injective_and_embeds_by_the_weighted_pseudo_inverse(make):
    layer, x, latent = make()
    a, sigma, b = parts(layer, latent)
    z = torch.randn(4, *latent)
    assert torch.allclose(layer(layer.inverse(z)), z, atol=1e-10)
    precision = sigma.inverse()
    mu = (x.flatten(1) - b) @ precision @ a @ (a.T @ precision @ a).inverse()
    assert torch.allclose(layer(x).flatten(1), mu, atol=1e-10)
    once = layer.inverse(layer(x))
    assert torch.allclose(layer.inverse(layer(once)), once, atol=1e-10)


@CASES
def test_without_noise_samples_lie_on_the_manifold(make):
    layer, _, latent = make()
    z = torch.randn(5, *latent)
    still = layer.sample_given(z, noise=0.0, generator=generator())
    assert torch.equal(still, layer.inverse(z))
    distances = [
        (layer.sample_given(z, noise=s, generator=generator()) - layer.inverse(z)).norm().item()
        for s in (1e-4, 1e-2, 1.0)
    ]
    assert distances[1] == pytest.approx(10 * distances[0])
    assert distances[2] == pytest.approx(100 * distances[0])


def flow(dim, seed):
    torch.manual_seed(seed)
    couplings = [AffineCoupling(MLP([dim - dim // 2, 16, 2 * (dim // 2)])) for _ in range(3)]
    return Chain(
        *(layer for c in couplings for layer in (c, Permutation(torch.randperm(dim)))),
        Diagonal(dim),
    )


@pytest.mark.thorough
def test_a_flow_with_a_nif_prior_integrates_to_one():
    """In one latent and two data dimensions exp(log_prob) over a fine grid sums to 1."""
    model = NIF(
        randomized(flow(2, 0), 0.1), randomized(GaussianNIF(DenseWidening(1, 2), (2,)), 0.2)
    )
    axis = torch.linspace(-25, 25, 1501)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = model.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=2e-3)


def test_a_deep_nif_has_a_bound_and_says_why_no_density():
    model = NIF(flow(5, 0), dense()[0], inner=flow(2, 1))
    x = torch.randn(4, 5)
    with pytest.raises(NotApplicable, match="bound"):
        model.log_prob(x)
    assert model.bound(x, generator=generator()).shape == (4,)
    z = torch.randn(4, 2)
    assert torch.allclose(model(model.inverse(z)), z, atol=1e-9)


def test_the_deep_bound_with_the_identity_inside_is_the_plain_bound():
    prior, x = dense()[0], torch.randn(4, 5)
    plain = NIF(flow(5, 0), prior)
    deep = NIF(flow(5, 0), prior, inner=Diagonal(2))
    assert torch.allclose(
        plain.bound(x, generator=generator()), deep.bound(x, generator=generator())
    )


def test_training_follows_the_gradient_of_the_closed_form():
    model = NIF(flow(5, 0), dense()[0])
    x = torch.randn(64, 5)
    before = model.log_prob(x).mean()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        (-model.log_prob(x).mean()).backward()
        optimizer.step()
    assert model.log_prob(x).mean() > before + 0.1


def test_dimensions_that_do_not_widen_are_refused():
    with pytest.raises(ValueError, match="0 < d < D"):
        DenseWidening(5, 5)
    with pytest.raises(ValueError, match="factor"):
        NearestUpsampling(0)


def audited():
    """A NIF of two latent dimensions in five, and samples around its manifold."""
    return NIF(flow(5, 0), dense()[0]).eval(), torch.randn(6, 5, generator=generator(4))


def test_the_audited_spectrum_is_that_of_the_dense_encoder_and_decoder():
    model, x = audited()
    values = ig.audit(model, x, checks=["jacobian_spectrum"])["jacobian_spectrum"].values
    decoder = torch.func.vmap(torch.func.jacrev(lambda z: model.inverse(z[None])[0]))(
        model(x).detach()
    )
    for side, J in (("encoder", reference.jacobian(model, x)), ("decoder", decoder)):
        sigma = torch.linalg.svdvals(J)
        assert sigma.shape == (6, 2)
        assert values[f"{side}_sigma_max"] == pytest.approx(sigma.max().item(), rel=1e-9)
        assert values[f"{side}_sigma_min"] == pytest.approx(sigma.min().item(), rel=1e-9)
        assert values[f"{side}_condition_number"] == pytest.approx(
            (sigma[:, 0] / sigma[:, 1]).max().item(), rel=1e-9
        )


def test_the_audited_round_trip_is_that_on_the_manifold_and_the_distance_from_it_is_told():
    model, x = audited()
    projected = model.inverse(model(x)).detach()
    off, on = (
        ig.audit(model, data, checks=["reconstruction"])["reconstruction"]
        for data in (x, projected)
    )
    assert off.verdict is on.verdict is ig.Verdict.STABLE
    assert off.values["latent_error"] < 1e-12
    assert off.values["l2_error"] == pytest.approx((x - projected).norm(dim=1).max().item())
    assert off.values["l2_error"] > 1
    assert on.values["l2_error"] < 1e-12


@pytest.mark.thorough
def test_audits_of_square_maps_say_why_they_do_not_apply():
    model, x = audited()
    reasons = {
        "log_det": "no log-determinant",
        "layer_blame": "injective only",
        "dequantization_attack": "projection",
    }
    report = ig.audit(model, x, checks=list(reasons))
    for name, reason in reasons.items():
        assert report[name].verdict is ig.Verdict.NOT_APPLICABLE
        assert reason in report[name].reason


def test_without_a_rule_for_the_gaussian_layer_bounds_are_infinite_and_witnesses_still_hold():
    model, x = audited()
    x = x[:4]  # as many as are looked at however little time there is
    bounds = ig.lipschitz_bounds(
        model, ig.Box(-3 * torch.ones(5), 3 * torch.ones(5)), data=x, seconds=0.1
    )
    assert bounds.forward == bounds.inverse == math.inf
    assert "GaussianNIF" in bounds.reason
    assert bounds.lower_forward >= torch.linalg.matrix_norm(
        reference.jacobian(model, x), 2
    ).max().item() * (1 - 1e-8)
    assert bounds.witnesses[0].replay(model) == pytest.approx(bounds.lower_forward, rel=1e-8)
    assert bounds.lower_inverse == 0


@pytest.mark.thorough
def test_audits_find_latents_that_share_a_direction():
    model, x = audited()
    with torch.no_grad():
        columns = model.prior.widening.weight
        columns[:, 1] = columns[:, 0] + 1e-7 * columns[:, 1]
    report = ig.audit(model, x, checks=["reconstruction", "jacobian_spectrum"])
    assert report.verdict is ig.Verdict.UNSTABLE
    assert report["jacobian_spectrum"].values["decoder_condition_number"] > 1e7

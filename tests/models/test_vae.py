"""The VAE's bound and posterior in closed form; the denoising autoencoder."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from inn_guard.models.aef.flow import no_flow
from inn_guard.models.aef.model import LinearAEF
from inn_guard.models.aef.vae import VAE, DenoisingAutoencoder
from tests.cases.aef import SMALL
from tests.cases.case import randomize
from tests.models.test_aef import SHAPE, gaussian, generator, marginal
from tests.oracles import transforms as reference


def test_the_elbo_of_a_linear_model_is_its_closed_form():
    """E_q log N(y; F z + b, sigma^2) - KL(N(g_m, g_s^2) | N(0, I)) + log|dy/dx|."""
    model = gaussian(VAE, core_encoder=no_flow, prior=no_flow)
    x = torch.randn(5, *SHAPE)
    y, log_det = model.preprocessed(x)
    encoding, sigma = model.flow.encoding(y), model.flow.sigma()
    q = Normal(encoding.shift, encoding.scale)
    factor = reference.jacobian(model.flow.decode, torch.zeros(1, 2))[0]
    residual = y - model.flow.decode(q.mean)
    explained = ((factor.square() / sigma[:, None].square()) @ q.variance.T).sum(0)
    reconstruction = Normal(0, sigma).log_prob(residual).sum(1) - 0.5 * explained
    prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    exact = reconstruction - kl_divergence(Independent(q, 1), prior) + log_det
    draws = model.elbo(x.repeat(4000, 1, 1, 1), generator=generator()).detach().reshape(4000, 5)
    error = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - exact).abs() < 5 * error).all())


def test_the_elbo_is_below_the_likelihood_and_equal_to_it_at_the_true_posterior():
    model = gaussian(VAE, core_encoder=no_flow, prior=no_flow)
    x = torch.randn(6, *SHAPE)
    exact = marginal(model).log_prob(x.flatten(1))
    bound = (
        model.elbo(x.repeat(2000, 1, 1, 1), generator=generator()).detach().reshape(2000, 6).mean(0)
    )
    assert bool((bound < exact).all())
    # with one latent per pixel the posterior is diagonal, and an encoder can match it
    flow, encoder = model.flow, model.flow.steps[0].network[1]
    with torch.no_grad():
        decoder = flow.steps[1].network.network[0][0]
        decoder.weight.zero_()
        decoder.weight[0, 0] = decoder.weight[1, 1] = 2.0
        precision = 1 + 4 / flow.sigma()[:2].square()
        gain = 2 / flow.sigma()[:2].square() / precision
        encoder.mean.weight.zero_()
        encoder.mean.weight[0, 0], encoder.mean.weight[1, 1] = gain
        encoder.mean.bias.copy_(-gain * decoder.bias[:2])
        encoder.raw.copy_(precision.rsqrt().expm1().log())
    tight = model.elbo(x, generator=generator())
    assert torch.allclose(tight, marginal(model).log_prob(x.flatten(1)), rtol=1e-9)


def test_the_posterior_density_is_that_of_its_samples():
    """log q(z | x) = log N(w) - log|dz/dw| with the flow n^-1 in between, by autograd."""
    model = VAE(SMALL)
    randomize(model, 0.1)
    model.eval()
    x, w = torch.rand(3, *SMALL.shape), torch.randn(3, SMALL.latent, generator=generator(11))
    shell, log_det = model.preprocessed(x)
    flow = model.flow
    z = flow.encode(torch.cat([shell, w], 1))
    J = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda v, b=b: flow.encode(torch.cat([shell[b : b + 1], v[None]], 1))[0], w[b]
            )
            for b in range(3)
        ]
    )
    normal = MultivariateNormal(torch.zeros(SMALL.latent), torch.eye(SMALL.latent))
    log_q = normal.log_prob(w) - torch.linalg.slogdet(J).logabsdet
    u = z
    prior = 0.0
    for step in flow.steps[flow._before + 3 :]:
        u, part = step.forward_and_log_det(u)
        prior = prior + part
    prior = prior + normal.log_prob(u)
    likelihood = Normal(flow.decode(z), flow.sigma()).log_prob(shell).sum(1)
    elbo = model.elbo(x, generator=generator(11))
    assert torch.allclose(elbo, likelihood + prior - log_q + log_det, rtol=1e-10)


def test_linear_aef_and_vae_differ_in_the_features_only():
    names = [{name for name, _ in make(SMALL).named_parameters()} for make in (LinearAEF, VAE)]
    assert names[0] - names[1] == {"features.weight", "features.bias"}
    assert not names[1] - names[0]


def test_reconstructions_use_the_middle_of_the_noise():
    model = VAE(SMALL).eval()
    x = torch.rand(3, *SMALL.shape)
    shell, _ = model.preprocessed(x)
    z = model.flow.encode(torch.cat([shell, torch.zeros(3, SMALL.latent)], 1))
    assert torch.equal(model.reconstruct(x), model.decode(z))


def test_the_denoising_autoencoder_is_a_least_squares_fit_of_the_same_nets():
    model, vae = DenoisingAutoencoder(SMALL), VAE(SMALL)
    count = sum(p.numel() for p in model.encoder.parameters())
    assert count == sum(p.numel() for p in vae.flow.steps[vae.flow._before].network.parameters())
    x = torch.rand(4, *SMALL.shape)
    reconstruction = model.decode(model.encode(x))
    assert model.loss(x, generator=generator()).item() == pytest.approx(
        nn.functional.mse_loss(reconstruction, x).item()
    )
    assert model.encode(x).shape == (4, SMALL.latent)
    assert float(reconstruction.min()) >= -0.06  # what the logit's alpha leaves room for
    model.loss(x, generator=generator()).backward()
    assert all(p.grad is not None for p in model.parameters())

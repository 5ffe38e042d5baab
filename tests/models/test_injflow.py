"""InjFlow: every term in closed form on linear maps, density bounds, both derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

import inn_guard as ig
from inn_guard.audits import AUDITS
from inn_guard.lipschitz import lipschitz_bounds
from inn_guard.models.autoencoder import (
    Autoencoder,
    decoder_jacobian,
    finite_difference,
    forward_mode,
    manifold_density,
)
from inn_guard.models.injflow import objectives as terms
from inn_guard.models.injflow.networks import conv_decoder, conv_encoder
from inn_guard.numerics.intervals import Box
from inn_guard.report.result import Verdict
from tests.cases.shortened import SHORTENED
from tests.cases.trials import first


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(latent=3, data=6, *, stochastic=False):
    torch.manual_seed(0)
    return Autoencoder(
        nn.Linear(data, latent * (1 + stochastic)), nn.Linear(latent, data), stochastic=stochastic
    )


def curved(latent=2, data=7):
    torch.manual_seed(1)
    decoder = nn.Sequential(nn.Linear(latent, 16), nn.ELU(), nn.Linear(16, data))
    return Autoencoder(nn.Sequential(nn.Linear(data, 16), nn.ELU(), nn.Linear(16, latent)), decoder)


def step(model, x, iteration=0, **settings):
    return terms.Step(model, x, iteration=iteration, generator=generator(), **settings)


def test_the_mean_of_the_stretch_is_the_squared_frobenius_norm():
    model = linear()
    x = torch.randn(1, 6).expand(200_000, 6)
    stretch = step(model, x).stretch
    expected = model.decoder.weight.square().sum()
    assert abs(stretch.mean() - expected) < 5 * stretch.std() / math.sqrt(len(stretch))


@pytest.mark.parametrize("derivative", [forward_mode, finite_difference])
def test_both_derivatives_are_exact_on_a_linear_decoder_and_close_on_a_curved_one(derivative):
    for model, tolerance in ((linear(), 1e-10), (curved(), 0.05)):
        z = model(torch.randn(5, 6 if isinstance(model.decoder, nn.Linear) else 7)).detach()
        v = torch.randn_like(z)
        expected = torch.einsum("bij,bj->bi", decoder_jacobian(model, z), v)
        got = derivative(model.inverse, z, v, model.inverse(z))
        assert torch.allclose(got, expected, atol=tolerance)


def test_the_jacobian_is_autograd_s():
    model, z = curved(), torch.randn(4, 2)
    expected = torch.stack([torch.autograd.functional.jacobian(model.decoder, row) for row in z])
    assert torch.allclose(decoder_jacobian(model, z), expected)


def test_the_exact_density_of_a_linear_decoder_is_the_gaussian_on_its_image():
    """In an orthonormal basis of the image, g(z) - b is N(0, R R^T) with A = Q R."""
    model, z = linear(), torch.randn(5, 3)
    q, r = torch.linalg.qr(model.decoder.weight.detach())
    on_image = (model.inverse(z) - model.decoder.bias) @ q
    expected = MultivariateNormal(torch.zeros(3), 4 * r @ r.T).log_prob(on_image)
    assert torch.allclose(manifold_density(model, z, sigma=2.0).exact, expected)


@pytest.mark.parametrize("trade", [0.1, 1.0, 10.0])
def test_the_bounds_lie_below_the_density_and_the_logarithmic_one_is_the_best(trade):
    model, z = curved(), 3 * torch.randn(200, 2)
    density = manifold_density(model, z, trade=trade)
    assert (density.log_bound <= density.exact + 1e-12).all()
    assert (density.linear_bound <= density.log_bound + 1e-12).all()


def test_the_bounds_are_tight_where_all_singular_values_are_equal():
    model = linear()
    with torch.no_grad():
        model.decoder.weight.copy_(1.7 * torch.linalg.qr(model.decoder.weight).Q)
    density = manifold_density(model, torch.randn(3, 3), trade=1.7**2)
    assert torch.allclose(density.exact, density.log_bound)
    assert torch.allclose(density.exact, density.linear_bound)
    assert torch.allclose(density.smallest_singular_value, torch.tensor(1.7))


def test_the_terms_are_the_equation_s_written_out():
    model, x = curved(), torch.randn(8, 7)
    s = step(model, x, iteration=500)
    z, v = model(x), s.v
    jv = torch.einsum("bij,bj->bi", decoder_jacobian(model, z), v)
    square, size = jv.square().sum(1), v.square().sum(1)
    eta, mu, d = 0.4, 1 + 500 * 1.3 / 1000, 2
    floored = torch.maximum(square, eta**2 * size)
    expected = {
        terms.Reconstruction(terms.growing(1.3)): mu * (x - model.inverse(z)).square().sum(1),
        terms.CodeNorm(0.3): 0.3 * z.square().sum(1),
        terms.LogVolume(eta): d / 2 * floored.log(),
        terms.LinearVolume(2.0, eta): floored / 4,
        terms.Injectivity(terms.growing(1.3), eta): mu
        * (square.sqrt() / size.sqrt() - eta).clamp(max=0) ** 2,
    }
    for term, value in expected.items():
        assert torch.allclose(term(s), value), term


def test_the_hinge_raises_small_singular_values_and_leaves_large_ones():
    torch.manual_seed(0)
    model, x = linear(), torch.randn(64, 6)
    with torch.no_grad():
        model.decoder.weight.mul_(0.05)
    objective = terms.Objective((terms.Injectivity(),))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for i in range(200):
        optimizer.zero_grad()
        objective(model, x, iteration=i, generator=generator(i)).backward()
        optimizer.step()
    assert torch.linalg.svdvals(model.decoder.weight).min() > 0.05
    loss = objective(model, x, iteration=0, generator=generator(999))
    with torch.no_grad():
        model.decoder.weight.mul_(10)
    assert objective(model, x, iteration=0, generator=generator(999)) <= loss


def test_the_contractive_term_s_mean_is_the_encoder_s_squared_norm():
    model = linear()
    s = step(model, torch.randn(100_000, 6))
    value = terms.EncoderJacobian(1.0)(s)
    assert abs(value.mean() - model.encoder.weight.square().sum()) < 5 * value.std() / math.sqrt(
        len(value)
    )
    value.mean().backward()
    assert model.encoder.weight.grad is not None


def test_the_divergence_is_torch_s_and_needs_a_stochastic_encoder():
    model, x = linear(stochastic=True), torch.randn(5, 6)
    mean, log_variance = model.code(x)
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum(1)
    assert torch.allclose(terms.CodeDivergence(1.0)(step(model, x)), expected)
    with pytest.raises(TypeError, match="stochastic=True"):
        terms.CodeDivergence()(step(linear(), x))


@pytest.mark.parametrize("make", first(1, [terms.injflow_log, terms.injflow_linear]))
def test_training_lowers_the_reconstruction_error_and_keeps_the_decoder_injective(make):
    model = curved()
    x = 5 * curved().decoder(torch.randn(256, 2)).detach()
    objective = make(1e-3)
    before = (x - model.inverse(model(x))).square().mean()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for i in range(300):
        optimizer.zero_grad()
        objective(model, x, iteration=i, generator=generator(i)).backward()
        optimizer.step()
    assert (x - model.inverse(model(x))).square().mean() < before / 4
    with torch.no_grad():
        assert manifold_density(model, model(x)).smallest_singular_value.min() > 0.05


def test_spectral_normalisation_bounds_the_decoder():
    torch.manual_seed(0)
    decoder = terms.spectrally_normalised(nn.Sequential(nn.Linear(3, 8), nn.ELU(), nn.Linear(8, 6)))
    for _ in range(50):
        decoder(torch.randn(4, 3))
    decoder.eval()
    for layer in (decoder[0], decoder[2]):
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=1e-3)


def convolutional():
    torch.manual_seed(2)
    shape = (1, 8, 8)
    return Autoencoder(
        conv_encoder(shape, 3, width=4), conv_decoder(shape, 3, width=4)
    ).eval(), torch.rand(5, *shape)


@pytest.mark.parametrize(
    "make",
    first(1, [lambda: (curved().eval(), torch.rand(5, 7)), convolutional]),
    ids=["vectors", "images"],
)
def test_bounds_of_encoder_and_decoder_hold_for_thousands_of_sampled_ratios(make):
    model, x = make()
    box = Box(torch.zeros_like(x[0]), torch.ones_like(x[0]))
    bounds = lipschitz_bounds(model, box, seconds=5.0)
    assert bounds.reason == ""
    a, b = (torch.rand(2000, *x.shape[1:]) for _ in range(2))
    with torch.no_grad():
        z, w = model(a), model(b)
        ahead = (z - w).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
        back = (model.inverse(z) - model.inverse(w)).flatten(1).norm(dim=1) / (z - w).norm(dim=1)
    assert ahead.max() <= bounds.forward < 1e4
    assert back.max() <= bounds.inverse < 1e4
    assert bounds.lower_forward <= bounds.forward
    assert bounds.lower_inverse == 0


def test_bounds_of_linear_encoder_and_decoder_are_their_norms():
    model = linear().eval()
    bounds = lipschitz_bounds(model, Box.everywhere((6,)), seconds=5.0)
    assert bounds.forward == pytest.approx(
        torch.linalg.matrix_norm(model.encoder.weight, 2).item(), rel=1e-9
    )
    assert bounds.inverse == pytest.approx(
        torch.linalg.matrix_norm(model.decoder.weight, 2).item(), rel=1e-9
    )
    assert bounds.scope == "global"


@pytest.mark.thorough
def test_every_audit_answers_or_says_why_not():
    """Log-determinants and memory saving need a bijection; other checks measure."""
    model, x = convolutional()
    few = {"rare_event_sampling": SHORTENED["rare_event_sampling"]}
    checks = list((AUDITS | few).values())
    report = ig.audit(model, x, checks=checks, loss=lambda z: z.square().sum())
    verdicts = {result.name: result for result in report.results}
    absent = {
        "density",
        "log_det",
        "layer_blame",
        "gradient_angle",
        "dequantization_attack",
        "shadowing",
    }
    assert {
        name for name, result in verdicts.items() if result.verdict is Verdict.NOT_APPLICABLE
    } == absent
    assert all(verdicts[name].reason for name in absent)
    assert verdicts["reconstruction"].verdict is Verdict.UNSTABLE  # not trained: h does not undo g
    values = verdicts["jacobian_spectrum"].values
    density = manifold_density(model, model(x).detach())
    assert values["decoder_sigma_min"] == pytest.approx(
        density.smallest_singular_value.min().item(), rel=1e-6
    )
    assert ig.FiniteDifferences(1e-3)(model, x).item() > 0
    with pytest.raises(ig.NotApplicable, match="log-determinant"):
        ig.NormalizingFlowLoss(1e-3)(model, x)

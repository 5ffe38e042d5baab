"""The AEF experiments run in their smallest setting, and their data is split as they say."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.aef import against_vae, denoising
from benchmarks.aef.drawing import draw
from benchmarks.aef.laplace import Posterior, laplace_log_prob
from benchmarks.common.quantized_images import quantized_digits
from benchmarks.common.runner import preset
from inn_guard.layers.autoregressive import maf
from inn_guard.models.aef.flow import AutoencoderConfig, no_flow
from inn_guard.models.aef.model import LinearAEF
from inn_guard.models.aef.networks import AutoencoderNets, small_nets
from inn_guard.models.aef.vae import VAE


@pytest.fixture(autouse=True)
def _as_at_home(_float64, tmp_path, monkeypatch):
    """float32, and a folder of its own for what a run leaves behind."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)


def test_digits_are_split_without_overlap_and_keep_their_grey_values():
    data = quantized_digits()
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1200, 147, 450]
    assert int(data.train.max()) == data.levels - 1 == 16
    assert torch.equal(data.train, quantized_digits().train)
    assert not torch.equal(data.train, quantized_digits(seed=1).train)


@pytest.mark.thorough
def test_against_vae_measures_every_model_and_draws():
    config = preset(against_vae, "smoke")
    frame = against_vae.run(config)
    assert list(frame["model"]) == list(config.models)
    assert frame["bpd"].map(math.isfinite).all()
    assert (frame["bpd"] <= frame["bpd_upper"] + 1e-9).all()
    assert frame["parameters"].nunique() > 1
    assert not frame["features"].str.contains("FID").any()
    assert len(draw(frame).findobj()) > 100


def linear_nets(shape, latent):
    """An encoder and a decoder without any kink."""
    decoder = nn.Sequential(nn.Linear(latent, math.prod(shape)), nn.Unflatten(1, shape))
    return AutoencoderNets(
        nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2 * latent)), decoder
    )


@pytest.mark.parametrize("make", [VAE, LinearAEF])
def test_the_proposal_at_the_mode_meets_the_posterior_of_a_linear_decoder(make):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    recipe = AutoencoderConfig(
        (1, 2, 3),
        2,
        nets=linear_nets,
        core_encoder=no_flow,
        prior=no_flow,
        preprocessing=lambda _: [],
    )
    model = make(recipe).eval()
    x, generator = torch.randn(5, 1, 2, 3), torch.Generator().manual_seed(1)
    estimate = laplace_log_prob(
        model, x, draws=4096, repetitions=1, generator=generator, widths=(1.0,)
    )
    bias = model.flow.decode(torch.zeros(1, 2))[0]
    matrix = (model.flow.decode(torch.eye(2)) - bias).mT
    covariance = matrix @ matrix.mT + model.flow.sigma().square().diag()
    exact = torch.distributions.MultivariateNormal(bias, covariance).log_prob(x.flatten(1))
    assert torch.allclose(estimate.log_prob, exact, atol=0.02)
    assert (estimate.effective_draws > 4096 * 0.8).all()


def test_the_proposal_at_the_mode_gives_the_integral_over_a_grid():
    torch.manual_seed(0)
    flow = partial(maf, hidden=8, layers=2)
    nets = partial(small_nets, channels=(4, 4))
    model = LinearAEF(
        AutoencoderConfig((1, 4, 4), 2, nets=nets, core_encoder=flow, prior=flow)
    ).eval()
    x, generator = torch.rand(4, 1, 4, 4), torch.Generator().manual_seed(1)
    estimate = laplace_log_prob(model, x, draws=2048, repetitions=4, generator=generator)
    side = torch.linspace(-12, 12, 301)
    grid = torch.cartesian_prod(side, side).expand(len(x), -1, -1)
    whole = Posterior(model, x).of_draws(grid).logsumexp(1) + 2 * (side[1] - side[0]).log()
    assert torch.allclose(estimate.log_prob, whole.double(), atol=0.05)
    assert (estimate.effective_draws > 500).all()


def test_denoising_measures_every_model_and_draws():
    config = preset(denoising, "smoke")
    frame = denoising.run(config)
    assert list(frame["model"]) == list(config.models)
    assert frame["pixel_mse_of_noisy"].nunique() == 1
    assert len(denoising.draw(frame).axes) == len(config.models)

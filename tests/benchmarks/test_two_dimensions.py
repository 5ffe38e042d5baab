"""The two-dimensional experiments and FlowGAN's adversary, where the answer is known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from benchmarks.common.runner import preset
from benchmarks.exploding_inverses import checkerboard, flowgan, toy_regression
from benchmarks.exploding_inverses.gan import discriminator, gradient_penalty
from benchmarks.exploding_inverses.stability import round_trip_error, singular_values
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.models.toy import regression_net


def test_singular_values_are_those_of_the_dense_jacobian():
    net = regression_net(blocks=3, hidden=8).eval()
    x = torch.randn(5, 2)
    net(x)
    largest, smallest = singular_values(net, x)
    for k in range(5):
        dense = torch.autograd.functional.jacobian(lambda row: net(row[None])[0], x[k])
        expected = torch.linalg.svdvals(dense)
        torch.testing.assert_close(
            torch.stack([largest[k], smallest[k]]), expected, rtol=1e-9, atol=0
        )


def test_a_flattened_direction_is_a_zero_singular_value_and_an_infinite_error():
    flat = Diagonal(2)
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.copy_(torch.tensor([0.0, -800.0]))
    x = torch.ones(3, 2)
    largest, smallest = singular_values(Chain(flat), x)
    assert smallest.max() == 0 < largest.min()
    assert round_trip_error(Chain(flat), x).tolist() == [math.inf] * 3


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_what_is_lost_is_infinite_and_not_the_largest_number(lost):
    class Lost(Chain):
        def inverse(self, z):
            return torch.full_like(z, lost)

    assert round_trip_error(Lost(Diagonal(2)), torch.ones(1, 2)).tolist() == [math.inf]
    assert flowgan.finite_or_inf(torch.tensor(lost)) == math.inf


def test_the_regression_is_onto_a_line():
    config = dataclasses.replace(preset(toy_regression, "smoke"), samples=4000)
    x, y = toy_regression.data(config)
    assert x.T.cov().allclose(torch.eye(2), atol=0.1)
    assert y[:, 0].abs().max() < 1e-11
    assert torch.equal(x[:, 1], y[:, 1])


def test_evaluations_begin_at_the_first_and_end_at_the_last_step():
    config = toy_regression.Config()
    evaluated = toy_regression.evaluation_steps(config)
    assert (min(evaluated), max(evaluated)) == (1, config.steps)


def test_a_loss_that_is_not_finite_ends_a_regression_with_a_row():
    config = dataclasses.replace(preset(toy_regression, "smoke"), learning_rate=1e30, steps=50)
    rows = list(toy_regression.measure(config, 0.0))
    assert not math.isfinite(rows[-1]["mse"])
    assert rows[-1]["step"] < 50


@pytest.mark.thorough
def test_certified_bounds_enclose_the_grid_within_the_box():
    config = dataclasses.replace(preset(checkerboard, "smoke"), extent=4.0, points=9)
    frame = checkerboard.run(config)
    for _, group in frame.groupby("net"):
        grid, certified = group[group.place == "grid"], group[group.place == "certified"].iloc[0]
        witnessed = group[group.place == "witnessed"].iloc[0]
        assert len(grid) == 81
        assert grid.sigma_max.max() <= certified.sigma_max * (1 + 1e-5)
        assert grid.sigma_min.min() >= certified.sigma_min * (1 - 1e-5)
        assert witnessed.sigma_max <= certified.sigma_max
        assert witnessed.sigma_min >= certified.sigma_min


def test_the_gradient_penalty_of_a_linear_critic():
    weight = torch.tensor([3.0, 4.0])
    x = torch.randn(6, 2)
    found = gradient_penalty(
        lambda x: x @ weight, x, x + 1, generator=torch.Generator().manual_seed(0)
    )
    assert found.item() == pytest.approx(16.0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_the_discriminator_has_spectral_norm_one_in_every_layer(shape):
    net = discriminator(shape, (8, 8, 16, 16, 32, 32, 64))
    for _ in range(200):  # power iterations
        out = net(torch.randn(4, *shape))
    assert out.shape == (4,)
    layers = [layer for layer in net.eval() if hasattr(layer, "weight")]
    assert len(layers) == 8
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
        assert norm.item() == pytest.approx(1.0, abs=1e-3)


def test_a_generator_whose_loss_is_not_finite_is_left_as_it_was_and_ends_with_a_row(monkeypatch):
    torch.set_default_dtype(torch.float32)
    config = dataclasses.replace(preset(flowgan, "smoke"), objectives=("mle",), steps=4, looks=2)
    players = flowgan.Players(config, flowgan.loaded(config)[0])
    before = [parameter.clone() for parameter in players.flow.parameters()]
    monkeypatch.setattr(
        type(players.flow), "log_prob", lambda self, x: torch.full((len(x),), math.nan)
    )
    assert not players.step(flowgan.objective(config, "mle"))
    assert all(map(torch.equal, before, players.flow.parameters()))
    rows = list(flowgan.measure(config, "mle"))
    assert [row["trained"] for row in rows] == [True, False]
    assert rows[-1]["bpd"] == math.inf

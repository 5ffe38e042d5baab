"""layer_blame: the culprit is named, digits are those of the formula, forecasts match what
happens.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inn_guard.adapters import wrap
from inn_guard.audits.layer_blame import digits_lost, layer_blame
from inn_guard.audits.round_trip import RoundTrip
from inn_guard.audits.thresholds import feature_scale
from inn_guard.jacobian.chain import Linearization
from inn_guard.layers.chain import Chain
from inn_guard.report.verdict import Verdict
from tests.cases.toys import Embedding, Linear, Warp, random_chain
from tests.oracles import jacobian as reference_jacobian


def rotation(seed: int, dimension: int = 6) -> Tensor:
    return torch.linalg.qr(
        torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(seed))
    ).Q


def rotations_with(bad: Linear, place: int, depth: int = 7) -> Chain:
    steps = [Linear(rotation(k)) for k in range(depth)]
    steps[place] = bad
    return Chain(*steps)


@pytest.mark.parametrize("place", [0, 3, 6])
def test_an_amplifying_layer_is_blamed_wherever_it_stands(place):
    squeeze = torch.diag(torch.logspace(0, -5, 6))
    model = rotations_with(Linear(rotation(9) @ squeeze @ rotation(8)), place)
    result = layer_blame(model, torch.randn(4, 6))
    assert max(result.per_layer, key=lambda row: row["share"])["index"] == place
    assert result.values["worst_share"] > 0.8
    assert f"layer {place} (Linear)" in result.settings["worst_layer"]
    assert result.per_layer[place]["log10_condition_number"] == pytest.approx(5, abs=0.1)


class Sloppy(Linear):
    """Well conditioned, with a wrong inverse."""

    def inverse(self, z: Tensor) -> Tensor:
        return super().inverse(z) + 1e-4 * torch.sin(1e5 * z).detach()


@pytest.mark.parametrize("place", [0, 4])
def test_an_inaccurate_layer_is_blamed_wherever_it_stands(place):
    result = layer_blame(rotations_with(Sloppy(rotation(9)), place), torch.randn(4, 6))
    assert max(result.per_layer, key=lambda row: row["share"])["index"] == place
    assert result.per_layer[place]["local_error"] > 1e-5


def test_equal_layers_share_the_blame_equally():
    squeeze = torch.diag(torch.logspace(0, -2, 6))
    model = Chain(*(Linear(rotation(k) @ squeeze @ rotation(10 + k)) for k in range(6)))
    shares = [row["share"] for row in layer_blame(model, torch.randn(2, 6)).per_layer]
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 2.5 / 6


def test_a_change_of_unit_costs_no_digits():
    x = torch.randn(2, 6)
    # a power of two leaves every rounding as it was
    plain, result = (
        layer_blame(Chain(*(Linear(c * rotation(k)) for k in range(5))), x)
        for c in (1.0, 2.0**-100)
    )
    assert result.verdict is Verdict.STABLE
    assert result.values["digits_lost"] == pytest.approx(plain.values["digits_lost"], abs=1e-6)
    gains = [row["log10_gain"] for row in plain.per_layer]
    assert [row["log10_gain"] for row in result.per_layer] == pytest.approx(gains, abs=1e-6)


def test_gains_are_those_of_the_dense_inverses():
    model, x = random_chain(depth=2, spread=2.0), torch.randn(1, 6)
    states = Linearization(model, x).states
    # the length of each, spread over its entries
    states = [state.square().mean().sqrt().expand_as(state) for state in states]
    sizes = reference_jacobian.sizes_of_errors(model, x, states, unit=feature_scale(x)[0])
    rows = layer_blame(model, x, probes=6).per_layer
    assert [row["log10_gain"] for row in rows] == pytest.approx(sizes[:-1, 0].log10().tolist())


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_the_expected_error_is_of_the_size_of_the_measured_one(dtype, seed):
    model = random_chain(depth=5, spread=1.5, seed=seed).to_dtype(dtype)
    x = torch.randn(6, 6).to(dtype)
    measured = RoundTrip(x, x, model.inverse(model(x))).by_feature.max().item()
    expected = layer_blame(model, x).values["expected_error"]
    assert measured / 30 < expected < 30 * measured


def test_digits_are_logarithms_of_errors_left_out():
    # two layers: contributions 3e-3 and 4e-3, the second one's passing through a growth of 10; base
    # 1e-7
    contribution = torch.tensor([[3e-3], [4e-3]]).log()
    amplification = torch.tensor([[10.0], [2.0]]).log()
    unavoidable = torch.tensor([[1e-6], [1e-2]]).log()
    lost = digits_lost(contribution, unavoidable, amplification, torch.tensor([1e-7]).log())
    total = math.hypot(3e-3, 4e-3)
    assert lost[0, 0].item() == pytest.approx(math.log10(total / math.hypot(1e-6, 4e-4)), abs=1e-6)
    assert lost[1, 0].item() == pytest.approx(0, abs=1e-6), (
        "a layer that errs no more than rounding is not to blame"
    )


def test_a_breaking_layer_is_a_finding():
    class Breaking(Warp):
        def inverse(self, z: Tensor) -> Tensor:
            return super().inverse(z) * torch.nan

    result = layer_blame(Chain(Warp(6), Breaking(6), Warp(6, seed=2)), torch.randn(3, 6))
    assert result.verdict is Verdict.NON_FINITE
    assert "layer 1 (Breaking)" in result.reason
    assert "layer 1" in result.settings["worst_layer"]


def test_chains_beyond_the_range_of_floats_are_blamed_too():
    def squeezing(k: int) -> Linear:
        return Linear(
            rotation(k)
            @ torch.diag(torch.logspace(0, -13 if k == 13 else -9, 6))
            @ rotation(90 + k)
        )

    model = Chain(*(squeezing(k) for k in range(40)))
    result = layer_blame(model, torch.randn(2, 6))
    assert result.verdict is Verdict.UNSTABLE
    assert max(result.per_layer, key=lambda row: row["share"])["index"] == 13
    assert result.values["log10_expected_error"] > 308 - 16


def test_perfect_layers_lose_nothing():
    result = layer_blame(Chain(Linear(torch.eye(4)), Linear(torch.eye(4))), torch.randn(2, 4))
    assert result.verdict is Verdict.STABLE
    assert result.values["digits_lost"] == pytest.approx(0, abs=0.01)


def test_an_injective_map_is_not_applicable():
    assert layer_blame(Embedding(6, 2), torch.randn(2, 6)).verdict is Verdict.NOT_APPLICABLE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_a_sample_of_zeros_is_held_to_the_size_of_its_neighbours(dtype, size):
    x = torch.cat([torch.randn(5, 6), size * torch.ones(1, 6)]).to(dtype)
    shifted = wrap(encode=lambda x: 2 * x + 1, decode=lambda z: (z - 1) / 2)
    assert layer_blame(shifted, x).verdict is Verdict.STABLE
    assert layer_blame(shifted, x[5:] * 0).verdict is Verdict.STABLE

"""reconstruction: closed forms, units, what rounding explains, wrong inverses, NaN by layer."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

import inn_guard.audits.reconstruction as reconstruction_check
from inn_guard.adapters import wrap
from inn_guard.audits.explained_rounding import explain
from inn_guard.audits.reconstruction import LINEAR, reconstruction
from inn_guard.audits.round_trip import RoundTrip
from inn_guard.audits.thresholds import data_scale, feature_scale, max_usable_error
from inn_guard.jacobian.chain import Linearization
from inn_guard.layers.chain import Chain
from inn_guard.layers.fixed_point import FixedPoint
from inn_guard.layers.residual import Residual
from inn_guard.layers.residual_log_det import ExactLogDet
from inn_guard.report.verdict import Verdict
from tests.cases.toys import Embedding, Linear, Warp, random_chain
from tests.oracles import transforms as reference


def data(batch: int = 6, dimension: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        batch, dimension, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ).to(dtype)


def rotated(condition: float, dimension: int = 6) -> Linear:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(dimension, dimension, generator=generator)).Q for _ in range(2)
    )
    return Linear(left @ torch.diag(torch.logspace(0, -math.log10(condition), dimension)) @ right)


class Offset(Linear):
    """The inverse is off by a fixed relative amount."""

    def __init__(self, by: float) -> None:
        super().__init__(torch.eye(6))
        self.by = by

    def inverse(self, z: Tensor) -> Tensor:
        return super().inverse(z) * (1 + self.by)


class Grid(Linear):
    """An inverse known to a grid only, as bisection leaves it."""

    def __init__(self, step: float) -> None:
        super().__init__(2 * torch.eye(6))
        self.step = step

    def inverse(self, z: Tensor) -> Tensor:
        x = super().inverse(z)
        return x + ((x / self.step).round() * self.step - x).detach()


class Breaking(Warp):
    """NaN comes out of its inverse."""

    def inverse(self, z: Tensor) -> Tensor:
        return super().inverse(z) * torch.nan


def test_errors_are_those_one_would_type():
    model, x = rotated(1e6), data()
    result = reconstruction(model, x)
    torch.testing.assert_close(result.per_sample["l2_error"], reference.round_trip(model, x))
    back = model.inverse(model(x)).detach()
    torch.testing.assert_close(result.per_sample["max_error"], (back - x).abs().amax(1))
    assert result.values["max_error"] == result.per_sample["max_error"].max()
    unit = torch.maximum(x.square().mean(0).sqrt(), x.abs())  # fewer than 8 values: no deviation
    error = ((back - x).abs() / unit).max().item()
    assert result.values["relative_error"] == pytest.approx(error)
    assert result.uses["reconstruction"].figure == result.values["relative_error"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_good_inverses_are_stable(dtype, condition):
    result = reconstruction(rotated(condition).to_dtype(dtype), data(dtype=dtype))
    assert result.verdict is Verdict.STABLE, result.reason
    assert "condition number" not in result.reason
    finding = result.uses["reconstruction"]
    assert (finding.samples, finding.of, finding.limit) == (6, 6, 0.01)


def test_the_same_net_is_unusable_in_float32_and_stable_in_float64():
    model = rotated(1e7)
    single = reconstruction(model.to_dtype(torch.float32), data(dtype=torch.float32))
    assert single.verdict is Verdict.UNSTABLE
    assert single.values["relative_error"] > 0.01
    assert single.settings["cause"] == "rounding"
    assert "in float64 they come back" in single.reason
    assert "float64" in single.advice
    assert reconstruction(model, data()).verdict is Verdict.STABLE


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rounding_explains_covers_the_error_and_is_no_blank_cheque(seed, spread, dtype):
    model = random_chain(depth=4, spread=spread, seed=seed).to_dtype(dtype)
    x = data(dtype=dtype)
    error = RoundTrip(x, x, model.inverse(model(x))).by_feature
    explained = explain(Linearization(model, x), unit=feature_scale(x), seed=0).error(dtype)
    assert (error <= explained).all()
    assert (explained <= 1e4 * error.max()).any()


def test_a_chain_worse_than_its_condition_number_is_no_wrong_inverse():
    """The product has condition number 1, but is computed by way of one of 1e9."""
    squeeze = rotated(1e9).matrix.detach()
    model = Chain(Linear(squeeze), Linear(torch.linalg.inv(squeeze))).to_dtype(torch.float32)
    result = reconstruction(model, data(dtype=torch.float32))
    assert result.verdict.failed
    assert result.settings["cause"] in ("condition", "rounding")
    assert "another map" not in result.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by", [1e-1, 2e-2])
def test_a_wrong_inverse_is_called_another_map(dtype, by):
    result = reconstruction(Offset(by).to_dtype(dtype), data(dtype=dtype))
    assert result.verdict is Verdict.UNSTABLE
    assert result.settings["cause"] == "wrong inverse"
    assert "the inverse is another map" in result.reason


def test_units_do_not_make_a_lost_inverse_a_wrong_one():
    """Errors are held against rounding in the units of x, whatever its features' units are."""
    units = torch.logspace(3, -3, 6)
    x = data(batch=64) * units
    model = Chain(Linear(torch.diag(1 / units)), rotated(1e10), rotated(1e12))
    result = reconstruction(model.to_dtype(torch.float32), x.float())
    assert result.verdict.failed
    assert result.settings["cause"] == "condition"


@pytest.mark.parametrize("by", [5e-4, 5e-3])
def test_an_inverse_within_the_limit_is_usable_and_its_floor_is_said(by):
    """Solvers with a tolerance leave errors that no precision removes; small ones pass."""
    result = reconstruction(Offset(by).to_dtype(torch.float32), data(dtype=torch.float32))
    assert result.verdict == ("marginal" if by > 1e-3 else "stable")
    assert "exact to" in result.reason
    assert "float64, too" in result.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_floor_of_an_inexact_inverse_is_accepted(dtype):
    step = 2e-5
    result = reconstruction(Grid(step).to_dtype(dtype), data(dtype=dtype))
    assert result.verdict is Verdict.STABLE, result.reason
    assert step / 10 < result.values["float64_error"] < step
    assert ("float64, too" in result.reason) is (dtype == torch.float32)


def test_a_floor_beyond_the_limit_fails():
    assert reconstruction(Grid(0.2), data()).verdict is Verdict.UNSTABLE


def test_units_of_features_do_not_decide():
    """Errors of a millionth in every feature's own unit, with units from 1e-6 to 1e6."""
    units = torch.logspace(-6, 6, 6)

    class Scaled(Offset):
        def inverse(self, z: Tensor) -> Tensor:
            return Linear.inverse(self, z) + 1e-6 * units

    result = reconstruction(Scaled(0.0), data(batch=64) * units)
    assert result.verdict is Verdict.STABLE
    assert result.values["relative_error"] == pytest.approx(1e-6, rel=0.5)


def test_a_small_feature_that_is_lost_is_seen_next_to_a_large_one():
    class Lost(Offset):
        def inverse(self, z: Tensor) -> Tensor:
            x = Linear.inverse(self, z).clone()
            x[:, 0] = 0
            return x

    units = torch.tensor([1e-3, 1e3, 1e3, 1e3, 1e3, 1e3])
    result = reconstruction(Lost(0.0), data(batch=64) * units)
    assert result.verdict is Verdict.UNSTABLE
    assert result.values["relative_error"] == pytest.approx(1, rel=0.5)


def test_a_tiny_row_is_held_to_the_deviation_of_its_features():
    x = data(batch=64)
    x[3] *= 1e-11

    class Added(Offset):
        def inverse(self, z: Tensor) -> Tensor:
            return Linear.inverse(self, z) + 1e-9

    assert reconstruction(Added(0.0), x).verdict is Verdict.STABLE


def test_nan_is_found_with_its_layer():
    model = Chain(Warp(6), Breaking(6, seed=1), Warp(6, seed=2))
    result = reconstruction(model, data())
    assert result.verdict is Verdict.NON_FINITE
    assert "the inverse of layer 1 (Breaking)" in result.reason
    assert "6 of 6" in result.reason


def test_overflow_in_the_forward_is_found_with_its_layer():
    model = Chain(Linear(torch.eye(6)), *(Linear(1e30 * torch.eye(6)) for _ in range(2))).to_dtype(
        torch.float32
    )
    result = reconstruction(model, data(dtype=torch.float32))
    assert result.verdict is Verdict.NON_FINITE
    assert "the forward of layer 2 (Linear)" in result.reason


def test_an_iteration_that_did_not_arrive_is_said():
    residual = Residual(nn.Tanh(), log_det=ExactLogDet(), solver=FixedPoint(max_iterations=3))
    result = reconstruction(Chain(Linear(torch.eye(3)), residual), torch.randn(5, 3))
    assert result.verdict is Verdict.UNSTABLE
    said = "the inverse of layer 1 (Residual) did not converge: 5 of 5 samples, residual"
    assert said in result.reason
    assert result.settings["cause"] == "tolerance"
    assert "max_iterations" in result.advice
    assert "another map" not in result.reason
    patient = Residual(nn.Sequential(Linear(0.5 * torch.eye(3)), nn.Tanh()), log_det=ExactLogDet())
    assert "converge" not in reconstruction(Chain(patient), torch.randn(5, 3)).reason


@pytest.mark.thorough
@pytest.mark.parametrize(("linear", "called_wrong"), [(math.inf, True), (LINEAR, False)])
def test_an_explosion_beyond_first_order_is_not_called_a_wrong_inverse(
    monkeypatch, linear, called_wrong
):
    """The inverse is exact on paper; not even float64 can carry its condition number, nor a
    derivative tell how far.
    """
    from nflows import transforms
    from nflows.nn import nets

    monkeypatch.setattr(reconstruction_check, "LINEAR", linear)
    torch.set_default_dtype(torch.float32)
    steps = []
    for _ in range(16):
        network = functools.partial(nets.ResidualNet, hidden_features=64)
        steps += [
            transforms.RandomPermutation(10),
            transforms.AffineCouplingTransform(torch.arange(10) % 2, network),
        ]
    flow = transforms.CompositeTransform(steps)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(2)
    result = reconstruction(wrap(flow), torch.randn(64, 10))
    assert result.verdict.failed
    assert (result.settings["cause"] == "wrong inverse") is called_wrong


def test_poisoned_samples_are_left_out_and_counted():
    x = data()
    x[1, 2], x[4, 0] = torch.nan, torch.inf
    result = reconstruction(rotated(10), x)
    assert result.verdict is Verdict.STABLE
    assert "2 samples of x contain NaN or Inf" in result.reason
    assert result.per_sample["max_error"].isnan().tolist() == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]
    assert reconstruction(rotated(10), torch.full((2, 6), torch.nan)).verdict is Verdict.NON_FINITE


def test_one_huge_sample_is_measured_by_its_own_scale():
    x = data(dtype=torch.float32)
    x[0] *= 1e12
    assert reconstruction(rotated(2).to_dtype(torch.float32), x).verdict is Verdict.STABLE


def test_an_injective_map_is_judged_by_its_latents():
    result = reconstruction(Embedding(8, 3), data(dimension=8))
    assert result.values["max_error"] > 0.1, "x -> z -> x is a projection"
    assert result.verdict is Verdict.STABLE, result.reason
    assert result.values["latent_error"] < 1e-12


def test_batches_and_samples_agree():
    model, x = random_chain(), data(batch=10)
    whole, parts = (reconstruction(model, x, batch_size=size) for size in (128, 3))
    torch.testing.assert_close(
        whole.per_sample["max_error"], parts.per_sample["max_error"], atol=1e-13, rtol=1
    )


def test_images_are_the_worst_samples_beside_their_reconstructions():
    class Picture(Warp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1)).reshape(x.shape)

        def inverse(self, z: Tensor) -> Tensor:
            return super().inverse(z.flatten(1)).reshape(z.shape)

    x = data(batch=12, dimension=16).reshape(12, 1, 4, 4)
    images = reconstruction(Picture(16), x).images
    assert images["original"].shape == (8, 1, 4, 4)
    torch.testing.assert_close(images["difference"], images["reconstruction"] - images["original"])


def test_units_of_samples():
    assert data_scale(torch.zeros(3, 2)).tolist() == [1, 1, 1]
    huge = torch.tensor([[1e30, 1e30], [1.0, 1.0], [1.0, 1.0]]).float()
    assert data_scale(huge).tolist() == pytest.approx([1e30, 1, 1])
    broken = torch.tensor([[1e300, 1e300], [torch.nan, 1.0]])
    assert data_scale(broken).tolist() == pytest.approx([1e300, 1])
    assert max_usable_error(torch.float64) == 0.01
    assert max_usable_error(torch.bfloat16) == 0.0625


def test_units_of_features():
    x = data(batch=64, dimension=3) * torch.tensor([1.0, 1e3, 1.0]) + torch.tensor([0.0, 0.0, 50.0])
    expected = torch.maximum(x.std(0, correction=0).expand_as(x), x.abs())
    torch.testing.assert_close(feature_scale(x), expected)
    constant = torch.ones(64, 2) * torch.tensor([5.0, 0.0])
    assert feature_scale(constant)[0].tolist() == [5.0, 5.0]
    images = torch.stack([data(64, 16), 100 * data(64, 16)], dim=1).reshape(64, 2, 4, 4)
    scale = feature_scale(images)
    assert scale[:, 1].min() / scale[:, 0].min() == pytest.approx(100, rel=1e-6)
    assert feature_scale(torch.zeros(2, 3)).tolist() == [[1.0] * 3] * 2
    assert feature_scale(torch.full((2, 3), torch.nan)).tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (3, 1), (1, 3, 4, 4)])
def test_small_shapes(shape):
    class Twice(Linear):
        def __init__(self) -> None:
            super().__init__(2 * torch.eye(1))

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

        def inverse(self, z: Tensor) -> Tensor:
            return z / 2

    result = reconstruction(Twice(), torch.randn(shape))
    assert result.verdict is Verdict.STABLE
    assert result.values["relative_error"] == 0


class Overflowing(Linear):
    """A linear map whose inverse returns NaN."""

    def inverse(self, z: Tensor) -> Tensor:
        return super().inverse(z) * torch.nan


def test_an_exploded_inverse_that_overflows_is_not_called_another_map():
    exploded = Overflowing(torch.diag(torch.logspace(0, -30, 6)))
    result = reconstruction(exploded, data())
    assert result.verdict is Verdict.NON_FINITE
    assert result.settings["cause"] == "condition"
    well_conditioned = Overflowing(torch.eye(6))
    assert reconstruction(well_conditioned, data()).settings["cause"] == "wrong inverse"

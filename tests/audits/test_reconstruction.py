"""reconstruction: closed forms, what rounding explains, floors, wrong inverses, NaN with its layer."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.audits import Verdict
from inn_guard.audits.reconstruction import verdict as reconstruction_verdict
from inn_guard.audits.reconstruction.audit import reconstruction
from inn_guard.audits.reconstruction.rounding import explain
from inn_guard.audits.thresholds import FLOOR, USABLE, data_scale, max_usable_error
from inn_guard.layers.chain import Chain
from inn_guard.layers.fixed_point import FixedPoint
from inn_guard.layers.residual import Residual
from inn_guard.layers.residual_log_det import ExactLogDet
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
    assert result.values["relative_error"] == pytest.approx(
        ((back - x).abs().amax(1) / data_scale(x)).max().item()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_good_inverses_are_stable(dtype, condition):
    result = reconstruction(rotated(condition).to_dtype(dtype), data(dtype=dtype))
    assert result.verdict is Verdict.STABLE, result.reason
    assert result.values["log10_condition_number"] == pytest.approx(math.log10(condition), abs=0.1)


def test_the_same_net_is_unusable_in_float32_and_stable_in_float64():
    model = rotated(1e7)
    single = reconstruction(model.to_dtype(torch.float32), data(dtype=torch.float32))
    assert single.verdict is Verdict.UNSTABLE
    assert single.values["relative_error"] > USABLE
    assert "condition number" in single.reason
    assert "wrong" not in single.reason
    assert reconstruction(model, data()).verdict is Verdict.STABLE


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rounding_explains_covers_the_error_and_is_no_blank_cheque(seed, spread, dtype):
    model = random_chain(depth=4, spread=spread, seed=seed).to_dtype(dtype)
    x = data(dtype=dtype)
    error = reference.round_trip(model, x)
    explained = explain(model, x, seed=0).error(dtype)
    assert (error <= explained).all()
    assert (explained <= 1e4 * error.max()).any()


def test_a_chain_worse_than_its_condition_number_is_explained_by_its_layers():
    # the product is the identity with condition number 1, computed through a condition number of 1e5
    squeeze = rotated(1e5).matrix.detach()
    model = Chain(Linear(squeeze), Linear(torch.linalg.inv(squeeze))).to_dtype(torch.float32)
    result = reconstruction(model, data(dtype=torch.float32))
    assert result.values["log10_condition_number"] == pytest.approx(0, abs=0.3)
    assert result.values["max_error"] > 100 * torch.finfo(torch.float32).eps
    assert result.values["max_error"] < result.values["explained_error"] * 10
    assert "wrong" not in result.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by", [1e-1, 1e-3])
def test_a_wrong_inverse_is_called_wrong(dtype, by):
    result = reconstruction(Offset(by).to_dtype(dtype), data(dtype=dtype))
    assert result.verdict is Verdict.UNSTABLE
    assert "the inverse is wrong" in result.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_floor_of_an_inexact_inverse_is_reported_and_accepted(dtype):
    step = 2e-5
    result = reconstruction(Grid(step).to_dtype(dtype), data(dtype=dtype))
    assert result.verdict is Verdict.STABLE, result.reason
    assert step / 10 < result.values["floor"] < step
    assert "float64 too" in result.reason


def test_a_floor_beyond_the_limit_is_a_wrong_inverse():
    result = reconstruction(Grid(20 * FLOOR), data())
    assert result.verdict is Verdict.UNSTABLE
    assert "wrong" in result.reason


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


class OnlyNearData(Warp):
    """Its inverse breaks where the norm of z is above 3: on most prior latents, on no latent of small data."""

    def inverse(self, z: Tensor) -> Tensor:
        return torch.where(z.norm(dim=1, keepdim=True) > 3, torch.nan, super().inverse(z))


def on_sphere(radius: float) -> Tensor:
    x = data(batch=40)
    return radius * x / x.norm(dim=1, keepdim=True)


def test_prior_latents_find_what_data_do_not():
    """Latents of length 2 in six dimensions have a mean square of 0.67: the prior's size, but none beyond 3."""
    x = on_sphere(2.0)
    result = reconstruction(OnlyNearData(6), x)
    assert result.verdict is Verdict.NON_FINITE
    assert "prior latents" in result.reason
    assert reconstruction(OnlyNearData(6), x, prior=None).verdict is Verdict.STABLE
    narrow = reconstruction(
        OnlyNearData(6),
        x,
        prior=lambda z, generator: 0.1 * torch.randn(z.shape, generator=generator),
    )
    assert narrow.verdict is Verdict.STABLE


@pytest.mark.parametrize("radius", [0.1, 1.5, 4.5])
def test_a_prior_that_the_latents_do_not_follow_is_reported_but_not_counted(radius):
    """Mean squares below 0.5 and, at 4.5, above 2: a net that was not trained towards N(0, I)."""
    model = OnlyNearData(6) if radius < 3 else Wide(6)
    result = reconstruction(model, on_sphere(radius))
    assert result.verdict is Verdict.STABLE
    assert "not counted" in result.reason
    assert math.isnan(result.values["prior_error"])


class Wide(Warp):
    """Its inverse breaks on the latents nearer to 0 than its data's."""

    def inverse(self, z: Tensor) -> Tensor:
        return torch.where(z.norm(dim=1, keepdim=True) < 3, torch.nan, super().inverse(z))


def test_an_iteration_that_did_not_arrive_is_said():
    residual = Residual(nn.Tanh(), log_det=ExactLogDet(), solver=FixedPoint(max_iterations=3))
    result = reconstruction(Chain(Linear(torch.eye(3)), residual), torch.randn(5, 3))
    assert result.verdict is Verdict.UNSTABLE
    assert (
        "the inverse of layer 1 (Residual) did not converge: 5 of 5 samples, residual"
        in result.reason
    )
    patient = Residual(nn.Sequential(Linear(0.5 * torch.eye(3)), nn.Tanh()), log_det=ExactLogDet())
    assert "converge" not in reconstruction(Chain(patient), torch.randn(5, 3)).reason


@pytest.mark.parametrize(
    ("linear", "called_wrong"), [(math.inf, True), (reconstruction_verdict.LINEAR, False)]
)
def test_an_explosion_beyond_first_order_is_not_called_a_wrong_inverse(
    monkeypatch, linear, called_wrong
):
    """The inverse is exact on paper; not even float64 can carry its condition number, nor a derivative tell how far."""
    from nflows import transforms
    from nflows.nn import nets

    monkeypatch.setattr(reconstruction_verdict, "LINEAR", linear)
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
    assert result.verdict is Verdict.UNSTABLE
    assert ("wrong" in result.reason) is called_wrong


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
    assert whole.values["prior_error"] == pytest.approx(
        parts.values["prior_error"], rel=1, abs=1e-13
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


def test_scale_and_usable_levels():
    assert data_scale(torch.zeros(3, 2)).tolist() == [1, 1, 1]
    assert data_scale(
        torch.tensor([[1e30, 1e30], [1.0, 1.0], [1.0, 1.0]]).float()
    ).tolist() == pytest.approx([1e30, 1, 1])
    assert data_scale(torch.tensor([[1e300, 1e300], [torch.nan, 1.0]])).tolist() == pytest.approx(
        [1e300, 1]
    )
    assert max_usable_error(torch.float64) == USABLE
    assert max_usable_error(torch.bfloat16) > USABLE

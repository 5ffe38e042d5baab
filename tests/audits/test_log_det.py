"""log_det: closed forms, wrong formulas, shapes, random estimators, stochastic references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inn_guard.audits.log_det import log_det
from inn_guard.layers.chain import Chain
from inn_guard.report.verdict import Verdict
from tests.cases.toys import Linear, Warp


def data(batch: int = 4, dimension: int = 3) -> Tensor:
    return torch.randn(
        batch, dimension, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )


class Claim(Linear):
    """diag(1, 2, 4, ...), whose claimed log-determinants can be anything."""

    def __init__(
        self, forward=lambda true, x: true, inverse=lambda true, z: -true, dimension: int = 3
    ) -> None:
        super().__init__(torch.diag(2.0 ** torch.arange(dimension)))
        self.claims = forward, inverse

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, true = super().forward_and_log_det(x)
        return z, self.claims[0](true, x)

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, minus = super().inverse_and_log_det(z)
        return x, self.claims[1](-minus, z)


def test_a_right_log_det_is_stable_and_its_value_known():
    result = log_det(Claim(), data())
    assert result.verdict is Verdict.STABLE
    assert result.per_sample["log_det"].tolist() == pytest.approx([math.log(8)] * 4)
    assert result.per_sample["reference"].tolist() == pytest.approx([math.log(8)] * 4)
    assert result.values["forward_plus_inverse"] == pytest.approx(0, abs=1e-12)
    assert "exact" in result.settings["reference"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("claim", "error"),
    [
        (lambda true, x: -true, 2 * math.log(8)),
        (lambda true, x: true + 0.11, 0.11),
        (lambda true, x: 0 * true, math.log(8)),
    ],
)
def test_a_wrong_formula_is_found_with_its_error(claim, error, dtype):
    result = log_det(Claim(claim).to_dtype(dtype), data().to(dtype))
    assert result.verdict is Verdict.UNSTABLE
    assert result.values["max_error"] == pytest.approx(error, rel=1e-4)


def test_an_inverse_that_does_not_cancel_is_said_and_does_not_decide_the_density_of_data():
    result = log_det(Claim(inverse=lambda true, z: true), data())
    assert result.verdict is Verdict.STABLE
    assert result.values["forward_plus_inverse"] == pytest.approx(2 * math.log(8))
    assert "not 0" in result.reason


@pytest.mark.parametrize("claim", [lambda true, x: true.unsqueeze(1), lambda true, x: true[0]])
def test_a_wrong_shape_is_found(claim):
    result = log_det(Claim(claim), data())
    assert result.verdict is Verdict.UNSTABLE
    assert "shape" in result.reason


@pytest.mark.parametrize(("by", "verdict"), [(0.005, "stable"), (0.05, "marginal")])
def test_errors_below_the_limit_are_stable_or_marginal(by, verdict):
    result = log_det(Claim(lambda true, x: true + by), data())
    assert result.verdict == verdict
    assert result.uses["density"].figure == pytest.approx(by)


def test_nan_is_a_finding():
    result = log_det(Claim(lambda true, x: true * torch.nan), data())
    assert result.verdict is Verdict.NON_FINITE
    assert "4 of 4 log-determinants are NaN" in result.reason


def test_a_formula_on_a_singular_jacobian_is_undecided():
    class Singular(Claim):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.0

    result = log_det(Singular(), data())
    assert result.verdict is Verdict.UNDECIDED
    assert "could not be checked" in result.reason


def test_how_many_samples_are_compared_is_said():
    result = log_det(Claim(), data(9), samples=5)
    finding = result.uses["density"]
    assert (finding.samples, finding.of) == (5, 9)
    assert "of 5 samples" in result.reason
    assert result.per_sample["error"].isnan().sum() == 4
    with pytest.raises(ValueError, match="at least 1 sample"):
        log_det(Claim(), data(), samples=0)


def test_no_log_det_is_not_applicable():
    result = log_det(Warp(3), data())
    assert result.verdict is Verdict.NOT_APPLICABLE
    assert "no log-determinant" in result.reason


def noisy(bias: float):
    return lambda true, x: true + bias + 0.1 * torch.randn(len(x), dtype=x.dtype)


def test_a_random_estimator_is_averaged():
    good, bad = (log_det(Claim(noisy(bias)), data()) for bias in (0.0, 1.0))
    assert good.settings["draws"] == 16
    assert good.verdict is Verdict.STABLE, good.reason
    assert bad.verdict is Verdict.UNSTABLE
    assert "standard error" in bad.reason


def test_beyond_512_dimensions_the_reference_is_stochastic_and_still_finds_a_wrong_sign():
    scales = torch.exp(0.3 * torch.randn(600, generator=torch.Generator().manual_seed(0)))
    turn = torch.linalg.qr(torch.randn(600, 600, generator=torch.Generator().manual_seed(1))).Q

    class Signed(Linear):
        sign = 1.0

        def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z, true = super().forward_and_log_det(x)
            return z, self.sign * true

    model = Signed(3 * turn @ torch.diag(scales))
    x = torch.randn(2, 600)
    right = log_det(model, x)
    assert right.verdict is Verdict.STABLE, right.reason
    assert "stochastic" in right.settings["reference"]
    model.sign = -1.0
    assert log_det(model, x).verdict is Verdict.UNSTABLE


def test_ill_conditioned_chains_keep_an_exact_reference():
    scales = torch.tensor([1e-6, 1.0, 1e6])
    model = Chain(*(Linear(torch.diag(scales.roll(k))) for k in range(6))).to_dtype(torch.float32)
    result = log_det(model, data().float())
    assert result.verdict is Verdict.STABLE, result.reason
    assert result.values["max_error"] < 1e-4

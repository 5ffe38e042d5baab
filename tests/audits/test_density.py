"""density: errors against float64 by hand, shares with intervals, support, random and wrong
answers.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import inn_guard as ig
from inn_guard.audits.density import density
from inn_guard.audits.rates import rate_interval
from inn_guard.core.missing import NotApplicable
from inn_guard.layers.chain import Chain
from tests.cases.toys import Linear, Warp


class Lossy(Linear):
    """log|det J| goes by way of a large number, of which each dtype keeps what it can."""

    def __init__(self, detour: float, dimension: int = 3) -> None:
        super().__init__(torch.eye(dimension))
        self.detour = detour

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        true = x.flatten(1).sum(1)
        return self(x), (true + self.detour) - self.detour


def data(batch: int = 64, dimension: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, dimension, generator=generator, dtype=torch.float64).to(dtype)


def by_hand(model: Linear, x: Tensor) -> Tensor:
    z, log_det = model.forward_and_log_det(x)
    normal = -0.5 * z.square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)
    return (normal + log_det).double().detach()


@pytest.mark.parametrize(
    ("detour", "verdict"), [(0.0, "stable"), (5e5, "marginal"), (1e7, "unstable")]
)
def test_the_error_is_that_against_a_float64_copy(detour, verdict):
    model, x = Lossy(detour).to_dtype(torch.float32), data()
    result = density(model, x)
    error = (by_hand(model, x) - by_hand(model.to_dtype(torch.float64), x.double())).abs()
    assert result.verdict == verdict
    torch.testing.assert_close(result.per_sample["error"], error, atol=1e-5, rtol=1e-4)
    assert result.values["max_error"] == pytest.approx(error.max().item(), rel=1e-3, abs=1e-5)
    bits = error.max().item() / 3 / math.log(2)
    assert result.values["bits_per_dimension"] == pytest.approx(bits, rel=1e-3, abs=1e-5)
    finding = result.uses["density"]
    assert (finding.limit, finding.unit, finding.samples, finding.of) == (0.1, "nats", 64, 64)


def test_float64_is_advised_only_where_it_resolves_the_limit():
    resolved = density(Lossy(1e7).to_dtype(torch.float32), data())
    assert resolved.settings["float64_suffices"] is True
    assert "model.double()" in resolved.advice
    # log p(x) is of 1e24 nats: a rounding unit of float64 is 1e8 of them
    huge = density(Lossy(0.0).to_dtype(torch.float32), 1e12 * data())
    assert huge.verdict == "unstable"
    assert huge.settings["float64_suffices"] is False
    assert "of which float64 does not resolve 0.1 either" in huge.advice


def test_the_share_of_wrong_samples_has_its_interval():
    model, x = Lossy(3e6).to_dtype(torch.float32), data(200)
    result = density(model, x)
    above = int((result.per_sample["error"] > 0.1).sum())
    assert 0 < above < 200
    assert result.values["share_above_limit"] == above / 200
    low, high = rate_interval(above, 200)
    assert f"{above} of 200 samples is off by more than 0.1 nats" in result.reason
    assert f"({100 * low:.2g} to {100 * high:.2g} % of all)" in result.reason


def test_the_limit_is_in_nats_at_every_dimension():
    model = Lossy(1e7, dimension=500).to_dtype(torch.float32)
    result = density(model, data(dimension=500))
    assert result.verdict == "unstable"
    assert result.values["bits_per_dimension"] < 0.01


def test_a_density_is_right_although_the_inverse_is_lost():
    class OneWay(Linear):
        def inverse(self, z: Tensor) -> Tensor:
            return z * math.nan

    report = ig.audit(OneWay(torch.eye(3)).to_dtype(torch.float32), data(), level="quick")
    assert report.uses["density"].verdict == "stable"
    assert report.uses["reconstruction"].verdict == "non_finite"
    assert any("Densities are right" in text for text in report.advice)


@pytest.mark.parametrize(("scale", "verdict"), [(1.0, "stable"), (1e9, "unstable")])
def test_a_float64_model_is_measured_by_a_coarser_copy(scale, verdict):
    """With z = 1e9 x, log p is about -1e18, which float64 knows to 100 nats."""
    model, x = Linear(scale * torch.eye(3)), data(dtype=torch.float64)
    result = density(model, x)
    assert result.verdict == verdict
    assert "estimated from a float32 copy" in result.settings["reference"]
    assert "estimated" in result.reason or result.verdict.failed
    size = result.values["largest_log_prob"]
    assert result.values["max_error"] < 10 * torch.finfo(torch.float64).eps * size


def test_where_float32_overflows_random_changes_take_its_place():
    model = Chain(Linear(1e30 * torch.eye(3)), Linear(1e-30 * torch.eye(3)))
    x = 1e10 * data(dtype=torch.float64)
    result = density(model, x)
    assert "random changes" in result.settings["reference"]
    # x itself is 1e10, so that log p is 1e20, known to 1e4
    assert result.verdict == "unstable"


class Uniform(Linear):
    """log p(x) = 0 on the unit square, -inf outside of it."""

    def log_prob(self, x: Tensor) -> Tensor:
        inside = ((x > 0) & (x < 1)).all(1)
        return torch.where(inside, 0.0, -math.inf).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_outside_of_the_support_are_right_and_said(dtype):
    x = torch.tensor([[0.5, 0.5], [2.0, 0.5], [0.1, 0.2]], dtype=dtype)
    result = density(Uniform(torch.eye(2)).to_dtype(dtype), x)
    assert result.verdict == "stable"
    assert "1 samples lie where p(x) = 0" in result.reason
    assert result.per_sample["error"].tolist() == [0, 0, 0]
    assert result.settings["outside_of_support"] == 1


class Answers(Linear):
    def __init__(self, answer) -> None:
        super().__init__(torch.eye(3))
        self.answer = answer

    def log_prob(self, x: Tensor) -> Tensor:
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "verdict", "says"),
    [
        (lambda x: x.sum(1) * math.nan, "non_finite", "64 of 64 samples is NaN or Inf"),
        (lambda x: x[:, :1], "unstable", r"shape (64, 1), expected (64,)"),
        (lambda x: torch.randn(len(x)).to(x), "undecided", "log p(x) is random"),
        (lambda x: x.sum(1) / 0, "non_finite", "is NaN or Inf"),
    ],
    ids=range(4),
)
def test_answers_that_are_no_density(answer, verdict, says):
    result = density(Answers(answer).to_dtype(torch.float32), data())
    assert result.verdict == verdict
    assert says in result.reason


def test_exceptions_are_findings():
    def raises(x: Tensor) -> Tensor:
        raise ArithmeticError("no density today")

    result = density(Answers(raises).to_dtype(torch.float32), data())
    assert result.verdict == "unstable"
    assert "log_prob of the model raises ArithmeticError: no density today" in result.reason


def test_without_a_float64_copy_it_is_undecided():
    class Single(Lossy):
        def to_dtype(self, dtype: torch.dtype) -> Linear:
            raise NotApplicable("no float64 here")

    model = Single(0.0)
    result = density(model.float(), data())
    assert result.verdict == "undecided"
    assert "no float64 here" in result.reason


def test_without_a_log_determinant_it_is_not_applicable():
    result = density(Warp(3), data(dtype=torch.float64))
    assert result.verdict == "not_applicable"
    assert result.uses["density"].verdict == "not_applicable"


def test_samples_that_are_not_finite_are_left_out():
    x = data()
    x[5, 0], x[9, 1] = math.nan, math.inf
    result = density(Lossy(0.0).to_dtype(torch.float32), x)
    assert result.verdict == "stable"
    assert result.per_sample["error"].isnan().nonzero()[:, 0].tolist() == [5, 9]
    assert (result.uses["density"].samples, result.uses["density"].of) == (62, 64)
    nothing = density(Lossy(0.0).to_dtype(torch.float32), x * math.nan)
    assert nothing.verdict == "non_finite"


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 3, 4, 4)])
def test_small_shapes(shape):
    model = Lossy(0.0, dimension=math.prod(shape[1:])).to_dtype(torch.float32)
    assert density(model, torch.randn(shape, dtype=torch.float32)).verdict == "stable"


def test_contexts_stay_with_their_samples():
    class Shifted(Linear):
        def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.context[:, 0]

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = Shifted(torch.eye(3)).float().with_context(torch.arange(600.0)[:, None].float())
    result = density(model, torch.zeros(600, 3, dtype=torch.float32))
    normal = -1.5 * math.log(2 * math.pi)
    expected = torch.arange(600.0) + normal
    torch.testing.assert_close(result.per_sample["log_prob"], expected, atol=1e-4, rtol=1e-6)


def test_the_own_base_of_a_library_counts():
    flows = pytest.importorskip("nflows.flows")
    transforms = pytest.importorskip("nflows.transforms")
    distributions = pytest.importorskip("nflows.distributions")
    base = distributions.DiagonalNormal([3])
    with torch.no_grad():
        base.log_std_.fill_(1.0)
    flow = flows.Flow(transforms.ReversePermutation(3), base).float()
    x = data()
    result = density(ig.wrap(flow), x)
    torch.testing.assert_close(
        result.per_sample["log_prob"], flow.log_prob(x).double().detach(), atol=1e-6, rtol=1e-6
    )


class Overflowing(Linear):
    """z = exp(x) in the first entry, beyond every float for large x."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([(1000 * x[:, :1]).exp(), x[:, 1:]], dim=1)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), 1000 * x[:, 0] + math.log(1000)


def test_latents_that_overflow_are_not_taken_for_the_support():
    x = data()
    assert density(Overflowing(torch.eye(3)).to_dtype(torch.float32), x).verdict == "non_finite"

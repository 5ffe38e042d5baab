"""log_det: closed forms, wrong formulas, shapes, random estimators, stochastic references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from inn_guard.audits.level import Level
from inn_guard.audits.log_det import _Compared, _Layer, _Own, _Reference, log_det
from inn_guard.core.invertible import Invertible
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.networks import ConvNet
from inn_guard.layers.permutation import Permutation
from inn_guard.report.formatting import brief
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
    assert "the log-determinant is random; the mean of 16 agrees" in good.reason
    assert bad.verdict is Verdict.UNSTABLE
    assert "standard error" in bad.reason


def drawn(draws: Tensor) -> _Compared:
    """What is compared if these are draws, (16, B), of log-determinants that are 0."""
    zero = torch.zeros(draws.shape[1], dtype=torch.float64)
    layer = _Layer(0, "", zero, zero, zero, zero, 0)
    own = _Own(draws.mean(0), draws.std(0) / len(draws) ** 0.5, len(draws))
    return _Compared(torch.arange(len(zero)), own, _Reference((layer,), ""), zero, (), False)


@pytest.mark.parametrize("kind", ["normal", "of other scales", "signs"])
def test_a_right_but_random_estimator_is_hardly_ever_called_wrong(kind):
    generator = torch.Generator().manual_seed(0)
    alarms, audits = 0, 2000
    for _ in range(audits):
        draws = torch.randn(16, 64, generator=generator, dtype=torch.float64)
        if kind == "of other scales":
            draws = draws * torch.logspace(-2, 2, 64, dtype=torch.float64)
        if kind == "signs":
            draws = draws.sign()
        compared = drawn(draws)
        alarms += int((compared.error > compared.allowed).any())
    assert alarms <= 2  # 0.2 are expected


def test_a_biased_estimator_is_called_wrong_beyond_its_spread():
    generator = torch.Generator().manual_seed(0)
    draws = 0.1 * torch.randn(16, 64, generator=generator, dtype=torch.float64)
    assert bool((drawn(draws + 1).error > drawn(draws + 1).allowed).all())


def with_condition(dimension: int, condition: float, seed: int = 0) -> Tensor:
    """A dense matrix with singular values from 1 down to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(dimension, dimension, generator=generator).double()).Q
        for _ in range(2)
    )
    values = torch.logspace(0, -math.log10(condition), dimension, dtype=torch.float64)
    return left @ torch.diag(values) @ right


class Dense(Linear):
    """A matrix, whose claimed log-determinant is off by ``by``."""

    def __init__(self, matrix: Tensor, by: float = 0.0) -> None:
        super().__init__(matrix)
        self.by = by

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, true = super().forward_and_log_det(x)
        return z, true + self.by


@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_a_large_layer_without_structure_is_exact(condition):
    x = torch.randn(2, 600, dtype=torch.float64)
    matrix = with_condition(600, condition)
    right, wrong = (log_det(Dense(matrix, by), x) for by in (0.0, 0.5))
    assert right.verdict is Verdict.STABLE, right.reason
    assert right.values["max_error"] < 1e-6
    assert wrong.verdict is Verdict.UNSTABLE


@pytest.fixture
def quadrature_only(monkeypatch):
    """No dense matrix is formed for a layer without structure."""
    monkeypatch.setattr("inn_guard.audits.log_det.DENSE", dict.fromkeys(Level, 0))


@pytest.mark.parametrize("condition", [10.0, 1e3, 1e6])
def test_quadrature_accuses_no_right_log_determinant(quadrature_only, condition):
    result = log_det(Dense(with_condition(60, condition)), torch.randn(2, 60).double())
    assert result.verdict is Verdict.UNDECIDED, result.reason
    assert "quadrature" in result.settings["reference"]
    assert f"known to {brief(result.values['unknown'])} nats only" in result.reason


def test_quadrature_finds_an_error_beyond_its_bounds(quadrature_only):
    x = torch.randn(2, 60).double()
    known = log_det(Dense(with_condition(60, 10.0)), x).values["unknown"]
    wrong = log_det(Dense(with_condition(60, 10.0), by=3 * known), x)
    assert wrong.verdict is Verdict.UNSTABLE
    assert "within" in wrong.reason


def image_chain(by: float) -> Chain:
    """Actnorm, 1x1 convolution and two couplings of 3,072 dimensions, the first one off."""

    class Off(AffineCoupling):
        def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z, true = super().forward_and_log_det(x)
            return z, true + by

    torch.manual_seed(0)
    nets = [ConvNet(6, 8, 12) for _ in range(2)]
    layers = [Diagonal(12), InvertibleLinear(12), Off(nets[0])]
    return Chain(*layers, Permutation.reverse(12), AffineCoupling(nets[1])).float()


def test_an_error_of_1_nat_in_3072_dimensions_is_found_and_its_layer_named():
    x = torch.randn(8, 12, 16, 16, dtype=torch.float32)
    right = log_det(image_chain(0.0), x)
    assert right.verdict is Verdict.STABLE, right.reason
    assert right.values["max_error"] < 1e-6
    assert "exact, layer by layer" in right.settings["reference"]
    wrong = log_det(image_chain(1.0), x)
    assert wrong.verdict is Verdict.UNSTABLE
    assert "off in layer 2 (Off) by 1" in wrong.reason
    assert wrong.per_layer[2]["error"] == pytest.approx(1.0)


def test_nan_in_one_of_all_samples_is_found():
    x = data(300)
    claim = Claim(lambda true, t: torch.where(t[:, 0] == x[-1, 0], torch.nan, true))
    result = log_det(claim, x, samples=8)
    assert result.verdict is Verdict.NON_FINITE
    assert "1 of 300 log-determinants" in result.reason


@pytest.mark.parametrize("dimension", [3, 100])
def test_64_samples_are_compared(dimension):
    result = log_det(Claim(dimension=3), data(300))
    assert len(result.per_sample["error"][result.per_sample["error"].isfinite()]) >= 64
    wide = Dense(with_condition(dimension, 10.0))
    assert log_det(wide, data(80, dimension)).uses["density"].samples >= 64


class Folding(Invertible):
    """z_0 = x_0^2 or x_0^3, the others as they are; det J has the sign of x_0 or none."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1] ** self.power, x[:, 1:]], dim=1)

    def inverse(self, z: Tensor) -> Tensor:
        first = z[:, :1].sign() * z[:, :1].abs() ** (1 / self.power)
        return torch.cat([first, z[:, 1:]], dim=1)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), (self.power * x[:, 0].abs() ** (self.power - 1)).log()


@pytest.mark.parametrize("dimension", [3, 40])
def test_a_map_whose_det_changes_sign_has_no_density(dimension):
    x = data(40, dimension)
    folded, monotone = (log_det(Folding(power), x) for power in (2, 3))
    assert folded.verdict is Verdict.UNSTABLE
    assert "changes sign" in folded.reason
    assert monotone.verdict is Verdict.STABLE, monotone.reason


def test_a_det_that_changes_sign_where_all_samples_come_back_is_a_remark():
    class Reciprocal(Invertible):
        """1 / x_0 on both sides of 0 and the others scaled by it: det J = -1 / x_0^D."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([1 / x[:, :1], x[:, 1:] * x[:, :1]], dim=1)

        def inverse(self, z: Tensor) -> Tensor:
            return torch.cat([1 / z[:, :1], z[:, 1:] * z[:, :1]], dim=1)

        def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self(x), (x.shape[1] - 3) * x[:, 0].abs().log()

    result = log_det(Reciprocal(), data(40, 4))
    assert result.verdict is Verdict.STABLE, result.reason
    assert "but all samples come back" in result.reason


def test_ill_conditioned_chains_keep_an_exact_reference():
    scales = torch.tensor([1e-6, 1.0, 1e6])
    model = Chain(*(Linear(torch.diag(scales.roll(k))) for k in range(6))).to_dtype(torch.float32)
    result = log_det(model, data().float())
    assert result.verdict is Verdict.STABLE, result.reason
    assert result.values["max_error"] < 1e-4

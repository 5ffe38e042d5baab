"""log_det against models that are wrong in one place: a constant, a factor, a layer, a sample."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from inn_guard.audits.log_det import USUAL, log_det
from inn_guard.core.invertible import Invertible, InvertibleWrapper
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.permutation import Permutation
from tests.cases.toys import Linear

Claim = Callable[[Tensor, Tensor], Tensor]


def data(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1)).float()


def true(log_det: Tensor, x: Tensor) -> Tensor:
    return log_det


class Claims(InvertibleWrapper):
    """The inner map, with log-determinants that claim something else."""

    def __init__(self, inner: Invertible, forward: Claim = true, inverse: Claim = true) -> None:
        super().__init__(inner)
        self.claims = forward, inverse

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.inner.forward_and_log_det(x)
        return z, self.claims[0](log_det, x)

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = self.inner.inverse_and_log_det(z)
        return x, self.claims[1](log_det, z)

    def layers(self) -> tuple[Invertible, ...]:
        return ()


def flow(forward: Claim = true, inverse: Claim = true, *, at: int | None = None) -> Chain:
    """Three couplings of 6 entries, of which one claims something else."""
    torch.manual_seed(0)
    layers: list[Invertible] = []
    for k in range(3):
        coupling: Invertible = AffineCoupling(MLP([3, 16, 6]))
        if k == at:
            coupling = Claims(coupling, forward, inverse)
        layers += [coupling, Permutation.reverse(6)]
    return Chain(*layers).float()


class Mix(Invertible):
    """A 1x1 convolution of a given condition number."""

    def __init__(self, channels: int, condition: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        left, right = (
            torch.linalg.qr(torch.randn(channels, channels, generator=generator)).Q
            for _ in range(2)
        )
        values = torch.logspace(0, -math.log10(condition), channels)
        self.weight = nn.Parameter((left @ torch.diag(values) @ right).double())

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ij,bjhw->bihw", self.weight, x)

    def inverse(self, z: Tensor) -> Tensor:
        return torch.einsum("ij,bjhw->bihw", torch.linalg.inv(self.weight), z)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.linalg.slogdet(self.weight.double()).logabsdet * x.shape[2] * x.shape[3]
        return self(x), one.to(x).expand(len(x))


def images(side: int, claim: Claim = true, *, condition: float = 10.0) -> Chain:
    torch.manual_seed(0)
    return Chain(Mix(12, condition), Claims(Mix(12, condition), claim), Mix(12, condition)).float()


def beyond(threshold: float, by: float) -> Claim:
    """Wrong for the samples whose first entry is large."""
    return lambda log_det, x: torch.where(x.flatten(1)[:, 0] > threshold, log_det + by, log_det)


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (flow(lambda log_det, x: log_det + 1, at=1), 2),
        (flow(lambda log_det, x: -log_det, at=0), 0),
        (flow(lambda log_det, x: log_det / math.log(2), at=2), 4),
        (flow(lambda log_det, x: 0 * log_det, at=1), 2),
        (flow(lambda log_det, x: log_det / 6, at=1), 2),
        (flow(lambda log_det, x: log_det.mean().expand(len(x)), at=1), 2),
        (flow(beyond(1.0, 2.0), at=1), 2),
    ],
    ids=["constant", "sign", "log2", "zero", "per dimension", "batch mean", "some samples"],
)
def test_a_wrong_layer_is_found_and_named(model, layer):
    result = log_det(model, data(64, 6))
    assert result.verdict == "unstable", result.reason
    assert f"off in layer {layer} (AffineCoupling)" in result.reason
    assert "and" not in result.reason.partition(": off in ")[2].partition(";")[0]


@pytest.mark.parametrize("by", [0.2, 1.0, -1.0])
def test_a_whole_map_that_is_wrong_is_found(by):
    result = log_det(Claims(flow(), lambda log_det, x: log_det + by), data(64, 6))
    assert result.verdict == "unstable"
    assert result.values["max_error"] == pytest.approx(abs(by), rel=1e-3)


def test_one_wrong_sample_of_those_compared_is_found():
    last = Claims(flow(), lambda log_det, x: log_det + 2.0 * (x == x[-1]).all(1))
    result = log_det(last, data(USUAL, 6))
    assert result.verdict == "unstable"
    assert f"1 of {USUAL} samples" in result.reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_all_samples_are_looked_at_for_what_is_not_finite(value):
    late = Claims(flow(), lambda log_det, x: torch.where(x[:, 0] > 2.9, value, log_det))
    x = data(2048, 6)
    result = log_det(late, x)
    assert result.verdict == "non_finite"
    assert f"{int((x[:, 0] > 2.9).sum())} of 2048" in result.reason


def test_the_inverse_is_judged_apart():
    result = log_det(flow(inverse=lambda log_det, z: log_det + 1, at=1), data(64, 6))
    assert result.verdict == "stable"
    assert "add up to 1 nats, not 0" in result.reason


def test_errors_that_cancel_are_no_error_of_the_density():
    two = [Claims(AffineCoupling(MLP([3, 8, 6])), beyond(-9, by)) for by in (5.0, -5.0)]
    result = log_det(Chain(*two).float(), data(64, 6))
    assert result.verdict == "stable"


@pytest.mark.parametrize(
    "side", [4, pytest.param(16, marks=pytest.mark.thorough)], ids=["D=192", "D=3072"]
)
def test_one_nat_is_found_in_large_chains_and_no_right_one_is_accused(side):
    x = data(8, 12, side, side)
    for condition in (1e1, 1e3, 1e6):
        right = log_det(images(side, condition=condition), x)
        assert right.verdict.passed, right.reason
    wrong = log_det(images(side, lambda log_det, x: log_det + 1), x)
    assert wrong.verdict == "unstable"
    assert "off in layer 1 (Mix) by 1" in wrong.reason
    forgotten = log_det(images(side, lambda log_det, x: log_det / side**2), x)
    assert "off in layer 1 (Mix)" in forgotten.reason


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("depth", [1, 4])
def test_no_right_log_det_is_accused_for_its_condition(condition, depth):
    generator = torch.Generator().manual_seed(0)
    layers = []
    for _ in range(depth):
        left, right = (torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q for _ in "ab")
        layers.append(
            Linear(left @ torch.diag(torch.logspace(0, -math.log10(condition), 24)) @ right)
        )
    result = log_det(Chain(*layers).float(), data(64, 24))
    assert result.verdict.passed, result.reason


class Folds(Invertible):
    """Folds one entry, two entries (whose signs cancel in det J), or all of them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, : self.count].square(), x[:, self.count :]], dim=1)

    def inverse(self, z: Tensor) -> Tensor:
        return torch.cat([z[:, : self.count].abs().sqrt(), z[:, self.count :]], dim=1)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), (2 * x[:, : self.count]).abs().log().sum(1)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_changes_of_the_sign_of_det_are_found(count):
    result = log_det(Folds(count), data(64, 5))
    assert result.verdict == "unstable"
    assert "det J changes sign" in result.reason

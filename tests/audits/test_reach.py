"""Maps that are not onto: which latents they do not reach, and what is not taken for that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import inn_guard as ig
from inn_guard.audits.sampling import sampling
from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from tests.cases.toys import Linear, Warp


def data(batch: int = 64, dimension: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, dimension, generator=generator)


class Squash(Invertible):
    """z = tanh(x), whose inverse is NaN outside of (-1, 1), or that of the edge."""

    def __init__(self, *, edge: float | None = None) -> None:
        super().__init__()
        self.edge = edge

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def inverse(self, z: Tensor) -> Tensor:
        if self.edge is not None:
            z = z.clamp(-self.edge, self.edge)
        return torch.atanh(z)


class Sigmoid(Squash):
    """z = sigmoid(x) in (0, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def inverse(self, z: Tensor) -> Tensor:
        return torch.logit(z, eps=1e-6)


class Positive(Squash):
    """z = softplus(x) above 0; raises below."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(x)

    def inverse(self, z: Tensor) -> Tensor:
        if bool((z <= 0).any()):
            raise ValueError("positive latents only")
        return z + torch.log(-torch.expm1(-z))


class Gap(Squash):
    """z = x + sign(x): nothing between -1 and 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.sign()

    def inverse(self, z: Tensor) -> Tensor:
        inside = z.abs() <= 1
        return torch.where(inside, 1e-6 * z.sign(), z - z.sign())


@pytest.mark.parametrize(
    "model",
    [Squash(), Squash(edge=0.999), Sigmoid(), Positive(), Chain(Linear(torch.eye(3)), Squash())],
    ids=["nan", "edge", "sigmoid", "raises", "chain"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bounded_range_is_told(model, dtype):
    result = sampling(model.to_dtype(dtype), data().to(dtype))
    assert result.verdict == "unstable"
    assert result.settings["cause"] == "not onto", result.reason
    assert "the map does not reach" in result.reason
    assert "prior=" in result.advice
    assert result.values["unreached"] > 0


def test_the_range_in_words_is_that_of_the_map():
    assert "stays between -1 and 1 in entry" in sampling(Squash(), data()).reason


def test_a_gap_is_not_reached_or_cut_off():
    result = sampling(Gap(), data())
    assert result.settings["cause"] == "not onto"
    assert "does not reach them, or its inverse cuts them off" in result.reason


class CutOff(Squash):
    """The identity, whose inverse clamps."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()

    def inverse(self, z: Tensor) -> Tensor:
        return z.clamp(-2, 2)


def test_an_inverse_that_cuts_off_is_not_said_to_bound_the_map():
    result = sampling(CutOff(), data().clamp(-2, 2))
    assert "wherever x lies" not in result.reason
    assert "its inverse cuts them off" in result.reason


class Constant(Squash):
    """The identity with an inverse that returns 0: its round trips are projections."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()

    def inverse(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)


class Overflows(Squash):
    """z = log x for x > 0, which lies everywhere; draws beyond 1 overflow on their way back."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 100

    def inverse(self, z: Tensor) -> Tensor:
        return torch.where(z.abs() > 1, z / 0, 100 * z)


@pytest.mark.parametrize("model", [Constant(), Overflows()], ids=lambda model: model.name)
def test_other_losses_are_not_put_down_to_the_range(model):
    result = sampling(model, data().float())
    assert result.verdict == "unstable"
    assert result.settings["cause"] == "model", result.reason
    assert "reach" not in result.reason


def test_maps_onto_everything_lose_nothing():
    result = sampling(Warp(3).double(), data())
    assert result.verdict == "stable"
    assert "unreached" not in result.values


def test_the_report_says_so_where_the_base_is_declared():
    def base(n: int) -> Tensor:
        return torch.randn(n, 3)

    report = ig.audit(Squash(), data(), level="quick", prior=base)
    assert report.uses["sampling"].verdict == "unstable"
    assert "does not reach" in report.uses["sampling"].reason
    assert any("end the map with one onto" in advice for advice in report.advice)
    inside = ig.audit(
        Squash(), data(), level="quick", prior=lambda n: 0.9 * (2 * torch.rand(n, 3) - 1)
    )
    assert inside.uses["sampling"].verdict == "stable"

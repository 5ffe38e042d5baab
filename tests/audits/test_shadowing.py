"""shadowing: lost round trips whose draws are right, and those whose draws are not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import inn_guard as ig
from inn_guard.audits.shadowing import shadowing
from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from tests.cases.toys import Embedding, Linear
from tests.jacobian.test_shadowing import chain, points


class WrongInverse(Invertible):
    """z = 2 x, with an inverse of its own: no exact orbit is near."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def inverse(self, z: Tensor) -> Tensor:
        return z / 2 + 1


class Loses(Invertible):
    """The identity, whose inverse overflows where z_0 > 2."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()

    def inverse(self, z: Tensor) -> Tensor:
        return torch.where(z[:, :1] > 2, math.inf, z)


def chaotic(depth: int = 40) -> Chain:
    return Chain(*chain(4, depth, 1.5))


def data(batch: int = 8, dimension: int = 4) -> Tensor:
    return 0.1 * points(batch, dimension, 3)


def test_lost_draws_are_right_where_an_exact_orbit_is_near():
    result = shadowing(chaotic(), data())
    assert result.verdict == "stable"
    assert result["lost_draws"] > 8
    assert 1e-8 < result["window_of_draws"] < 1e-4
    assert "lost draws are right to" in result.reason
    assert "although their round trips are lost" in result.reason
    assert "log p" not in result.reason
    assert not result.uses
    rows = result.tables["orbits"]
    assert len(rows) <= 8
    for row in rows:
        assert not row["round_trip_error"] <= 0.01
        assert max(row["start"], row["end"]) <= row["window"]
        assert row["converged"]


def test_latents_of_lost_data_are_followed_too():
    result = shadowing(chaotic(), data(), draws=16)
    kinds = [row["kind"] for row in result.tables["orbits"]]
    assert kinds.count("data") == 4
    assert kinds.count("draw") == 4
    assert result["window_of_data"] < 1e-4
    assert "latents of x are right to" in result.reason


def test_an_inverse_of_another_map_has_no_exact_orbit_near():
    result = shadowing(WrongInverse(), data())
    assert result.verdict == "unstable"
    assert result["window_of_draws"] > 0.1
    assert "from the nearest exact orbit" in result.reason
    assert "draws are right" not in result.reason


def test_draws_that_are_not_finite_have_no_orbit():
    result = shadowing(Loses(), data())
    assert result.verdict == "non_finite"
    assert result["non_finite_draws"] == result["lost_draws"] > 0
    assert result.reason.endswith("lost draws are not finite and have no orbit")


def test_where_nothing_is_lost_there_is_nothing_to_explain():
    result = shadowing(Linear(torch.eye(4, dtype=torch.float32)), data())
    assert result.verdict == "not_applicable"
    assert "nothing to explain" in result.reason


@pytest.mark.parametrize(
    ("model", "x", "why"),
    [
        (chaotic().double(), data().double(), "in float64 itself"),
        (Embedding(4, 2).float(), data(), "injective only"),
        (WrongInverse(), data(dimension=65), "up to 64 dimensions"),
    ],
    ids=["float64", "injective", "large"],
)
def test_what_cannot_be_followed_is_not_applicable(model, x, why):
    result = shadowing(model, x)
    assert result.verdict == "not_applicable"
    assert why in result.reason


def test_the_answer_depends_on_the_seed_only():
    first, again = (shadowing(chaotic(20), data(), seed=2, draws=32) for _ in range(2))
    assert first == again


def test_it_runs_in_an_audit_by_its_name_and_decides_no_use():
    report = ig.audit(chaotic(20), data(), checks=["shadowing"], uses=["density"])
    assert "shadowing" in report.names


@pytest.mark.parametrize(("name", "value"), [("samples", 9), ("samples", 0), ("draws", 2000)])
def test_wrong_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"expected {name} from 1 to"):
        shadowing(chaotic(4), data(), **{name: value})

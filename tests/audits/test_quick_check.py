"""quick_round_trip: closed forms, non-finite numbers, the same numbers as reconstruction has."""

from __future__ import annotations

import math

import pytest
import torch

from inn_guard.audits.quick_check import quick_round_trip
from inn_guard.audits.reconstruction import reconstruction
from inn_guard.core.invertible import Invertible
from inn_guard.report.verdict import Verdict
from tests.oracles.regularizers import Embedding, TwoCouplings


class OffBy(Invertible):
    """An inverse that is wrong by a known amount in one entry."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        return 2 * x

    def inverse(self, z):
        x = z / 2
        x[:, 0] += self.error
        return x


@pytest.mark.parametrize("scale", [1e-150, 1e-3, 1.0, 1e150])
@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (0.0, Verdict.STABLE),
        (0.0009, Verdict.STABLE),
        (0.009, Verdict.MARGINAL),
        (0.011, Verdict.UNSTABLE),
    ],
)
def test_the_error_in_units_of_the_data(scale, error, verdict):
    x = torch.full((3, 5), scale)
    result = quick_round_trip(OffBy(error * scale), x)
    assert result.verdict is verdict
    assert result.values["relative_error"] == pytest.approx(error, rel=1e-6, abs=1e-15)
    assert result.per_sample["relative_error"].shape == (3,)


def test_the_same_error_as_reconstruction_reports():
    model, x = TwoCouplings().double(), torch.randn(8, 6)
    assert torch.equal(
        quick_round_trip(model, x).per_sample["relative_error"],
        reconstruction(model, x).per_sample["relative_error"],
    )


def test_an_injective_map_is_judged_on_its_latents():
    result = quick_round_trip(Embedding(torch.randn(3, 6)), torch.randn(5, 6))
    assert result.verdict is Verdict.STABLE
    assert result.values["relative_error"] < 1e-13


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite(bad):
    x = torch.randn(9, 4)
    assert quick_round_trip(OffBy(bad), x).verdict is Verdict.NON_FINITE
    x[0] = bad
    kept = quick_round_trip(OffBy(0.0), x)
    assert kept.verdict is Verdict.STABLE
    assert kept.settings["samples"] == 8
    assert quick_round_trip(OffBy(0.0), x[:1]).verdict is Verdict.NON_FINITE

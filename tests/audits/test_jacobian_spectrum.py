"""jacobian_spectrum and full_spectrum: closed forms, extreme scales, rectangular maps, poisoned
samples.
"""

from __future__ import annotations

import math

import pytest
import torch

from inn_guard.audits.full_spectrum import full_spectrum
from inn_guard.audits.jacobian_spectrum import jacobian_spectrum
from inn_guard.layers.chain import Chain
from inn_guard.report.verdict import Verdict
from tests.cases.toys import Embedding, Linear, random_chain
from tests.oracles import transforms as reference


def diagonal(*values: float) -> Linear:
    return Linear(torch.diag(torch.tensor(values)))


def test_closed_form():
    result = jacobian_spectrum(diagonal(4.0, 2.0, 0.5), torch.randn(5, 3), tolerance=1e-8)
    assert result.values["sigma_max"] == pytest.approx(4)
    assert result.values["sigma_min"] == pytest.approx(0.5)
    assert result.values["condition_number"] == pytest.approx(8)
    assert result.values["log10_condition_number"] == pytest.approx(math.log10(8))
    assert result.verdict is Verdict.STABLE


def test_per_sample_values_are_those_of_dense_jacobians():
    model, x = random_chain(depth=3), torch.randn(4, 6)
    exact = reference.singular_values(reference.jacobian(model.forward, x))
    result = jacobian_spectrum(model, x, tolerance=1e-6)
    torch.testing.assert_close(result.per_sample["sigma_max"], exact[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(result.per_sample["sigma_min"], exact[:, -1], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        result.per_sample["condition_number"], exact[:, 0] / exact[:, -1], rtol=1e-5, atol=0
    )


def test_values_beyond_floats_are_powers_of_ten():
    model = Chain(*(diagonal(1e-20, 1.0) for _ in range(30)))
    result = jacobian_spectrum(model, torch.zeros(1, 2))
    assert result.values["log10_sigma_min"] == pytest.approx(-600)
    assert result.values["log10_condition_number"] == pytest.approx(600)
    assert result.values["condition_number"] == math.inf
    assert result.values["sigma_min"] == 0
    assert result.verdict is Verdict.UNSTABLE
    assert "1.0e+600" in result.reason


@pytest.mark.parametrize(
    ("condition", "dtype", "verdict"),
    [
        (1e3, torch.float32, Verdict.STABLE),
        (1e6, torch.float32, Verdict.UNSTABLE),
        (1e6, torch.float64, Verdict.STABLE),
        (1e15, torch.float64, Verdict.UNSTABLE),
    ],
)
def test_the_limit_is_a_condition_number_in_units_of_eps(condition, dtype, verdict):
    model = diagonal(1.0, 1 / condition).to_dtype(dtype)
    assert jacobian_spectrum(model, torch.randn(2, 2).to(dtype)).verdict is verdict


def test_singular_and_poisoned_are_findings():
    assert jacobian_spectrum(diagonal(1.0, 0.0), torch.randn(2, 2)).verdict is Verdict.NON_FINITE
    x = torch.randn(4, 2)
    x[2] = torch.nan
    result = jacobian_spectrum(diagonal(1.0, 2.0), x)
    assert result.verdict is Verdict.STABLE
    assert result.per_sample["sigma_max"].isnan().tolist() == [False, False, True, False]
    assert (
        jacobian_spectrum(diagonal(1.0, 2.0), torch.full((2, 2), torch.inf)).verdict
        is Verdict.NON_FINITE
    )


def test_rectangular_jacobians_of_an_injective_map():
    result = jacobian_spectrum(Embedding(8, 3, stretch=100.0), torch.randn(4, 8))
    assert result.values["decoder_sigma_max"] == pytest.approx(100)
    assert result.values["decoder_sigma_min"] == pytest.approx(1)
    assert result.values["encoder_sigma_max"] == pytest.approx(1)
    assert result.values["encoder_sigma_min"] == pytest.approx(0.01)
    assert result.values["encoder_condition_number"] == pytest.approx(100)


def test_full_spectrum_is_the_svd_and_labels_noise():
    model, x = random_chain(depth=2), torch.randn(3, 6)
    exact = reference.singular_values(reference.jacobian(model.forward, x))
    result = full_spectrum(model, x, samples=3)
    torch.testing.assert_close(result.per_sample["singular_values"], exact)
    noise = full_spectrum(diagonal(1.0, 1e-3, 1e-20), torch.randn(1, 3))
    assert noise.values["not_resolved"] == 1
    assert noise.values["smallest_resolved"] == pytest.approx(1e-3)
    assert noise.per_sample["singular_values"].isnan().tolist() == [[False, False, True]]
    assert "2 of 3" in noise.reason

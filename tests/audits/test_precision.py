"""precision: closed forms, non-finite models, refusals, and what the verdicts stand on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from inn_guard.audits.base import Verdict
from inn_guard.audits.precision import Arithmetic, arithmetics, precision
from inn_guard.invertible import Invertible
from tests.test_rounding_forecast import Diagonal, couplings


def rows(result):
    return {row["arithmetic"]: row for row in result.tables["arithmetic"]}


def data(*shape):
    return torch.randn(*shape, dtype=torch.float32)


class Offset(Invertible):
    """z = x + c: loses what is below eps(dtype) * c."""

    def __init__(self, offset):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float32))

    def forward(self, x):
        return x + self.offset

    def inverse(self, z):
        return z - self.offset


def test_a_large_offset_breaks_exactly_the_dtypes_too_coarse_for_it():
    """With |x| about 1 and c = 1000, the error is about 1000 u: 3e-5 in float32, 0.25 in fp16, 2 in bf16."""
    table = rows(precision(Offset(1000.0), data(64, 4)))
    measured = {name: row["measured verdict"] for name, row in table.items()}
    assert measured == {
        "float64": "works",
        "float32": "works",
        "bfloat16": "breaks",
        "float16": "breaks",
        "autocast bfloat16": "works",
    }
    assert table["float32"]["forecast verdict"] == "works"
    assert table["bfloat16"]["forecast verdict"] == "breaks"
    assert table["float16"]["forecast verdict"] in ("uncertain", "breaks")
    assert table["float32"]["measured"] == pytest.approx(table["float32"]["forecast"], rel=1.0)


def test_the_verdict_is_that_of_the_data_s_dtype():
    x = data(32, 4)
    assert precision(Offset(1.0), x).verdict is Verdict.STABLE
    assert precision(Offset(1e7), x).verdict is Verdict.UNSTABLE
    assert precision(Offset(1e7).double(), x.double()).verdict is Verdict.STABLE


def test_overflow_is_forecast_and_measured_as_non_finite():
    result = precision(Diagonal([1e6, 1e6]).float(), data(16, 2) + 3)
    fp16 = rows(result)["float16"]
    assert fp16["forecast"] == math.inf
    assert fp16["forecast verdict"] == "breaks"
    assert fp16["non-finite samples"] == 16
    assert result.verdict is Verdict.STABLE


def test_a_model_that_returns_nan_is_a_finding():
    class Poisoned(Offset):
        def inverse(self, z):
            return (z - self.offset) * math.nan

    result = precision(Poisoned(1.0), data(8, 3))
    assert result.verdict is Verdict.NON_FINITE
    assert math.isinf(result.values["float32_error"])


def test_a_dtype_that_the_model_refuses_is_said_so():
    class OnlyFloat32(Offset):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise RuntimeError("not implemented for this dtype")
            return super().forward(x)

    table = rows(precision(OnlyFloat32(1.0), data(8, 3)))
    assert table["float16"]["measured verdict"] == "refused"
    assert "not implemented" in table["float16"]["remark"]
    assert table["float32"]["measured verdict"] == "works"


def test_no_forecast_without_a_differentiable_inverse_but_still_a_measurement():
    class Rounded(Invertible):
        def forward(self, x):
            return x.round()

        def inverse(self, z):
            return z

    table = rows(precision(Rounded(), data(8, 300) * 100))
    assert table["float32"]["measured verdict"] == "works"
    assert table["float32"]["forecast verdict"] in ("none", "breaks")


def test_forecast_and_measurement_of_a_coupling_stack_agree_where_decided():
    torch.manual_seed(1)
    table = rows(precision(couplings(8, 16, 2.0).float(), data(128, 8)))
    for row in table.values():
        if row["forecast verdict"] in ("works", "breaks"):
            assert row["measured verdict"] == row["forecast verdict"], row


def test_own_candidates():
    result = precision(Offset(1.0), data(8, 3), candidates=[Arithmetic("bfloat16", torch.bfloat16)])
    assert list(rows(result)) == ["bfloat16"]
    assert [a.name for a in arithmetics(torch.device("cpu"))][-1] == "autocast bfloat16"

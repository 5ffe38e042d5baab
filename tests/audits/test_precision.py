"""precision: closed forms, non-finite models, refusals, and what the verdicts stand on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from inn_guard.audits import AUDITS, Level, checks_of_level, fault_tolerant
from inn_guard.audits.precision.audit import precision
from inn_guard.audits.precision.number_format import NumberFormat, number_formats
from inn_guard.audits.reconstruction import reconstruction
from inn_guard.audits.thresholds import max_usable_error
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable
from inn_guard.report.verdict import Verdict
from tests.cases.all import CASES
from tests.execution.clocks import hangs
from tests.jacobian.test_rounding_error import Diagonal, couplings
from tests.oracles.regularizers import Embedding


def rows(result):
    return {row["number format"]: row for row in result.tables["number format"]}


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


class Endless(Offset):
    """Its inverse iterates until the residual is below what only float32 and finer can reach, as a
    solver may.
    """

    def inverse(self, z):
        x = z - self.offset
        while float((x + self.offset - z).abs().max()) + torch.finfo(z.dtype).eps > 1e-4:
            hangs()
        return x


def test_a_round_trip_that_does_not_return_is_given_up(monkeypatch, only_hangs_time_out):
    monkeypatch.setattr(fault_tolerant, "LEAST", 0.3)
    monkeypatch.setattr(fault_tolerant, "FACTOR", 0.0)
    result = precision(Endless(0.0), data(4, 3))
    table = rows(result)
    assert result.verdict is Verdict.STABLE
    for name in ("bfloat16", "float16"):
        assert table[name]["measured verdict"] == "breaks"
        assert table[name]["remark"] == "did not return: interrupted after 0.3 s"
    assert table["float32"]["measured verdict"] == "works"


def test_a_large_offset_breaks_exactly_the_dtypes_too_coarse_for_it():
    """With |x| about 1 and c = 1000, the error is about 1000 u: 3e-5 in float32, 0.25 in fp16, 2
    in bf16.
    """
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

    table = rows(precision(Rounded(), data(8, 300) * 1000))
    assert table["float32"]["measured verdict"] == "works"
    assert table["float32"]["forecast verdict"] in ("none", "uncertain")


@pytest.mark.thorough
def test_forecast_and_measurement_of_a_coupling_stack_agree_where_decided():
    torch.manual_seed(1)
    table = rows(precision(couplings(8, 16, 2.0).float(), data(128, 8)))
    for row in table.values():
        if row["forecast verdict"] in ("works", "breaks"):
            assert row["measured verdict"] == row["forecast verdict"], row


def test_a_sample_of_nearly_zero_is_held_to_the_size_of_its_neighbours():
    """z = x + 1 loses 6e-8 of everything: all of a sample of 1e-9, and nothing that matters beside
    its neighbours.
    """
    x = data(64, 6)
    x[3], x[40] = 1e-9, 0.0
    result = precision(Offset(1.0), x)
    assert result.verdict is Verdict.STABLE
    assert result.per_sample["error"].max() < 1e-6
    assert rows(result)["float32"]["forecast verdict"] == "works"
    alone = precision(Offset(1.0), torch.full((4, 6), 1e-9, dtype=torch.float32))
    assert alone.verdict is Verdict.UNSTABLE


def test_what_is_usable_follows_the_dtype():
    """An offset of 5 costs bfloat16 some per cent of x: no more than it holds, so it works."""
    table = rows(precision(Offset(5.0), data(128, 4)))
    assert table["bfloat16"]["usable"] == max_usable_error(torch.bfloat16) == 0.0625
    assert table["float32"]["usable"] == table["float16"]["usable"] == 1e-2
    assert 1e-2 < table["bfloat16"]["measured"] < 0.0625
    assert table["bfloat16"]["measured verdict"] == "works"
    strict = rows(precision(Offset(5.0), data(128, 4), usable=1e-2))
    assert strict["bfloat16"]["measured verdict"] == "breaks"


def test_reconstruction_and_precision_judge_a_bfloat16_model_alike():
    for offset, failed in ((1.0, False), (100.0, True)):
        model, x = Offset(offset).bfloat16(), data(64, 4).bfloat16()
        assert precision(model, x).verdict.failed is failed
        assert reconstruction(model, x).verdict.failed is failed


def test_a_forecast_without_a_float64_copy_comes_from_derivatives():
    class Single(Offset):
        def to_dtype(self, dtype):
            if dtype == torch.float64:
                raise NotApplicable("no float64 here")
            return super().to_dtype(dtype)

    x = data(64, 4)
    plain, single = (
        rows(precision(model, x))["float32"] for model in (Offset(100.0), Single(100.0))
    )
    assert single["forecast"] == pytest.approx(plain["forecast"], rel=0.3)
    assert single["remark"] == ""


def test_own_candidates():
    result = precision(
        Offset(1.0), data(8, 3), candidates=[NumberFormat("bfloat16", torch.bfloat16)]
    )
    assert list(rows(result)) == ["bfloat16"]
    assert [a.name for a in number_formats(torch.device("cpu"))][-1] == "autocast bfloat16"


class Times(Invertible):
    """z = 3 x, without parameters: in any dtype."""

    def forward(self, x):
        return 3 * x

    def inverse(self, z):
        return z / 3


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1.0, 1e150, 1e300])
def test_errors_are_relative_at_any_scale(scale):
    """Squares of these data overflow or vanish in float64; the round trip's relative error is the
    same for all.
    """
    x = torch.randn(32, 5) * scale
    row = rows(precision(Times(), x))["float64"]
    assert 0 < row["measured"] < 2e-16
    assert row["forecast"] == pytest.approx(
        rows(precision(Times(), x / scale))["float64"]["forecast"], rel=1e-6
    )
    assert row["forecast verdict"] == "works"


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_data_that_a_dtype_cannot_hold_do_not_work_in_it(scale):
    """float16 holds 6e-8 to 65504; below, it makes them 0, whose round trip would be exact."""
    table = rows(precision(Times(), data(16, 4).double().clamp(min=0.1).float() * scale))
    assert table["float16"]["measured verdict"] == "breaks"
    assert table["float16"]["forecast verdict"] != "works"
    assert "16 samples do not fit the range" in table["float16"]["remark"]
    assert {table[name]["measured verdict"] for name in ("float64", "float32", "bfloat16")} == {
        "works"
    }


def test_denormal_data_are_not_called_exact():
    result = precision(Times(), torch.full((4, 3), 3e-323))
    assert result.tables["number format"][0]["forecast verdict"] == "uncertain"
    assert rows(result)["float32"]["measured verdict"] == "breaks"


def test_one_sample_and_zero_data():
    assert precision(Offset(1.0), data(1, 3)).settings["probes"] == 2
    zero = precision(Offset(1.0), torch.zeros(4, 3, dtype=torch.float32))
    assert zero.verdict is Verdict.STABLE
    assert zero.values["float32_error"] == 0


def test_samples_that_are_not_finite_are_left_out():
    x = data(8, 3)
    x[1, 0], x[5, 2] = math.nan, math.inf
    result = precision(Offset(1.0), x)
    assert result.verdict is Verdict.STABLE
    assert result.per_sample["error"].isnan().nonzero()[:, 0].tolist() == [1, 5]
    assert precision(Offset(1.0), x[[1, 5]]).verdict is Verdict.NON_FINITE


class ByContext(Invertible):
    """z = x + c with c of its own for every sample."""

    def forward(self, x):
        return x + self.context

    def inverse(self, z):
        return z - self.context


def test_a_condition_stays_with_its_sample():
    offsets = torch.tensor([[1.0], [1e7], [1.0], [1e7]], dtype=torch.float32)
    x = data(4, 30)
    x[0, 0] = math.nan
    error = precision(ByContext().with_context(offsets), x).per_sample["error"]
    assert error[2] < 1e-5
    assert error[1] > 0.1
    assert error[3] > 0.1


def test_an_injective_map_is_measured_on_its_manifold():
    """On it the round trip is exact but for rounding; x itself is far from it."""
    result = precision(Embedding(torch.randn(3, 6)), torch.randn(16, 6))
    assert result.verdict is Verdict.STABLE
    table = rows(result)
    assert table["float64"]["measured"] < 1e-14
    assert 1e-9 < table["float32"]["measured"] < 1e-5
    assert table["float64"]["forecast verdict"] == "none"
    assert "injective" in table["float64"]["remark"]
    assert result.settings["start"] == "F^-1(F(x))"


class Raises(Times):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def inverse(self, z):
        if z.dtype != torch.float64:
            raise self.error
        return super().inverse(z)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (AssertionError("discriminant"), "breaks"),
        (ValueError("discriminant"), "breaks"),
        (torch.linalg.LinAlgError("singular"), "breaks"),
        (NotImplementedError("no such kernel"), "refused"),
        (RuntimeError("no such kernel"), "refused"),
        (KeyError("dtype"), "refused"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_what_a_model_raises_is_told_apart(error, verdict):
    """A check of its own numbers that fails is a broken inverse; an operation that is missing is a
    refusal.
    """
    result = precision(Raises(error), torch.randn(8, 3))
    table = rows(result)
    assert table["float32"]["measured verdict"] == verdict
    assert type(error).__name__ in table["float32"]["remark"]
    assert result.verdict is Verdict.STABLE
    assert ("float32_error" in result.values) == (verdict != "refused")
    assert (table["float32"]["measured"] is None) == (verdict == "refused")


def test_a_model_that_cannot_be_converted_is_refused_in_other_dtypes_only():
    class KnownConstants(Times):
        def to_dtype(self, dtype):
            raise TypeError("cannot be copied")

    result = precision(KnownConstants(), torch.randn(8, 3))
    assert {row["measured verdict"] for row in result.tables["number format"]} == {
        "works",
        "refused",
    }
    assert result.verdict is Verdict.STABLE


def test_a_half_precision_model_is_forecast_from_float32():
    row = rows(precision(Offset(30.0).half(), data(64, 4).half()))["float16"]
    assert row["measured"] == pytest.approx(row["forecast"], rel=1.0)


def test_nothing_is_left_behind():
    model = couplings(4, 2, 1.0).train()
    model(torch.randn(3, 4)).sum().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    x, state = torch.randn(4, 4), torch.get_rng_state()
    precision(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    for (value, grad), p in zip(before, model.parameters(), strict=True):
        assert torch.equal(value, p)
        assert torch.equal(grad, p.grad)


def test_it_is_among_the_standard_checks():
    assert AUDITS["precision"] is precision
    assert precision in checks_of_level(Level.STANDARD)
    assert precision not in checks_of_level(Level.QUICK)


@pytest.mark.parametrize(
    "settings", [{"candidates": []}, {"usable": 0.0}, {"usable": math.nan}, {"probes": 0}]
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        precision(Times(), torch.randn(3, 2), **settings)


def test_the_reason_names_the_number_format_that_was_judged():
    own = precision(Times(), torch.randn(4, 3))
    assert "In float64, the dtype of the data," in own.reason
    other = precision(
        Times(), torch.randn(4, 3), candidates=[NumberFormat("bfloat16", torch.bfloat16)]
    )
    assert other.reason.startswith("In bfloat16, 95 %")


@pytest.mark.parametrize(
    "cases",
    [CASES[::80], pytest.param(CASES, marks=pytest.mark.thorough)],
    ids=["an eightieth", "every case"],
)
def test_the_forecast_is_right_where_it_decides(cases):
    """At least 99 % of the decided pairs of model and number format.

    A missing operation is no answer to compare with, nor is a round trip that was given up: no
    error was measured.
    """
    decided, wrong = 0, []
    for case in cases:
        model, x = case.make()
        for row in precision(model, x).tables.get("number format", ()):
            answered = (
                row["measured verdict"] != "refused" and "did not return" not in row["remark"]
            )
            if row["forecast verdict"] in ("works", "breaks") and answered:
                decided += 1
                if row["forecast verdict"] != row["measured verdict"]:
                    wrong.append((case.id, row))
    assert decided > 1.3 * len(cases)
    assert len(wrong) <= 0.01 * decided, wrong


def test_a_half_precision_model_that_autocast_refuses_is_no_crash():
    class Mixes(Offset):
        def forward(self, x):
            return torch.cat([super().forward(x), x[:, :0]], dim=1)

        def inverse(self, z):
            return torch.cat([z - self.offset, z[:, :0]], dim=1)

    result = precision(Mixes(0.5).half(), data(4, 1).half())
    assert rows(result)["float16"]["lost of 256 draws"] == 0

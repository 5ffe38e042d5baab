"""Pages of a training run, and the figure of the precision check: both show what was measured."""

from __future__ import annotations

import math
import re

import pytest
import torch

from inn_guard.audits.gradient_angle import gradient_angle
from inn_guard.audits.precision.audit import precision
from inn_guard.audits.quick_check import quick_round_trip
from inn_guard.audits.run import audit
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.report.history_page import render_history, write_history
from inn_guard.report.html import render
from inn_guard.report.plots import forecast_against_measured, history
from inn_guard.training.actions import AdaptCoefficient
from inn_guard.training.audit_hook import AuditHook
from inn_guard.training.records import CsvRecorder, read_csv
from inn_guard.training.regularizers import AdaptiveCoefficient, NormalizingFlowLoss
from tests.oracles.regularizers import TwoCouplings


def rows(values, name="reconstruction.relative_error", verdict="stable"):
    return [{"step": 10 * k, "verdict": verdict, name: value} for k, value in enumerate(values)]


def titles(page):
    return re.findall(r"<h4>(.*?)</h4>", page)


def test_a_run_from_its_csv_file(tmp_path):
    model, x = Chain(AffineCoupling(MLP([3, 8, 6]))), torch.randn(8, 6)
    coefficient = AdaptiveCoefficient(NormalizingFlowLoss(1.0), target=10.0)
    hook = AuditHook(
        model, every=1, checks=["jacobian_spectrum", quick_round_trip, gradient_angle],
        record=CsvRecorder(tmp_path / "h.csv"), actions=[AdaptCoefficient(coefficient)],
    )  # fmt: skip
    for _ in range(3):
        hook(x)
    write_history(read_csv(tmp_path / "h.csv"), tmp_path / "h.html", name="my <b>run</b>")
    page = (tmp_path / "h.html").read_text()
    assert titles(page)[:4] == [
        "Jacobian spectrum: condition number",
        "Gradient angle: max angle",
        "Quick round trip: relative error",
        "Coefficient",
    ]
    assert "Jacobian spectrum: log10 condition number" not in page
    assert "my &lt;b&gt;run&lt;/b&gt;" in page
    assert "<b>run" not in page
    assert "3 audits between steps 0 and 2, none with findings." in page


def test_captions_say_what_was_measured():
    drawn = history("a.b", [0, 5, 9], [1.0, 3.0, 2.5], failed=[False, True, False])
    assert (
        drawn.caption
        == "From 1 at step 0 to 2.5 at step 9. In orange: the 1 of 3 audits with findings."
    )
    assert drawn.title == "A: b"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_without_a_place_are_said(bad):
    drawn = history("x", [0, 1, 2], [1e-9, bad, 1e9], failed=[False] * 3)
    assert "Vertical lines: 1 of 3 steps with NaN or Inf." in drawn.caption
    assert "no finite number" in history("x", [0, 1], [bad, bad], failed=[True, True]).markup


def test_positions_on_the_axis():
    """On a logarithmic axis equal ratios are equal distances, and the larger value lies higher."""
    drawn = history("x", [0, 1, 2], [1e-3, 1.0, 1e3], failed=[True] * 3)
    heights = [
        float(y) for y in re.findall(r'<use [^>]*?y="([\d.]+)"[^>]*?var\(--high\)', drawn.markup)
    ]
    assert len(heights) == 3
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.01)
    assert heights[0] > heights[2]


@pytest.mark.parametrize(
    "values",
    [[0.0], [1.0] * 5, [1e300, 1e-300], [-1.0, 1e308], [5e-324], [float(k) for k in range(500)]],
)
def test_any_numbers_can_be_drawn(values):
    assert "<svg" in render_history(rows(values))


def test_the_logarithm_stands_in_where_the_number_fits_no_float():
    audits = [
        {
            "step": k,
            "verdict": "unstable",
            "s.condition_number": value,
            "s.log10_condition_number": power,
        }
        for k, (value, power) in enumerate([(10.0, 1.0), (math.inf, 400.0)])
    ]
    assert titles(render_history(audits)) == ["S: condition number"]
    assert "10⁴⁰⁰" in render_history(audits)
    assert titles(render_history(audits[:1])) == ["S: condition number"]


def test_the_worst_verdict_and_its_first_step():
    page = render_history(rows([1.0, 1.0, 1.0]) + rows([2.0], verdict="non_finite"))
    assert "1 of 4 audits has findings, at step 0. NaN or Inf came out of the model." in page
    assert "Not finite" in page


def test_a_clean_run_says_nothing_more():
    page = render_history(rows([1.0] * 6))
    assert "6 audits between steps 0 and 50, none with findings.</p>" in page
    marginal = render_history(rows([1.0, 2.0], verdict="marginal"))
    assert "none with findings. The worst verdict is marginal.</p>" in marginal
    assert "One audit, at step 0. Errors stay below" in render_history(rows([1.0]))


def test_several_findings_name_the_first():
    page = render_history(rows([1.0, 2.0, 3.0], verdict="unstable"))
    assert "3 of 3 audits have findings, the first one at step 0. An error exceeds" in page


def test_zeros_have_no_line_and_are_counted():
    drawn = history("x", [0, 1, 2], [1e-9, 0.0, 1e9], failed=[False] * 3)
    assert "Not drawn: 1 of 3 steps, zero or negative." in drawn.caption
    assert "Vertical" not in drawn.caption


def test_what_is_no_history_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        write_history([], tmp_path / "h.html")
    with pytest.raises(ValueError, match="a step and a verdict"):
        write_history([{"step": 1, "verdict": "fine"}], tmp_path / "h.html")
    with pytest.raises(TypeError, match=r"pass read_csv\('stab.csv'\)|rows"):
        write_history("stab.csv", tmp_path / "h.html")
    with pytest.raises(TypeError, match=r"map\(Record.row, records\)|rows"):
        write_history([3], tmp_path / "h.html")
    assert not list(tmp_path.iterdir())


def test_the_precision_section_has_its_plot_and_its_table():
    report = audit(TwoCouplings().double(), torch.randn(16, 6), checks=["precision"])
    page = render(report)
    assert "Forecast and measurement in each number format" in titles(page)
    right = 0
    for row in report["precision"].tables["number format"]:
        assert row["number format"] in page
        right += row["forecast verdict"] in ("works", "breaks")
    assert f"The forecast decides {right} of 5 number formats and is right in {right} of" in page


def both(forecast, measured):
    return {"forecast verdict": forecast, "measured verdict": measured}


def test_the_precision_plot_says_what_it_cannot_place():
    table = [
        {"usable": 0.01, "forecast": 1e-9, "measured": 0.0, **both("works", "works")},
        {"forecast": math.inf, "measured": math.inf, "measured verdict": "breaks"},
        {"forecast": math.nan, "measured": math.inf, "measured verdict": "refused"},
        {"forecast": 1e-3, "measured": 1e3, **both("works", "breaks")},
        {"forecast": 1e-3, "measured": None},
    ]
    for name, row in zip(("a", "b", "c", "<d>", "e"), table, strict=True):
        row["number format"] = name
    drawn = forecast_against_measured(table)
    for word in ("exact", "measured Inf", "refused", "&lt;d&gt;", "not measured"):
        assert word in drawn.markup
    assert "decides 2 of 5 number formats and is right in 1" in drawn.caption


def test_a_model_that_is_nowhere_finite_has_a_precision_section():
    model = TwoCouplings().double()
    with torch.no_grad():
        model.networks[0][0].weight.fill_(math.nan)
    result = precision(model, torch.randn(4, 6))
    assert "measured Inf" in forecast_against_measured(result.tables["number format"]).markup

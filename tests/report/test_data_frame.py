"""Tables hold every measured number as it is."""

from __future__ import annotations

import math

from inn_guard.report.audit_report import AuditReport
from inn_guard.report.data_frame import frame, layer_frame
from inn_guard.report.result import AuditResult, Verdict
from tests.report.examples import unstable_report


def test_one_row_per_value_with_nan_and_inf_as_they_are():
    report = unstable_report()
    table = frame(report)
    assert list(table.columns) == ["check", "verdict", "quantity", "value", "unit"]
    assert len(table) == sum(len(result.values) for result in report.results)
    row = table[(table.check == "reconstruction") & (table.quantity == "max_error")].iloc[0]
    assert (row.verdict, row.value, row.unit) == ("non_finite", math.inf, "units of x")
    assert math.isnan(table[table.quantity == "nan_value"].value.item())


def test_layers_keep_their_order_and_each_check_its_columns():
    other = AuditResult(
        "other", Verdict.STABLE, "fine", per_layer=({"index": 7, "name": "Linear", "slope": 2.0},)
    )
    report = AuditReport((*unstable_report(layers=3).results, other))
    table = layer_frame(report)
    assert list(table["index"]) == [1, 3, 5, 7]
    assert list(table.check) == ["layer_blame"] * 3 + ["other"]
    assert list(table["name"][:3]) == ["ActNorm", "InvertibleConv1x1", "AffineCoupling"]
    assert table.slope.iloc[-1] == 2.0
    assert table.gain.isna().iloc[-1]


def test_empty_reports_give_empty_tables_with_their_columns():
    assert frame(AuditReport(())).empty
    assert "value" in frame(AuditReport(())).columns
    assert list(layer_frame(AuditReport(())).columns) == ["check", "index", "name"]


def test_report_offers_the_table():
    report = unstable_report()
    assert report.to_frame().equals(frame(report))

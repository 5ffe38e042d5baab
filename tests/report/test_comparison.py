"""Reports next to each other: one row per use."""

from __future__ import annotations

import re

import pytest

from inn_guard.report.audit_report import AuditReport
from inn_guard.report.comparison import compare
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict
from tests.report.examples import finding, unstable_report

EVIL = "<b>plain</b>"


def stable_report() -> AuditReport:
    found = finding("stable", 1e-6, 0.1, "nats")
    check = AuditResult("density", Verdict.STABLE, found.reason, uses={"density": found})
    return AuditReport((check,), "Flow")


def test_it_prints_as_a_table_of_verdicts_and_figures():
    comparison = compare({"before": unstable_report(), "after": stable_report()})
    lines = str(comparison).splitlines()
    assert repr(comparison) == str(comparison)
    assert lines[0].split() == ["before", "after"]
    assert lines[1].split() == ["density", "stable", "3.1e-13", "stable", "1e-06"]
    assert lines[2].split() == ["reconstruction", "non_finite", "inf", "not", "measured"]
    assert lines[-1].split() == ["verdict", "non_finite", "stable"]


def test_many_reports_are_one_line_each():
    reports = {f"net {k}": stable_report() for k in range(5)}
    lines = str(compare(reports)).splitlines()
    assert lines[0].split() == ["density", "verdict"]
    assert [line.split() for line in lines[1:]] == [
        ["net", str(k), "stable", "1e-06", "stable"] for k in range(5)
    ]


def test_what_is_not_counted_is_in_brackets():
    found = finding("unstable", 2.0, 0.1, "nats")
    check = AuditResult("density", Verdict.UNSTABLE, found.reason, uses={"density": found})
    assert "(unstable 2)" in str(compare({"a": AuditReport((check,), counted={})}))


def test_it_is_a_collection_of_reports():
    report = stable_report()
    comparison = compare({"a": report, 2: report})
    assert list(comparison) == ["a", "2"]
    assert len(comparison) == 2
    assert comparison["2"] is report
    assert comparison.uses == ("density",)


def test_the_frame_has_a_row_per_report_and_use():
    table = compare({"before": unstable_report(), "after": stable_report()}).to_frame()
    columns = ["report", "use", "verdict", "figure", "limit", "unit", "counted"]
    assert list(table.columns) == columns
    assert list(table.report) == ["before", "before", "after"]
    row = table[(table.report == "after") & (table.use == "density")].iloc[0]
    assert (row.verdict, row.figure, row.limit, row.unit) == ("stable", 1e-6, 0.1, "nats")


def test_the_page_has_a_coloured_table_and_a_section_per_model(tmp_path):
    compare({EVIL: unstable_report(), "after": stable_report()}).to_html(tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "<b>plain" not in page
    assert "&lt;b&gt;plain" in page
    assert '<td class="tone non_finite">' in page
    assert '<td class="tone stable">' in page
    targets = re.findall(r'href="#([\w-]+)"', page)
    assert {"model-0-uses", "model-1-uses"} <= set(targets)
    for target in targets:
        assert f'id="{target}"' in page
    assert "Bound the scales of layer 23." in page
    assert "<script" not in page


def test_notebooks_show_the_same_table_escaped():
    shown = compare({EVIL: unstable_report()})._repr_html_()
    assert "<td>&lt;b&gt;plain&lt;/b&gt;</td>" in shown
    assert "<td>reconstruction</td><td>non_finite inf</td>" in shown


def test_anything_but_named_reports_is_refused():
    with pytest.raises(TypeError, match="reports"):
        compare([stable_report()])
    with pytest.raises(TypeError, match="AuditReport"):
        compare({"a": {}})
    with pytest.raises(ValueError, match="at least one report"):
        compare({})

"""A report prints as a table, is a collection of results, and is written in four formats."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from inn_guard.report.audit_report import NAMED, AuditReport
from inn_guard.report.from_json import from_json, load
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict
from tests.report.examples import finding, one_result_report, unstable_report

LONG = "a reason that goes on " * 20


def use_report(label="stable", figure=1e-6, **fields) -> AuditReport:
    """A report whose one check decides density."""
    found = finding(label, figure, 0.1, "nats")
    check = AuditResult("density", found.verdict, found.reason, uses={"density": found})
    return AuditReport((check,), "Flow", **fields)


def test_the_repr_is_the_table_failing_uses_first():
    report = unstable_report()
    lines = repr(report).splitlines()
    assert repr(report) == str(report)
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("Glow (FrEIA), 64 dimensions, float32, 64 samples  ")
    assert lines[0].endswith("1 of 2 uses FAILS")
    assert lines[2].split()[:2] == ["reconstruction", "FAILS"]
    assert lines[3].split()[:2] == ["density", "ok"]
    text = str(report)
    assert "weakest layer    layer 23 (Squeeze)" in text
    assert "what to do       1. Bound the scales of layer 23." in text
    assert "\n                   ig.RegularizerHook(flow, [ig.FiniteDifferences(1.0)])" in text
    assert lines[-1] == 'details: print(report.details()), report.to_html("report.html")'


def test_the_table_has_at_most_100_columns_whatever_is_in_it():
    found = finding("unstable", 1.0, 0.1, "nats", reason=LONG)
    check = AuditResult("density", Verdict.UNSTABLE, LONG, uses={"density": found})
    report = AuditReport((check,), "A model with a long name, " * 3, advice=(LONG, LONG))
    report = dataclasses.replace(report, settings={"dimensions": 10**9, "samples": 10**9})
    for line in str(report).splitlines()[2:]:
        assert len(line) <= 100


def test_a_library_that_the_name_holds_already_is_not_repeated():
    report = AuditReport((), "Flow (nflows)", {"library": "nflows"})
    assert report.subject == "Flow (nflows)"


@pytest.mark.parametrize(
    ("report", "headline"),
    [
        (use_report(), "ok"),
        (use_report("marginal"), "ok, some marginal"),
        (use_report("undecided"), "UNDECIDED"),
        (use_report("unstable"), "FAILS"),
        (use_report("not_applicable"), "NOT APPLICABLE"),
        (AuditReport(()), "UNDECIDED"),
        (one_result_report(Verdict.STABLE), "STABLE"),
    ],
)
def test_the_headline_counts_the_uses(report, headline):
    assert report.headline == headline
    assert str(report).splitlines()[0].endswith(headline)


def test_what_is_not_counted_does_not_decide():
    report = use_report("unstable", counted={})
    assert report.verdict is Verdict.UNDECIDED
    assert report.failed == ()
    assert "-         off by 1.0e-06 nats (limit 0.1) (unstable, not counted)" in str(report)
    counted = use_report("unstable", counted={"density": "every model declares it"})
    assert counted.verdict is Verdict.UNSTABLE
    assert [use.use for use in counted.failed] == ["density"]


def test_a_use_that_was_named_and_not_measured_is_undecided():
    report = use_report(counted={"density": NAMED, "sampling": NAMED})
    assert report.verdict is Verdict.UNDECIDED
    assert report.uses["sampling"].reason == "not measured"
    assert "sampling         undecided not measured" in str(report)


def test_a_check_that_decides_no_use_counts_if_it_was_asked_for():
    spectrum = AuditResult("jacobian_spectrum", Verdict.UNSTABLE, "too large")
    assert AuditReport((spectrum,), asked=("jacobian_spectrum",)).verdict is Verdict.UNSTABLE
    assert AuditReport((spectrum,), asked=()).verdict is Verdict.UNDECIDED
    assert AuditReport((spectrum,)).verdict is Verdict.UNSTABLE
    assert AuditReport((AuditResult("preflight", Verdict.STABLE, ""),)).verdict == "undecided"


def test_the_worst_check_decides_a_use_and_the_first_of_equals_speaks():
    checks = []
    for name, label in (("a", "stable"), ("b", "unstable"), ("c", "unstable")):
        found = finding(label, 1.0, 0.1, "nats", reason=name)
        checks.append(AuditResult(name, found.verdict, name, uses={"density": found}))
    use = AuditReport(tuple(checks)).uses["density"]
    assert (use.verdict, use.check, use.reason) == ("unstable", "b", "b")


def test_the_details_hold_every_check():
    text = unstable_report().details()
    for result in unstable_report():
        assert result.name in text
    assert "relative error inf of the feature, max error inf units of x" in text
    assert "What to do: Look at layer 23 first." in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_report_is_a_collection_of_results():
    report = unstable_report()
    names = ["log_det", "reconstruction", "jacobian_spectrum", "layer_blame", "gradient_angle"]
    assert [result.name for result in report] == names
    assert len(report) == 5
    assert list(report.keys()) == names
    assert list(report.items())[1] == ("reconstruction", report["reconstruction"])
    assert "reconstruction" in report
    assert "density" not in report
    assert 3 not in report


def test_a_name_that_is_no_check_gets_a_hint():
    report = unstable_report()
    with pytest.raises(KeyError, match=r"no check 'reconstrucion' .* it has log_det, reconstruct"):
        report["reconstrucion"]
    with pytest.raises(KeyError, match=r"'density' is a use: report\.uses\['density'\]"):
        report["density"]


def test_equal_reports_have_equal_hashes():
    assert unstable_report() == unstable_report()
    assert hash(unstable_report()) == hash(unstable_report())
    assert unstable_report() != unstable_report(samples=32)
    assert unstable_report() != dataclasses.replace(unstable_report(), model="other")
    assert unstable_report() != 3


def test_the_dictionary_is_json_and_names_every_use():
    content = unstable_report().to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["schema"] == 2
    assert content["verdict"] == "non_finite"
    assert content["uses"]["reconstruction"]["figure"] == "inf"
    assert content["uses"]["density"]["check"] == "log_det"
    assert content["worst_layer"] == "layer 23 (Squeeze)"
    assert len(content["results"]) == 5


def test_json_comes_back_from_text_and_from_a_file(tmp_path):
    report = unstable_report()
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == text
    for back in (from_json(text), load(tmp_path / "report.json")):
        assert back.to_json() == text
        assert back.verdict is report.verdict
        assert str(back) == str(report)
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]


def test_markdown_has_a_table_and_code_and_no_foreign_markup():
    found = finding("unstable", 1.0, 0.1, "nats", reason="a|b *c* `d` <e>\nf")
    check = AuditResult("density", Verdict.UNSTABLE, "", uses={"density": found})
    report = AuditReport((check,), "my_model", advice=("Do *this*:\nhook = f(a_b)",))
    text = report.to_markdown()
    assert "**my\\_model: FAILS**" in text
    assert "| density | unstable | a\\|b \\*c\\* \\`d\\` \\<e\\> f |" in text
    assert "1. Do \\*this\\*:" in text
    assert "   ```python\n   hook = f(a_b)\n   ```" in text


def test_notebooks_show_an_escaped_table_without_matplotlib():
    evil = "<script>alert(1)</script>"
    found = finding("unstable", 1.0, 0.1, "nats", reason=evil)
    check = AuditResult("density", Verdict.UNSTABLE, evil, uses={"density": found})
    shown = AuditReport((check,), evil, advice=(f"{evil}\n{evil}",))._repr_html_()
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;") == 4
    assert "<td>density</td><td>unstable</td>" in shown


def test_figures_are_svg_files_of_their_own():
    figures = unstable_report().figures()
    assert "reconstruction_worst_entry_of_each_round_trip" in figures
    assert "layer_blame_decimal_digits_lost_in_each_layer" in figures
    for name, svg in figures.items():
        assert name.isidentifier()
        assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
        assert "var(" not in svg


ABSENT = """
import sys
for name in {missing}:
    sys.modules[name] = None
from inn_guard.report.from_json import load
report = load(sys.argv[1])
{code}
"""


def run_without(missing, code, path):
    text = ABSENT.format(missing=missing, code=code)
    command = [sys.executable, "-c", text, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_reading_and_text_need_neither_pandas_nor_matplotlib_nor_jinja2(tmp_path):
    unstable_report().to_json(tmp_path / "r.json")
    code = (
        "print(report, report.details(), report.to_json(), report.to_markdown(), "
        "report._repr_html_())"
    )
    done = run_without(["pandas", "matplotlib", "jinja2"], code, tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert "FAILS" in done.stdout


@pytest.mark.parametrize(
    ("missing", "code", "message"),
    [
        ("jinja2", "report.to_html('r.html')", "to_html needs jinja2 and matplotlib; jinja2"),
        ("matplotlib", "report.figures()", "figures needs matplotlib; matplotlib"),
        ("pandas", "report.to_frame()", "to_frame needs pandas; pandas"),
    ],
)
def test_an_absent_library_is_named_with_the_remedy(tmp_path, missing, code, message):
    unstable_report().to_json(tmp_path / "r.json")
    done = run_without([missing], code, tmp_path / "r.json")
    expected = f"ImportError: {message} cannot be found: pip install '.[report]'"
    assert done.stderr.splitlines()[-1] == expected

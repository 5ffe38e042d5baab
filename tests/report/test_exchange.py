"""Reports for other tools: what they must be able to read."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree

from inn_guard.report.audit_report import AuditReport
from inn_guard.report.result import AuditResult
from inn_guard.report.uses import Finding
from inn_guard.report.verdict import Verdict


def report(figure=0.5, name="flow \x00 <b>&"):
    verdict = Verdict.UNSTABLE if math.isfinite(figure) else Verdict.NON_FINITE
    finding = Finding(verdict, figure, 0.1, "nats", f"off by {figure} <nats>", 64, 64)
    passed = Finding(Verdict.STABLE, 1e-9, 0.01, "", "comes back", 64, 64)
    results = (
        AuditResult("density", verdict, "off", uses={"density": finding}),
        AuditResult("reconstruction", Verdict.STABLE, "fine", uses={"reconstruction": passed}),
    )
    return AuditReport(results, name, {"samples": 64, "dtype": "float32"})


def test_a_use_is_a_test_case(tmp_path):
    path = tmp_path / "junit.xml"
    report().to_junit(path)
    suite = ElementTree.parse(path).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("2", "1", "0")
    failed, passed = suite.findall("testcase")
    assert failed.find("failure").get("message") == "off by 0.5 <nats>"
    assert "1 of 2 uses FAILS" in failed.find("failure").text
    assert len(passed) == 0


def test_what_does_not_count_is_skipped():
    results = report().results
    counted = {"reconstruction": "named by the caller"}
    suite = ElementTree.fromstring(AuditReport(results, "flow", {}, counted).to_junit())
    assert suite.get("failures") == "0"
    assert "unstable" in suite.find("testcase/skipped").get("message")


def test_the_badge_says_the_verdict():
    assert report().to_badge() == {
        "schemaVersion": 1,
        "label": "inn_guard",
        "message": "unstable",
        "color": "red",
    }


def test_the_card_holds_the_figures_and_the_table():
    for figure, written in ((0.5, 0.5), (math.inf, "inf"), (math.nan, "nan")):
        _, front, body = report(figure).to_model_card().split("---\n", 2)
        index = json.loads(front)["model-index"][0]
        metrics = {m["type"]: m["value"] for m in index["results"][0]["metrics"]}
        assert metrics == {"density": written, "reconstruction": 1e-9}
        assert "| reconstruction | stable |" in body

"""A report for other tools: JUnit XML of test runners, a badge, the metadata of a model card."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from inn_guard.report.verdict import Verdict

if TYPE_CHECKING:
    from inn_guard.report.audit_report import AuditReport
    from inn_guard.report.uses import Finding

__all__ = ["badge", "junit", "model_card"]

#: colours of a badge, by the names that badge services know
COLORS = {
    Verdict.NOT_APPLICABLE: "lightgrey",
    Verdict.STABLE: "brightgreen",
    Verdict.MARGINAL: "yellow",
    Verdict.UNDECIDED: "lightgrey",
    Verdict.UNSTABLE: "red",
    Verdict.NON_FINITE: "red",
}
#: characters that XML 1.0 cannot hold, not even escaped
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: AuditReport) -> str:
    """One test suite with one test case for each use, as CI servers read it.

    A counted use that fails is a failure with the figures as its message. A use that is not counted
    or not decided is skipped.
    """
    uses = list(report.uses.values())
    suite = ElementTree.Element("testsuite", name=_xml(f"inn_guard: {report.subject}"))
    failures = skipped = 0
    for use in uses:
        case = ElementTree.SubElement(
            suite, "testcase", classname=_xml(report.model or "model"), name=use.use
        )
        if use.counted and use.verdict.failed:
            failures += 1
            failure = ElementTree.SubElement(case, "failure", message=_xml(use.reason))
            failure.text = _xml(str(report))
        elif not (use.counted and use.verdict.passed):
            skipped += 1
            message = f"{use.verdict.label}: {use.reason or use.why}"
            ElementTree.SubElement(case, "skipped", message=_xml(message))
    suite.set("tests", str(len(uses)))
    suite.set("failures", str(failures))
    suite.set("skipped", str(skipped))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def badge(report: AuditReport) -> dict[str, Any]:
    """The verdict in the JSON schema of badge endpoints (schemaVersion, label, message, color)."""
    return {
        "schemaVersion": 1,
        "label": "inn_guard",
        "message": report.verdict.label.replace("_", " "),
        "color": COLORS[report.verdict],
    }


def model_card(report: AuditReport) -> str:
    """A model card in Markdown: a ``model-index`` in the front matter, then the table of uses.

    The front matter is YAML; it is written as JSON, which is a part of YAML.
    """
    metrics = []
    for use in report.uses.values():
        if use.finding is not None:
            metrics.append(_metric(use.use, use.finding))
    settings = report.settings
    name = f"{settings.get('samples', '?')} samples, {settings.get('dtype', 'dtype not known')}"
    result = {
        "task": {"type": "other", "name": "numerical invertibility"},
        "dataset": {"type": "other", "name": name},
        "metrics": metrics,
    }
    index = [{"name": report.model or "model", "results": [result]}]
    front = {"tags": ["normalizing-flow", "inn_guard"], "model-index": index}
    return f"---\n{json.dumps(front, indent=2)}\n---\n\n{report.to_markdown()}\n"


def _metric(use: str, finding: Finding) -> dict[str, Any]:
    """One use as an entry of ``metrics``; NaN and Inf, which JSON does not have, are words."""
    value: float | str = finding.figure
    if not math.isfinite(finding.figure):
        value = str(finding.figure)
    name = use
    if finding.unit:
        name = f"{use} ({finding.unit})"
    return {"type": use, "name": name, "value": value, "verified": False}


def _xml(text: str) -> str:
    """The text with ? for characters that XML cannot hold; the tree escapes the others."""
    return _NOT_XML.sub("?", text)

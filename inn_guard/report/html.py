"""Self-contained HTML pages: one report, its uses first, or several next to each other."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import jinja2

from inn_guard.execution.files import atomic_write
from inn_guard.report.formatting import (
    format_amount,
    format_number,
    format_value,
    heading,
    is_number,
    legible,
    sentence,
    title,
)
from inn_guard.report.plots import Drawing, numeric_columns
from inn_guard.report.result import AuditResult
from inn_guard.report.sections import drawings
from inn_guard.report.uses import USES, UseVerdict
from inn_guard.report.verdict import Verdict

if TYPE_CHECKING:
    from inn_guard.report.audit_report import AuditReport
    from inn_guard.report.comparison import Comparison

__all__ = ["environment", "render", "render_comparison", "write_comparison", "write_html"]

_WORDS = {
    Verdict.STABLE: "ok",
    Verdict.MARGINAL: "marginal",
    Verdict.UNDECIDED: "undecided",
    Verdict.UNSTABLE: "fails",
    Verdict.NON_FINITE: "not finite",
    Verdict.NOT_APPLICABLE: "not applicable",
}
_SIGNS = {
    Verdict.STABLE: "✓",
    Verdict.MARGINAL: "≈",
    Verdict.UNDECIDED: "?",
    Verdict.UNSTABLE: "!",
    Verdict.NON_FINITE: "✕",
    Verdict.NOT_APPLICABLE: "–",
}
#: colour of a cell in a column of verdicts, by its text
_TONES = {
    "passes": Verdict.STABLE,
    "works": Verdict.STABLE,
    "breaks": Verdict.UNSTABLE,
    "refused": Verdict.UNSTABLE,
    "not invertible": Verdict.UNSTABLE,
    "not finite": Verdict.NON_FINITE,
}
#: tables that a reader of an open section wants to see at once
_SHOWN_TABLES = ("families", "number format", "lowest precision", "cost")
_DECADES = 6  #: of figure / limit to either side of the limit, in the bar of a use


def write_html(report: AuditReport, path: str | os.PathLike[str]) -> None:
    """Write the page of `render` to ``path``, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(render(report), encoding="utf-8")


def render(report: AuditReport) -> str:
    """The report as one HTML page that fetches nothing and runs nothing; all text is escaped.

    Args:
        report: as `audit()` returns it, or as read by `from_json` (then without images).
    """
    template = environment().get_template("report.html")
    return template.render(name=report.model or "model", page=_Page.of(report))


def write_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Write the page of `render_comparison` to ``path``, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(render_comparison(comparison), encoding="utf-8")


def render_comparison(comparison: Comparison) -> str:
    """A table of uses and models, then the uses and the advice of each model."""
    pages = {}
    for index, (name, report) in enumerate(comparison.reports.items()):
        pages[name] = _Page.of(report, prefix=f"model-{index}-", drawn=False)
    rows = []
    for use in comparison.uses:
        cells = []
        for report in comparison.reports.values():
            cells.append(report.uses.get(use))
        rows.append((use, cells))
    verdicts = [report.verdict for report in comparison.reports.values()]
    template = environment().get_template("comparison.html")
    name = f"{len(pages)} audits compared"
    return template.render(
        name=name, pages=pages, rows=rows, verdicts=verdicts, worst=Verdict.worst(verdicts)
    )


@dataclass(frozen=True)
class _Page:
    """What the templates need of a report; advice is prose and the code under it."""

    report: AuditReport
    prefix: str
    uses: tuple[UseVerdict, ...]
    advice: tuple[tuple[str, str], ...]
    sections: tuple[_Section, ...]

    @classmethod
    def of(cls, report: AuditReport, *, prefix: str = "", drawn: bool = True) -> _Page:
        """The page of a report. ``prefix`` tells the anchors of several reports apart.

        ``drawn`` makes the sections of the checks; a comparison leaves them out.
        """
        sections = []
        for index, result in enumerate(report.results):
            if drawn:
                sections.append(_Section.of(report, result, f"{prefix}check-{index}"))
        # the worst first; sections of the same verdict stay in the order of the checks
        sections.sort(key=lambda section: section.result.verdict, reverse=True)
        sections.sort(key=lambda section: not section.opened)
        advice = []
        for text in _advice(report):
            prose, _, code = text.partition("\n")
            advice.append((prose, code))
        return cls(report, prefix, tuple(report.sorted_uses()), tuple(advice), tuple(sections))

    def anchor(self, check: str) -> str:
        """Where the section of a check begins; "" if the page has none."""
        for section in self.sections:
            if section.result.name == check:
                return section.anchor
        return ""


def _advice(report: AuditReport) -> tuple[str, ...]:
    """The report's advice; that of the failed checks where it was made without any."""
    if report.advice:
        return report.advice
    lines: dict[str, None] = {}
    for result in report.results:
        if result.verdict.failed and result.advice:
            lines[result.advice] = None
    return tuple(lines)


@dataclass(frozen=True)
class _Table:
    """A table of a section: rows of names and cells, which need not have the same columns."""

    name: str
    rows: Sequence[Mapping[str, Any]]

    @property
    def columns(self) -> list[str]:
        columns: dict[str, None] = {}
        for row in self.rows:
            columns |= dict.fromkeys(row)
        return list(columns)

    @property
    def numeric(self) -> list[str]:
        return ["index", *numeric_columns(self.rows)]

    @property
    def opened(self) -> bool:
        return self.name in _SHOWN_TABLES


@dataclass(frozen=True)
class _Section:
    """What the templates need of one result; ``opened`` shows it unfolded."""

    anchor: str
    result: AuditResult
    opened: bool
    drawings: tuple[Drawing, ...]
    tables: tuple[_Table, ...]

    @classmethod
    def of(cls, report: AuditReport, result: AuditResult, anchor: str) -> _Section:
        # a finding opens its section, unless all uses that it decides are left out of the verdict
        counted = [use for use in result.uses if report.uses[use].counted]
        ignored = bool(result.uses) and not counted
        found = result.verdict.failed or result.verdict is Verdict.UNDECIDED
        tables = []
        for name, rows in {**_lowest(result), **result.tables, "layers": result.per_layer}.items():
            if rows:
                tables.append(_Table(name, rows))
        return cls(anchor, result, found and not ignored, drawings(result), tuple(tables))


def _lowest(result: AuditResult) -> dict[str, tuple[Mapping[str, Any], ...]]:
    """The coarsest number format that passes each use, as a table."""
    rows = []
    for part in str(result.settings.get("lowest", "")).split(", "):
        use, _, number_format = part.partition(" ")
        if number_format:
            rows.append({"use": use, "lowest precision": number_format})
    if not rows:
        return {}
    return {"lowest precision": tuple(rows)}


def environment() -> jinja2.Environment:
    """What every page is rendered with: escaping, and filters for numbers, names and verdicts."""
    # autoescape and StrictUndefined: names come from models, and a missing one must not be silent
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("inn_guard.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_text,
    )
    environment.globals["version"] = version("inn_guard")
    environment.globals["questions"] = USES
    environment.filters |= {
        "title": title,
        "heading": heading,
        "sentence": sentence,
        "number": format_number,
        "value": format_value,
        "amount": format_amount,
        "flaw": _flaw,
        "tone": _tone,
        "place": _place,
        "word": _WORDS.__getitem__,
        "sign": _SIGNS.__getitem__,
    }
    return environment


def _place(use: UseVerdict) -> float | None:
    """Where the figure lies on a bar with the limit in its middle, in per cent of its length."""
    if math.isnan(use.figure) or not use.limit > 0:
        return None
    if use.figure == 0:
        return 0.0
    decades = float(_DECADES)
    if math.isfinite(use.figure):
        # a difference of logarithms: the quotient may overflow
        decades = math.log10(use.figure) - math.log10(use.limit)
    return 50 + 50 * max(-1.0, min(1.0, decades / _DECADES))


def _tone(cell: Any, column: str) -> str:
    """The CSS class of a cell: a verdict's colour in columns of verdicts, else none."""
    if not str(column).endswith("verdict") or str(cell) not in _TONES:
        return ""
    return f"tone {_TONES[str(cell)].label}"


def _flaw(value: Any) -> str:
    """The CSS class of a number that is not finite."""
    return " flaw" if is_number(value) and not math.isfinite(value) else ""


def _text(value: Any) -> Any:
    """A value of a template as it is written: plain text is made legible, markup stays."""
    if type(value) is str:
        return legible(value)
    return value

"""One self-contained HTML page from a report: verdict, advice, summary, then a section for each audit."""

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
    format_number,
    format_value,
    heading,
    is_number,
    legible,
    sentence,
    title,
)
from inn_guard.report.plots import Drawing, numeric_columns
from inn_guard.report.result import AuditResult, Verdict
from inn_guard.report.sections import drawings

if TYPE_CHECKING:
    from inn_guard.report.audit_report import AuditReport

__all__ = ["environment", "render", "write_html"]

_HEADLINES = {
    Verdict.STABLE: "Stable",
    Verdict.UNSTABLE: "Unstable",
    Verdict.NON_FINITE: "Not finite",
    Verdict.NOT_APPLICABLE: "Not applicable",
}
_SIGNS = {
    Verdict.STABLE: "✓",
    Verdict.UNSTABLE: "!",
    Verdict.NON_FINITE: "✕",
    Verdict.NOT_APPLICABLE: "–",
}


def write_html(report: AuditReport, path: str | os.PathLike[str]) -> None:
    """Write the page of `render` to ``path``, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(render(report), encoding="utf-8")


def render(report: AuditReport) -> str:
    """The report as one HTML page that fetches nothing and runs nothing; all of its text is escaped.

    Args:
        report: as `audit()` returns it, or as read by `from_json` (then without images).
    """
    sections = [_section(index, result) for index, result in enumerate(report.results)]
    return (
        environment()
        .get_template("report.html")
        .render(
            report=report,
            name=getattr(report, "model", "") or "model",
            verdict=report.verdict,
            advice=list(dict.fromkeys(result.advice for result in report.results if result.advice)),
            sections=sections,
            failed=[section for section in sections if section.result.verdict.failed],
        )
    )


@dataclass(frozen=True)
class _Table:
    name: str
    rows: Sequence[Mapping[str, Any]]

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row))

    @property
    def numeric(self) -> list[str]:
        return numeric_columns(self.rows)


@dataclass(frozen=True)
class _Section:
    anchor: str
    result: AuditResult
    drawings: tuple[Drawing, ...]
    tables: tuple[_Table, ...]


def _section(index: int, result: AuditResult) -> _Section:
    tables = {**result.tables, "layers": result.per_layer}
    shown = tuple(_Table(name, rows) for name, rows in tables.items() if rows)
    return _Section(f"audit-{index}", result, drawings(result), shown)


def environment() -> jinja2.Environment:
    """What every page is rendered with: escaping, and the filters that put numbers and names into words."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("inn_guard.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_text,
    )
    environment.filters |= {
        "title": title,
        "heading": heading,
        "sentence": sentence,
        "number": format_number,
        "value": format_value,
        "flaw": _flaw,
    }
    environment.globals["version"] = version("inn_guard")
    environment.filters |= {"headline": _HEADLINES.__getitem__, "sign": _SIGNS.__getitem__}
    return environment


def _flaw(value: Any) -> str:
    """The CSS class of a number that is not finite."""
    return " flaw" if is_number(value) and not math.isfinite(value) else ""


def _text(value: Any) -> Any:
    return legible(value) if type(value) is str else value

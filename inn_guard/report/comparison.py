"""Comparison: several reports next to each other, use by use."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inn_guard.report.audit_report import AuditReport, require
from inn_guard.report.uses import USES, UseVerdict

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison", "compare"]

MOST_COLUMNS = 4  #: reports that fit next to each other in a terminal


def compare(reports: Mapping[str, AuditReport]) -> Comparison:
    """Put reports next to each other: before and after a repair, or one model against another.

        print(ig.compare({"plain": a, "regularized": b}))

    Args:
        reports: name -> report.

    Raises:
        TypeError: if this is no mapping of names to reports.
        ValueError: if it is empty.
    """
    if not isinstance(reports, Mapping):
        raise TypeError(
            f"expected a dict of names and reports, got a {type(reports).__name__}: "
            'pass compare({"before": a, "after": b})'
        )
    for name, report in reports.items():
        if not isinstance(report, AuditReport):
            raise TypeError(f"expected an AuditReport for {name!r}, got a {type(report).__name__}")
    if not reports:
        raise ValueError("expected at least one report to compare, got none")
    return Comparison(dict(zip(map(str, reports), reports.values(), strict=True)))


@dataclass(frozen=True)
class Comparison:
    """Reports by name. Prints as a table of verdicts and deciding figures of every use.

    Uses that a report measured but does not count are in brackets.

    Attributes:
        reports: name -> report, in the order in which they were given.
    """

    reports: Mapping[str, AuditReport]

    @property
    def uses(self) -> tuple[str, ...]:
        """The uses that any of the reports measured."""
        measured: set[str] = set()
        for report in self.reports.values():
            measured |= report.uses.keys()
        return tuple(use for use in USES if use in measured)

    def __iter__(self) -> Iterator[str]:
        return iter(self.reports)

    def __len__(self) -> int:
        return len(self.reports)

    def __getitem__(self, name: str) -> AuditReport:
        return self.reports[name]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = self.rows()
        widths = []
        for column in zip(*rows, strict=True):
            widths.append(max(map(len, column)))
        lines = []
        for row in rows:
            line = "  ".join(map(str.ljust, row, widths))
            lines.append(line.rstrip())
        return "\n".join(lines)

    def rows(self) -> list[list[str]]:
        """The printed table, cell by cell, with verdict and figure of every use and the verdicts.

        One column for each report, or one line for each where there are more than four.
        """
        rows = [["", *self.reports]]
        for use in self.uses:
            row = [use.replace("_", " ")]
            for report in self.reports.values():
                row.append(_cell(report.uses.get(use)))
            rows.append(row)
        rows.append(["verdict", *(report.verdict.label for report in self.reports.values())])
        if len(self.reports) > MOST_COLUMNS:
            return list(map(list, zip(*rows, strict=True)))
        return rows

    def to_frame(self) -> pd.DataFrame:
        """A table with one row per report and use: verdict, figure, limit, unit.

        Raises:
            ImportError: without pandas, which the extra ``report`` brings.
        """
        require("to_frame", "pandas")
        from inn_guard.report.data_frame import comparison_frame

        return comparison_frame(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page: the table, then uses and advice of each report.

        Raises:
            ImportError: without jinja2 and matplotlib, which the extra ``report`` brings.
        """
        require("to_html", "jinja2", "matplotlib")
        from inn_guard.report.html import write_comparison

        write_comparison(self, path)

    def _repr_html_(self) -> str:
        """The printed table as HTML, which notebooks show."""
        lines = []
        for row in self.rows():
            cells = "</td><td>".join(map(html.escape, row))
            lines.append(f"<tr><td>{cells}</td></tr>")
        return f"<table>{''.join(lines)}</table>"


def _cell(use: UseVerdict | None) -> str:
    """Verdict and figure of one use, in brackets where it is not counted."""
    if use is None or use.finding is None:
        return "not measured"
    text = use.verdict.label
    if not math.isnan(use.figure):
        text += f" {use.figure:.2g}"
    return text if use.counted else f"({text})"

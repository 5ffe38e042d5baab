"""Comparison: several reports next to each other, use by use."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inn_guard.report.audit_report import AuditReport
from inn_guard.report.uses import USES, UseVerdict

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison", "compare"]


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
    return Comparison({str(name): report for name, report in reports.items()})


@dataclass(frozen=True)
class Comparison:
    """Reports by name. Prints as a table of verdicts and deciding figures, one row per use.

    Attributes:
        reports: name -> report, in the order in which they were given.
    """

    reports: Mapping[str, AuditReport]

    @property
    def uses(self) -> tuple[str, ...]:
        """The uses that any of the reports measured."""
        measured = {use for report in self.reports.values() for use in report.uses}
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
        rows = [["", *self.reports]]
        for use in self.uses:
            cells = [_cell(report.uses.get(use)) for report in self.reports.values()]
            rows.append([use.replace("_", " "), *cells])
        rows.append(["verdict", *(report.verdict.label for report in self.reports.values())])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def to_frame(self) -> pd.DataFrame:
        """One row per report and use: verdict, figure, limit, unit; needs pandas, as the extra ``report`` has it."""
        from inn_guard.report.data_frame import comparison_frame

        return comparison_frame(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """One self-contained page; needs the extra ``report``."""
        from inn_guard.report.html import write_comparison

        write_comparison(self, path)

    def _repr_html_(self) -> str:
        """The table, for notebooks."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.reports)
        rows = [f"<tr><th></th>{head}</tr>"]
        for use in self.uses:
            cells = [_cell(report.uses.get(use)) for report in self.reports.values()]
            marked = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            rows.append(f"<tr><th>{use.replace('_', ' ')}</th>{marked}</tr>")
        return f"<table>{''.join(rows)}</table>"


def _cell(use: UseVerdict | None) -> str:
    """Verdict and figure of one use."""
    if use is None or use.finding is None:
        return "not measured"
    if use.figure != use.figure:  # NaN: there is no figure
        return use.verdict.label
    return f"{use.verdict.label} {use.figure:.2g}"

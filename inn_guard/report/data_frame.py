"""Reports as pandas tables: one row per value, or one row per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas

if TYPE_CHECKING:
    from inn_guard.report.audit_report import AuditReport
    from inn_guard.report.comparison import Comparison

__all__ = ["comparison_frame", "frame", "layer_frame"]


def frame(report: AuditReport) -> pandas.DataFrame:
    """A table with one row per measured value; NaN and Inf stay, a missing unit is "".

    Args:
        report: with its results.

    Returns:
        Columns check, verdict, quantity, value, unit; a check that measured nothing has no row.
    """
    rows = []
    for result in report.results:
        for quantity, value in result.values.items():
            unit = result.units.get(quantity, "")
            rows.append((result.name, result.verdict.label, quantity, float(value), unit))
    table = pandas.DataFrame(rows, columns=["check", "verdict", "quantity", "value", "unit"])
    return table.astype({"value": "float64"})


def layer_frame(report: AuditReport) -> pandas.DataFrame:
    """A table with one row per layer and check that measured layers.

    Args:
        report: with its results.

    Returns:
        Columns check, index and name of the layer, then those of the checks' rows; empty if no
        check has layers.
    """
    rows = []
    for result in report.results:
        for row in result.per_layer:
            rows.append({"check": result.name, "index": None, "name": "", **row})
    if not rows:
        return pandas.DataFrame(columns=["check", "index", "name"])
    return pandas.DataFrame(rows)


def comparison_frame(comparison: Comparison) -> pandas.DataFrame:
    """A row per report and use: report, use, verdict, figure, limit, unit, counted."""
    rows = []
    for name, report in comparison.reports.items():
        for use in report.uses.values():
            figures = (use.figure, use.limit, use.unit, use.counted)
            rows.append((name, use.use, use.verdict.label, *figures))
    columns = ["report", "use", "verdict", "figure", "limit", "unit", "counted"]
    return pandas.DataFrame(rows, columns=columns)

"""Reports as pandas tables: one row per value, or one row per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas

if TYPE_CHECKING:
    from inn_guard.report.audit_report import AuditReport
    from inn_guard.report.comparison import Comparison

__all__ = ["comparison_frame", "frame", "layer_frame"]


def frame(report: AuditReport) -> pandas.DataFrame:
    """One row per measured value: audit, verdict, quantity, value (NaN and Inf as they are) and unit ("" if none).

    Args:
        report: with its results.

    Returns:
        Columns audit, verdict, quantity, value, unit; an audit that measured nothing has no row.
    """
    rows = [
        (result.name, result.verdict.label, quantity, float(value), result.units.get(quantity, ""))
        for result in report.results
        for quantity, value in result.values.items()
    ]
    table = pandas.DataFrame(rows, columns=["audit", "verdict", "quantity", "value", "unit"])
    return table.astype({"value": "float64"})


def layer_frame(report: AuditReport) -> pandas.DataFrame:
    """One row per layer and audit that looks at layers: audit, position in the chain, and that audit's columns.

    Args:
        report: with its results.

    Returns:
        Columns audit, position (0 is the first layer), then those of the audits' rows; empty if no
        audit has layers.
    """
    rows = [
        {"audit": result.name, "position": position, **row}
        for result in report.results
        for position, row in enumerate(result.per_layer)
    ]
    return pandas.DataFrame(rows) if rows else pandas.DataFrame(columns=["audit", "position"])


def comparison_frame(comparison: Comparison) -> pandas.DataFrame:
    """One row per report and use: report, use, verdict, figure, limit, unit, counted."""
    rows = [
        (name, use.use, use.verdict.label, use.figure, use.limit, use.unit, use.counted)
        for name, report in comparison.reports.items()
        for use in report.uses.values()
    ]
    columns = ["report", "use", "verdict", "figure", "limit", "unit", "counted"]
    return pandas.DataFrame(rows, columns=columns)

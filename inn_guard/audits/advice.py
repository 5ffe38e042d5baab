"""What to do, in one list over all checks: the most effective first, nothing twice, each to be followed as it stands."""

from __future__ import annotations

from inn_guard.audits.context import AuditContext
from inn_guard.report.audit_report import AuditReport

__all__ = ["advise"]


def advise(report: AuditReport, context: AuditContext) -> tuple[str, ...]:
    """Advice for the counted uses that fail."""
    found = [result.advice for result in report.results if result.verdict.failed and result.advice]
    return tuple(dict.fromkeys(found))

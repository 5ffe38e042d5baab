"""Checks: a model and a batch -> AuditResult.

A new one is a function under ``@audit_check`` and a line in `registry`.
"""

from inn_guard.audits.level import Level
from inn_guard.audits.registry import AUDITS, checks_of_level
from inn_guard.audits.spec import AuditSpec, audit_check

__all__ = ["AUDITS", "AuditSpec", "Level", "audit_check", "checks_of_level"]

"""Audits: Invertible + batch -> AuditResult.

A new audit is one file with one function ``name(model, x, *, ...) -> AuditResult`` under ``@polite``, and one line
below, in the table of the first level that runs it.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable

from inn_guard.audits.audited_model import polite
from inn_guard.audits.dequantization_attack.audit import dequantization_attack
from inn_guard.audits.full_spectrum import full_spectrum
from inn_guard.audits.gradient_angle import gradient_angle
from inn_guard.audits.jacobian_spectrum import jacobian_spectrum
from inn_guard.audits.layer_blame import layer_blame
from inn_guard.audits.lipschitz_bounds import lipschitz_bounds
from inn_guard.audits.log_det import log_det
from inn_guard.audits.out_of_distribution.audit import out_of_distribution
from inn_guard.audits.precision.audit import precision
from inn_guard.audits.preflight import preflight
from inn_guard.audits.reconstruction.audit import reconstruction
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.result import AuditResult, Verdict

__all__ = ["AUDITS", "LEVELS", "Audit", "AuditReport", "AuditResult", "Level", "Verdict", "polite"]

Audit = Callable[..., AuditResult]

QUICK: dict[str, Audit] = {
    "preflight": preflight,
    "reconstruction": reconstruction,
    "log_det": log_det,
    "out_of_distribution": functools.partial(out_of_distribution, samples=8, spectrum_samples=0),
}
STANDARD: dict[str, Audit] = {
    **QUICK,
    "jacobian_spectrum": jacobian_spectrum,
    "layer_blame": layer_blame,
    "precision": precision,
    "gradient_angle": gradient_angle,
}
FULL: dict[str, Audit] = {
    **STANDARD,
    "out_of_distribution": out_of_distribution,
    "full_spectrum": full_spectrum,
    "dequantization_attack": dequantization_attack,
    "lipschitz_bounds": lipschitz_bounds,
}

#: Every check by its name, in the order in which they run.
AUDITS = FULL


class Level(enum.Enum):
    """How much is measured."""

    QUICK = "quick"  #: seconds: does the inverse work, is the log-determinant right
    STANDARD = "standard"  #: adds Jacobian extremes, layer blame and forecasts
    FULL = "full"  #: adds full spectra, certificates and attacks


LEVELS: dict[Level, dict[str, Audit]] = {
    Level.QUICK: QUICK,
    Level.STANDARD: STANDARD,
    Level.FULL: FULL,
}

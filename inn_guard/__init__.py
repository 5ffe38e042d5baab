"""inn_guard: audit and repair the numerical stability of invertible neural networks.

report = ig.audit(flow, x)  # what may this model be used for?
penalty = ig.RegularizerHook(flow, [ig.FiniteDifferences(1e-3)])(x)  # keep its inverse stable
"""

import importlib
from typing import TYPE_CHECKING, Any

from inn_guard.adapters import wrap
from inn_guard.audits import AUDITS, AuditSpec, Level, audit_check
from inn_guard.audits.run import audit
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable
from inn_guard.exact import exact
from inn_guard.memory_saving import memory_saving
from inn_guard.repair.fine_tuning import Look, Stabilized, stabilize
from inn_guard.repair.mixed_precision import MixedPrecision, PrecisionSummary, raise_precision
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.comparison import Comparison, compare
from inn_guard.report.from_json import load
from inn_guard.report.limits import Limits
from inn_guard.report.result import AuditResult
from inn_guard.report.uses import USES
from inn_guard.report.verdict import Verdict
from inn_guard.testing import assert_stable
from inn_guard.training import actions
from inn_guard.training.audit_hook import AuditHook
from inn_guard.training.records import CsvRecorder, MetricsRecorder, TensorBoardRecorder
from inn_guard.training.regularizer_hook import RegularizerHook
from inn_guard.training.regularizers import (
    AdaptiveCoefficient,
    Direction,
    FiniteDifferences,
    NormalizingFlowLoss,
)
from inn_guard.training.schedule import every

if TYPE_CHECKING:
    from inn_guard.lipschitz.bounds import LipschitzBounds, lipschitz_bounds
    from inn_guard.numerics.intervals import Box

__all__ = [
    "AUDITS",
    "USES",
    "AdaptiveCoefficient",
    "AuditHook",
    "AuditReport",
    "AuditResult",
    "AuditSpec",
    "Box",
    "Comparison",
    "CsvRecorder",
    "Direction",
    "FiniteDifferences",
    "Invertible",
    "Level",
    "Limits",
    "LipschitzBounds",
    "Look",
    "MetricsRecorder",
    "MixedPrecision",
    "NormalizingFlowLoss",
    "NotApplicable",
    "PrecisionSummary",
    "RegularizerHook",
    "Stabilized",
    "TensorBoardRecorder",
    "Verdict",
    "actions",
    "assert_stable",
    "audit",
    "audit_check",
    "compare",
    "every",
    "exact",
    "lipschitz_bounds",
    "load",
    "memory_saving",
    "raise_precision",
    "stabilize",
    "wrap",
]

__version__ = "0.1.0"

#: Certified bounds are a large part of the package: they are imported when one is first used.
_LAZY = {
    "Box": "inn_guard.numerics.intervals",
    "LipschitzBounds": "inn_guard.lipschitz.bounds",
    "lipschitz_bounds": "inn_guard.lipschitz.bounds",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'inn_guard' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__

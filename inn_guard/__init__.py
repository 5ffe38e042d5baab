"""inn_guard: audit and repair the numerical stability of invertible neural networks.

report = ig.audit(flow, x)  # what may this model be used for?
penalty = ig.RegularizerHook(flow, [ig.FiniteDifferences(1e-3)])(x)  # keep its inverse stable
"""

import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inn_guard.adapters import wrap
    from inn_guard.audits import AUDITS, AuditSpec, Level, audit_check
    from inn_guard.audits.run import audit
    from inn_guard.core.invertible import Invertible
    from inn_guard.core.missing import NotApplicable
    from inn_guard.exact import exact
    from inn_guard.lipschitz.bounds import LipschitzBounds, lipschitz_bounds
    from inn_guard.memory_saving import memory_saving
    from inn_guard.numerics.intervals import Box
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

#: name -> the module that has it, imported when the name is first used: who wants one regularizer
#: need not wait for all audits
_HOME = {
    "wrap": "inn_guard.adapters",
    "AUDITS": "inn_guard.audits",
    "AuditSpec": "inn_guard.audits",
    "Level": "inn_guard.audits",
    "audit_check": "inn_guard.audits",
    "audit": "inn_guard.audits.run",
    "Invertible": "inn_guard.core.invertible",
    "NotApplicable": "inn_guard.core.missing",
    "exact": "inn_guard.exact",
    "LipschitzBounds": "inn_guard.lipschitz.bounds",
    "lipschitz_bounds": "inn_guard.lipschitz.bounds",
    "memory_saving": "inn_guard.memory_saving",
    "Box": "inn_guard.numerics.intervals",
    "Look": "inn_guard.repair.fine_tuning",
    "Stabilized": "inn_guard.repair.fine_tuning",
    "stabilize": "inn_guard.repair.fine_tuning",
    "MixedPrecision": "inn_guard.repair.mixed_precision",
    "PrecisionSummary": "inn_guard.repair.mixed_precision",
    "raise_precision": "inn_guard.repair.mixed_precision",
    "AuditReport": "inn_guard.report.audit_report",
    "Comparison": "inn_guard.report.comparison",
    "compare": "inn_guard.report.comparison",
    "load": "inn_guard.report.from_json",
    "Limits": "inn_guard.report.limits",
    "AuditResult": "inn_guard.report.result",
    "USES": "inn_guard.report.uses",
    "Verdict": "inn_guard.report.verdict",
    "assert_stable": "inn_guard.testing",
    "actions": "inn_guard.training",
    "AuditHook": "inn_guard.training.audit_hook",
    "CsvRecorder": "inn_guard.training.records",
    "MetricsRecorder": "inn_guard.training.records",
    "TensorBoardRecorder": "inn_guard.training.records",
    "RegularizerHook": "inn_guard.training.regularizer_hook",
    "AdaptiveCoefficient": "inn_guard.training.regularizers",
    "Direction": "inn_guard.training.regularizers",
    "FiniteDifferences": "inn_guard.training.regularizers",
    "NormalizingFlowLoss": "inn_guard.training.regularizers",
    "every": "inn_guard.training.schedule",
}


class _Package(types.ModuleType):
    """The package, in which a function has its name before a subpackage of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # what the import system does when the subpackage has been imported
        if name in _HOME and isinstance(value, types.ModuleType):
            return
        super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        # by its name, as any module: functions that use it are sent to other processes
        return importlib.import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package


if not TYPE_CHECKING:  # else no misspelt name would be found

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            value = getattr(importlib.import_module(_HOME[name]), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module 'inn_guard' has no attribute {name!r}")
        vars(sys.modules[__name__])[name] = value
        return value


def __dir__() -> list[str]:
    return __all__

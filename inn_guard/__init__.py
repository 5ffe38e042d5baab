"""inn_guard: audit and repair the numerical stability of invertible neural networks.

wrap(model) -> Invertible -> audit(model, x) -> AuditReport; RegularizerHook(model, regularizers)(x) -> penalty.
"""

# what an audit inside a training run may do
# the protocol, and how any model comes to keep it
from inn_guard.adapters import wrap
from inn_guard.audits import AUDITS, AuditReport, AuditResult, Level, Verdict
from inn_guard.audits.run import audit
from inn_guard.core.invertible import Invertible, NotApplicable
from inn_guard.lipschitz import Box, LipschitzBounds, lipschitz_bounds
from inn_guard.memory_saving import memory_saving
from inn_guard.training.actions import (
    AdaptCoefficient,
    DisableMemorySaving,
    EmitWarning,
    RaiseError,
    RollBack,
    StabilityError,
    StabilityWarning,
)

# audits, on a schedule and at once
from inn_guard.training.audit_hook import AuditHook
from inn_guard.training.records import CsvRecorder, TensorBoardRecorder

# repairs
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
    "AdaptCoefficient",
    "AdaptiveCoefficient",
    "AuditHook",
    "AuditReport",
    "AuditResult",
    "Box",
    "CsvRecorder",
    "Direction",
    "DisableMemorySaving",
    "EmitWarning",
    "FiniteDifferences",
    "Invertible",
    "Level",
    "LipschitzBounds",
    "NormalizingFlowLoss",
    "NotApplicable",
    "RaiseError",
    "RegularizerHook",
    "RollBack",
    "StabilityError",
    "StabilityWarning",
    "TensorBoardRecorder",
    "Verdict",
    "audit",
    "every",
    "lipschitz_bounds",
    "memory_saving",
    "wrap",
]

__version__ = "0.1.0"

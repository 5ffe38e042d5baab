"""inn_guard: audit and repair the numerical stability of invertible neural networks.

wrap(model) -> Invertible -> audit(model, x) -> AuditReport; RegularizerHook(model, regularizers)(x) -> penalty.
"""

# what an audit inside a training run may do
from inn_guard.actions import Adapt, Raise, RollBack, StabilityError, StabilityWarning, SwitchOff, Warn

# the protocol, and how any model comes to keep it
from inn_guard.adapters import wrap

# audits, on a schedule and at once
from inn_guard.audit_hook import AuditHook
from inn_guard.auditing import audit
from inn_guard.audits import AUDITS, AuditReport, AuditResult, Level, Verdict

# repairs
from inn_guard.hooks import RegularizerHook, every
from inn_guard.invertible import Invertible, NotApplicable
from inn_guard.lipschitz import Box, LipschitzBounds, lipschitz_bounds
from inn_guard.recorders import CsvRecorder, TensorBoardRecorder
from inn_guard.regularizers import AdaptiveCoefficient, Direction, FiniteDifferences, NormalizingFlowLoss
from inn_guard.reversible import memory_saving

__all__ = [
    "AUDITS",
    "Adapt",
    "AdaptiveCoefficient",
    "AuditHook",
    "AuditReport",
    "AuditResult",
    "Box",
    "CsvRecorder",
    "Direction",
    "FiniteDifferences",
    "Invertible",
    "Level",
    "LipschitzBounds",
    "NormalizingFlowLoss",
    "NotApplicable",
    "Raise",
    "RegularizerHook",
    "RollBack",
    "StabilityError",
    "StabilityWarning",
    "SwitchOff",
    "TensorBoardRecorder",
    "Verdict",
    "Warn",
    "audit",
    "every",
    "lipschitz_bounds",
    "memory_saving",
    "wrap",
]

__version__ = "0.1.0"

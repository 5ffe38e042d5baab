"""inn_guard: audit and repair the numerical stability of invertible neural networks.

wrap(model) -> Invertible -> audit(model, x) -> AuditReport; RegularizerHook(model, regularizers)(x) -> penalty.
"""

# the protocol, and how any model comes to keep it
from inn_guard.adapters import wrap

# audits
from inn_guard.auditing import audit
from inn_guard.audits import AUDITS, AuditReport, AuditResult, Level, Verdict

# repairs
from inn_guard.hooks import RegularizerHook, every
from inn_guard.invertible import Invertible, NotApplicable
from inn_guard.regularizers import Direction, FiniteDifferences, NormalizingFlowLoss
from inn_guard.reversible import memory_saving

__all__ = [
    "AUDITS",
    "AuditReport",
    "AuditResult",
    "Direction",
    "FiniteDifferences",
    "Invertible",
    "Level",
    "NormalizingFlowLoss",
    "NotApplicable",
    "RegularizerHook",
    "Verdict",
    "audit",
    "every",
    "memory_saving",
    "wrap",
]

__version__ = "0.1.0"

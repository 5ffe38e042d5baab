"""Exact mode: inverses that restore every bit."""

from inn_guard.exact.coder import Coder, Kept, PlannedLayer, exact
from inn_guard.exact.tape import Mismatch

__all__ = ["Coder", "Kept", "Mismatch", "PlannedLayer", "exact"]

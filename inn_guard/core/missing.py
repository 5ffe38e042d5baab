"""How the package says that a value, an answer or a context is missing, and why."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Missing", "MissingContextError", "NotApplicable"]


@dataclass(frozen=True)
class Missing:
    """No value, and why. A function that may fail for a known reason returns ``Tensor | Missing``.

    Attributes:
        reason: a clause that can follow "because".
    """

    reason: str

    def __str__(self) -> str:
        return self.reason


class NotApplicable(NotImplementedError):
    """A model cannot answer a question, for this reason. `audit()` reports it as a verdict."""


class MissingContextError(ValueError):
    """A conditional map was called without the context that it needs."""

"""Two ways to say that there is no value: a result and an exception, each with the reason."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Missing", "NotApplicable"]


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

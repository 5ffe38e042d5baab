"""Verdict: what was found, as an ordered word."""

from __future__ import annotations

import enum
from collections.abc import Iterable

__all__ = ["Verdict"]


class Verdict(str, enum.Enum):
    """What was found, from good to bad. A verdict equals its label, and ``<`` means better.

    >>> Verdict.STABLE == "stable", Verdict.STABLE < Verdict.UNSTABLE, Verdict.MARGINAL < "unstable"
    (True, True, True)
    """

    NOT_APPLICABLE = "not_applicable"  #: the question cannot be asked of this model
    STABLE = "stable"  #: the figure is below a tenth of its limit
    MARGINAL = "marginal"  #: the figure is below its limit, but above a tenth of it
    UNDECIDED = "undecided"  #: measured, and neither side of the limit is proved
    UNSTABLE = "unstable"  #: the figure is above its limit
    NON_FINITE = "non_finite"  #: NaN or Inf came out of the model

    @property
    def label(self) -> str:
        """The lower-case word, as in tables and JSON."""
        return self.value

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        return _SENTENCES[self]

    @property
    def failed(self) -> bool:
        """Whether this is a finding: unstable or non_finite."""
        return self in (Verdict.UNSTABLE, Verdict.NON_FINITE)

    @property
    def passed(self) -> bool:
        """Whether the use is fit: stable or marginal."""
        return self in (Verdict.STABLE, Verdict.MARGINAL)

    @classmethod
    def worst(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """The worst of several verdicts; NOT_APPLICABLE if there are none."""
        return max(verdicts, default=cls.NOT_APPLICABLE)

    @property
    def _rank(self) -> int:
        """The place in the order of the class: as strings they would compare alphabetically."""
        return list(Verdict).index(self)

    def __str__(self) -> str:
        return self.value

    def __lt__(self, other: object) -> bool:
        return self._rank < _verdict(other)._rank

    def __le__(self, other: object) -> bool:
        return self._rank <= _verdict(other)._rank

    def __gt__(self, other: object) -> bool:
        return self._rank > _verdict(other)._rank

    def __ge__(self, other: object) -> bool:
        return self._rank >= _verdict(other)._rank


_SENTENCES = {
    Verdict.NOT_APPLICABLE: "The question cannot be asked of this model.",
    Verdict.STABLE: "Errors stay below a tenth of their limits.",
    Verdict.MARGINAL: "Errors stay below their limits, but not by a factor of ten.",
    Verdict.UNDECIDED: "The measurement proves neither side of the limit.",
    Verdict.UNSTABLE: "An error exceeds its limit.",
    Verdict.NON_FINITE: "NaN or Inf came out of the model.",
}


def _verdict(other: object) -> Verdict:
    """What a verdict is compared with: a verdict, or the label of one."""
    try:
        return Verdict(other)
    except ValueError:
        labels = ", ".join(verdict.value for verdict in Verdict)
        raise TypeError(
            f"expected a verdict or one of the labels {labels}; got {other!r}"
        ) from None

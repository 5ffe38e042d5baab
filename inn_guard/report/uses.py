"""What a model may be used for, and what one check found about a use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from inn_guard.report.verdict import Verdict

__all__ = ["USES", "Finding", "UseVerdict", "checked_uses"]

#: use -> the question behind it
USES = {
    "density": "Is log p(x) of data right?",
    "sampling": "Are draws from the model's own base usable?",
    "reconstruction": "Does x -> z -> x come back?",
    "gradients": "Is the memory-saving gradient the true one?",
    "other_inputs": "Does the inverse work outside of the data?",
}


@dataclass(frozen=True, eq=False)
class Finding:
    """What one check found about one use. Figures that are NaN are equal.

    Attributes:
        verdict: on this use, by this check alone.
        figure: what decided it.
        limit: what the figure is held against.
        unit: of both.
        reason: one sentence with the figures.
        samples: how many rows or draws the figure is of.
        of: how many rows or draws there were; equal to ``samples`` if all of them were measured.
    """

    verdict: Verdict
    figure: float
    limit: float
    unit: str
    reason: str
    samples: int
    of: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Finding):
            return NotImplemented
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return all(a == b or (a != a and b != b) for a, b in pairs)

    def __hash__(self) -> int:
        return hash((self.verdict, self.reason))


@dataclass(frozen=True)
class UseVerdict:
    """The verdict on one use: the worst finding of the checks that decide it.

    Attributes:
        use: its name, a key of USES.
        verdict: of all checks together.
        check: the check whose finding decided; "" if none measured this use.
        finding: that finding; None if none measured this use.
        counted: whether the report's verdict counts this use.
        why: why it is counted, or why not.
    """

    use: str
    verdict: Verdict
    check: str
    finding: Finding | None
    counted: bool
    why: str

    @property
    def figure(self) -> float:
        """The deciding figure; NaN if the use was not measured."""
        return self._known.figure

    @property
    def limit(self) -> float:
        """What the figure is held against; NaN if the use was not measured."""
        return self._known.limit

    @property
    def unit(self) -> str:
        """Unit of figure and limit."""
        return self._known.unit

    @property
    def samples(self) -> int:
        """How many rows or draws the figure is of."""
        return self._known.samples

    @property
    def of(self) -> int:
        """How many rows there were."""
        return self._known.of

    @property
    def reason(self) -> str:
        """What was found, in one sentence with the figures."""
        return self._known.reason

    @property
    def _known(self) -> Finding:
        """The finding, or one that says that there is none."""
        if self.finding is not None:
            return self.finding
        return Finding(self.verdict, math.nan, math.nan, "", "not measured", samples=0, of=0)

    def __str__(self) -> str:
        return f"{self.use}: {self.verdict.label} ({self.reason})"


def checked_uses(uses: str | Iterable[str]) -> tuple[str, ...]:
    """Names of uses, each once and in the order of USES.

    Raises:
        ValueError: if one is unknown.
        TypeError: if one is no string.
    """
    if isinstance(uses, str):
        uses = [uses]
    if not isinstance(uses, Iterable) or getattr(uses, "ndim", 1) == 0:
        raise TypeError(f"expected uses by name, out of {', '.join(USES)}; got {uses!r}")
    named = list(uses)
    for name in named:
        if not isinstance(name, str):
            raise TypeError(f"expected uses by name, out of {', '.join(USES)}; got {name!r}")
        if name not in USES:
            raise ValueError(f"expected uses out of {', '.join(USES)}; got {name!r}")
    return tuple(name for name in USES if name in named)

"""What a check costs: passes of one sample through the model, and what it holds at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inn_guard.audits.level import Level

__all__ = ["Cost", "Passes", "Task"]

#: An iteration for singular values usually takes this many times the root of the steps allowed.
USUAL = 3.0


@dataclass(frozen=True)
class Task:
    """What is to be audited.

    Attributes:
        samples: in the batch.
        dimension: entries of a sample.
        layers: of the model, at least 1.
        settings: of the check, with the defaults of those that are not given.
        level: of the audit.
    """

    samples: int
    dimension: int
    layers: int
    settings: Mapping[str, Any]
    level: Level = Level.STANDARD

    @property
    def chosen(self) -> int:
        """Samples that the check takes."""
        asked = self.settings.get("samples")
        return self.samples if asked is None else min(self.samples, int(asked))

    def steps(self, allowed: int) -> float | int:
        """Steps of Lanczos for one end of the spectrum."""
        return min(self.dimension, allowed, USUAL * math.sqrt(allowed))


@dataclass(frozen=True)
class Passes:
    """Passes of one sample.

    Attributes:
        forward: without a graph.
        inverse: without a graph.
        linearize: forward with the graph kept.
        product: with J, J^T, J^-1 or J^-T.
    """

    forward: float | int = 0
    inverse: float | int = 0
    linearize: float | int = 0
    product: float | int = 0

    def __mul__(self, times: float | int) -> Passes:
        return Passes(
            *(times * count for count in (self.forward, self.inverse, self.linearize, self.product))
        )

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.forward + other.forward,
            self.inverse + other.inverse,
            self.linearize + other.linearize,
            self.product + other.product,
        )


@dataclass(frozen=True)
class Cost:
    """What a check costs.

    Attributes:
        passes: of one sample, all together.
        at_once: samples that are held at once where memory allows.
        linearized: whether they are held with their graph.
        vectors: of the size of x that are held on top of that, per sample.
        seconds: that it may take on top of the passes, a limit of its own.
    """

    passes: Passes
    at_once: int
    linearized: bool = False
    vectors: float | int = 0
    seconds: float | int = 0

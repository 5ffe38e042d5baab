"""Whether round trips fail for the steps of an equation's solver, by refining them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.audited_model import AuditedModel, ModelError
from inn_guard.audits.round_trip import round_trip
from inn_guard.audits.thresholds import worst

__all__ = ["Refinement", "refinement"]

SAMPLES = 16
REFINEMENTS = 7  #: times that steps are doubled or tolerances divided by ten
FALLS = 0.6  #: what an error of the solver falls to at least: half, if of first order


@dataclass(frozen=True)
class Refinement:
    """What a finer solver was measured to do.

    Attributes:
        solver: the finer solver, as code.
        error: the worst round trip with it, of its feature.
        samples: of how many.
        suffices: whether that is within the limit.
    """

    solver: str
    error: float
    samples: int
    suffices: bool


def refinement(model: AuditedModel, x: Tensor, limit: float) -> Refinement | None:
    """The coarsest finer solver whose round trips keep the limit, else the finest one tried.

    None if the model has no solver (a block with ``refined()``), or its error does not fall.
    """
    block = model.block
    found: Refinement | None = None
    x = x[:SAMPLES]
    first, second = (round_trip(model, x, batch_size=SAMPLES) for _ in range(2))
    if not torch.equal(first.end, second.end):
        return None  # a random velocity, whose mean over more steps is smaller
    error = worst(first.by_feature)
    for _ in range(REFINEMENTS):
        finer = getattr(block, "refined", lambda: None)()
        if finer is None:
            return found
        block = finer
        try:
            trip = round_trip(AuditedModel(finer), x, batch_size=SAMPLES)
        except ModelError:
            return found
        refined_error = worst(trip.by_feature)
        if not refined_error < FALLS * error:
            return found
        error = refined_error
        found = Refinement(repr(finer.solver), error, len(x), error <= limit)
        if found.suffices:
            return found
    return found

"""Differences of a map's values are about the map only if it is the same one in every pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.execution.state import preserve_state

__all__ = ["require_deterministic"]

TOLERANCE = 1e-3  #: relative difference of two evaluations that rounding in another order may make


@contextmanager
def require_deterministic(model: Invertible, x: Tensor) -> Iterator[None]:
    """A block of passes whose values are to be compared.

    Nothing is asked of a model that draws no random numbers in them. One that does is evaluated twice more at x: some
    draw for log-determinants alone, which leaves F as it is.

    Raises:
        ValueError: if the random numbers change F(x).
    """
    before = _states(x)
    yield
    drawn = not all(map(torch.equal, before, _states(x)))
    if drawn and _changes(model, x):
        raise ValueError(
            "expected the same map in every pass; got one whose output depends on random numbers, as with dropout in "
            "training mode, so that F(x + eps v) - F(x) is the difference of two maps: type model.eval() before the "
            "penalty and model.train() after it, and leave z out to have it computed"
        )


def _states(x: Tensor) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])]


def _changes(model: Invertible, x: Tensor) -> bool:
    with preserve_state(model), torch.no_grad():
        first, second = model(x), model(x)
    return bool((first - second).norm() > TOLERANCE * first.norm())

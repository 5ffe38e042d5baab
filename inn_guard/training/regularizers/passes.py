"""The passes whose values a regularizer compares: in float32, and of one and the same map.

A difference F(x + eps v) - F(x) with eps = 0.1 is about a tenth of |F(x)|. The eight bits of
bfloat16 leave it one or two correct digits, and its square enters the loss divided by eps^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.random import generator_of_device
from inn_guard.execution.state import preserve_state

__all__ = ["autocast_disabled", "require_deterministic", "z_if_exact"]

HALF = (torch.float16, torch.bfloat16)
TOLERANCE = 1e-3  #: relative difference between two evaluations that rounding may cause


@contextmanager
def autocast_disabled(x: Tensor) -> Iterator[Tensor]:
    """A block with autocast off for the device of ``x``; yields x, as float32 if autocast was on.

    Without autocast x keeps its dtype: a model with half-precision parameters accepts no other.

    Raises:
        TypeError: if x is not real floating point.
        ValueError: if x is empty.
    """
    if not x.is_floating_point():
        raise TypeError(f"expected floating-point data x; got {x.dtype}: pass x.float()")
    if x.numel() == 0:
        raise ValueError(f"expected at least one sample; got x of shape {tuple(x.shape)}")
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype in HALF:
        x = x.float()
    with torch.autocast(device, enabled=False):
        yield x


def z_if_exact(z: Tensor | None, x: Tensor) -> Tensor | None:
    """``z`` if it is F(x) to the precision of x; None if it is missing or rounded by autocast.

    Raises:
        ValueError: if z holds another number of samples than x.
    """
    if z is None:
        return None
    if len(z) != len(x):
        raise ValueError(
            f"expected z = model(x) for the {len(x)} samples of x; got {len(z)} samples"
        )
    rounded = z.dtype in HALF and x.dtype not in HALF
    if rounded or torch.is_autocast_enabled(x.device.type):
        return None
    return z


@contextmanager
def require_deterministic(model: Invertible, x: Tensor) -> Iterator[None]:
    """A block of passes whose values are compared.

    A model that draws no random numbers in the block costs nothing more. One that does is
    evaluated twice more at x: it passes if F(x) does not depend on them, as when only the
    log-determinant is estimated.

    Raises:
        ValueError: if the random numbers change F(x).
    """
    before = _generator_states(x)
    yield
    drawn = not all(map(torch.equal, before, _generator_states(x)))
    if drawn and _is_stochastic(model, x):
        raise ValueError(
            "expected the same map in every pass; the output of this model depends on random "
            "numbers (e.g. dropout in training mode), so F(x + eps v) - F(x) would compare two "
            "maps. Call model.eval() before the penalty and model.train() after it, and leave z "
            "out so that it is computed"
        )


def _generator_states(x: Tensor) -> list[Tensor]:
    states = [torch.get_rng_state()]
    holder = generator_of_device(x.device)
    if holder is not None:
        states.append(holder.get_rng_state(x.device))
    return states


def _is_stochastic(model: Invertible, x: Tensor) -> bool:
    with preserve_state(model), torch.no_grad():
        first, second = model(x), model(x)
    return bool((first - second).norm() > TOLERANCE * first.norm())

"""Regularizers under autocast: their passes run in float32, because bfloat16 noise drowns what they measure.

A difference F(x + eps v) - F(x) with eps = 0.1 is about a tenth of |F(x)|; eight bits of mantissa leave it one or two
correct digits, and their square enters the loss divided by eps^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["autocast_disabled", "reusable"]

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def autocast_disabled(x: Tensor) -> Iterator[Tensor]:
    """A block with autocast off for the device of ``x``; yields x, widened to float32 if autocast had been on.

    Without autocast x stays as it is: a model whose own parameters are half precision can be called in no other way.

    Raises:
        TypeError: if x is not real floating point.
        ValueError: if x is empty.
    """
    if not x.is_floating_point():
        raise TypeError(f"expected floating-point data x; got {x.dtype}: write x.float()")
    if x.numel() == 0:
        raise ValueError(f"expected at least one sample; got x of shape {tuple(x.shape)}")
    device = x.device.type
    widen = torch.is_autocast_enabled(device) and x.dtype in HALF
    with torch.autocast(device, enabled=False):
        yield x.float() if widen else x


def reusable(z: Tensor | None, x: Tensor) -> Tensor | None:
    """``z`` if it is F(x) to the precision of x; None if there is none, or autocast has rounded it.

    Raises:
        ValueError: if z holds another number of samples than x, or carries no graph where x or F should get gradients.
    """
    if z is None:
        return None
    if len(z) != len(x):
        raise ValueError(
            f"expected z = model(x) for the {len(x)} samples of x; got {len(z)} samples"
        )
    if torch.is_autocast_enabled(x.device.type) or (z.dtype in HALF and x.dtype not in HALF):
        return None
    return z

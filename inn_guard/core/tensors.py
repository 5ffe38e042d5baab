"""Small things about batches."""

from __future__ import annotations

import torch
from torch import Tensor


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Latents z ~ N(0, I) of that shape, dtype and device."""
    return torch.randn(like.shape, generator=generator, device="cpu", dtype=torch.float64).to(like)


def finite_rows(t: Tensor) -> Tensor:
    """Samples without NaN and Inf, (B,) bool."""
    return t.flatten(1).isfinite().all(1)

"""NumberFormat: one way to run a model, by the dtype it is stored in, autocast and TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from inn_guard.jacobian.rounding_error import unit_roundoff

__all__ = ["NumberFormat", "autocast", "number_formats", "tf32"]


@dataclass(frozen=True)
class NumberFormat:
    """One way to run a model.

    Attributes:
        name: as tables show it.
        storage: dtype of parameters and data.
        autocast: dtype that autocast computes in; None: no autocast.
        tf32: whether products on CUDA round their factors to TF32.
    """

    name: str
    storage: torch.dtype
    autocast: torch.dtype | None = None
    tf32: bool = False

    @property
    def roundoff(self) -> float:
        """The coarsest unit roundoff in it; TF32 keeps 10 bits of the fraction of factors."""
        return 2.0**-11 if self.tf32 else unit_roundoff(self.coarsest)

    @property
    def coarsest(self) -> torch.dtype:
        """The coarser of its dtypes."""
        return self.autocast or self.storage


def number_formats(device: torch.device) -> tuple[NumberFormat, ...]:
    """What is tried on this device: four dtypes, autocast, and TF32 on a GPU."""
    plain = tuple(
        NumberFormat(str(dtype).removeprefix("torch."), dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    )
    autocast = (NumberFormat("autocast bfloat16", torch.float32, autocast=torch.bfloat16),)
    tf32 = (NumberFormat("tf32", torch.float32, tf32=True),) if device.type == "cuda" else ()
    return plain + autocast + tf32


@contextmanager
def tf32(number_format: NumberFormat) -> Iterator[None]:
    """TF32 products on CUDA inside the block if and only if the format wants them."""
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = number_format.tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def autocast(device: str, number_format: NumberFormat) -> Any:
    """Autocast inside the block if the format wants it."""
    # no cache: weights cast without a graph, kept in it, would lose their gradients in a training
    # step around this
    if number_format.autocast is None:
        return nullcontext()
    return torch.autocast(device, dtype=number_format.autocast, cache_enabled=False)

"""Whether a processor multiplies matrices faster in bfloat16 than in float32: measured, once."""

from __future__ import annotations

import functools
import time

import torch

__all__ = ["faster_dtype", "speedup"]

ROWS, WIDTH = 1024, 256  #: of the matrices that are multiplied
ROUNDS = 5  #: of both products, in turn; the fastest of each counts
WORTHWHILE = 1.5  #: speed-up from which on the conversions of vectors cost less than is gained


def faster_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype in which products of matrices of ``dtype`` are faster; None if there is none.

    A processor may know bfloat16 and yet be slower with it, so its products are timed, once in a
    process.
    """
    if dtype != torch.float32 or speedup(str(device), torch.get_num_threads()) < WORTHWHILE:
        return None
    return torch.bfloat16


@functools.cache
def speedup(device: str, threads: int) -> float:
    """Time of a product in float32 over that in bfloat16, by this device and number of threads."""
    fastest = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    matrices = {
        dtype: (
            torch.ones(ROWS, WIDTH, dtype=dtype, device=device),
            torch.ones(WIDTH, WIDTH, dtype=dtype, device=device),
        )
        for dtype in fastest
    }
    for turn in range(ROUNDS + 1):
        for dtype, (left, right) in matrices.items():
            _synchronize(device)
            start = time.perf_counter()
            left @ right
            _synchronize(device)
            if turn:  # libraries prepare themselves in the first call
                fastest[dtype] = min(fastest[dtype], time.perf_counter() - start)
    return fastest[torch.float32] / fastest[torch.bfloat16]


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)

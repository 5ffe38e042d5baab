"""Memory of many products of the same size, kept by the process between them."""

from __future__ import annotations

import torch

__all__ = ["retain_freed_memory"]

LARGE = 2**25 - 2**16  #: bytes: just below the largest block to which glibc adapts


def retain_freed_memory() -> None:
    """Make glibc keep the memory that a product frees for the next one.

    Otherwise it returns large blocks to the system, and every product faults them in again. glibc
    keeps blocks up to twice the size of the first large one that it sees freed (mallopt(3),
    M_TRIM_THRESHOLD). This allocates and frees one. Other allocators are not affected.
    """
    torch.UntypedStorage(LARGE, device="cpu")

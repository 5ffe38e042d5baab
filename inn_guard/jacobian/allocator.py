"""Memory of many products of the same size, kept by the process between them."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

__all__ = ["freed_memory_returned", "retain_freed_memory"]

LARGE = 2**25 - 2**16  #: bytes: just below the largest block to which glibc adapts


def retain_freed_memory() -> None:
    """Make glibc keep the memory that a product frees for the next one.

    Otherwise it returns large blocks to the system, and every product faults them in again. glibc
    keeps blocks up to twice the size of the first large one that it sees freed (mallopt(3),
    M_TRIM_THRESHOLD). This allocates and frees one. Other allocators are not affected.
    """
    torch.UntypedStorage(LARGE, device="cpu")


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """After the block glibc gives memory that it keeps back to the system, also after an error.

    Its threshold stays where it is, as after any program that has freed a large tensor.
    """
    try:
        yield
    finally:
        # AttributeError: another C library; OSError, TypeError: a system without one to load
        with contextlib.suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)

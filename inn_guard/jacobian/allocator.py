"""Memory that many products of one size take and free again."""

from __future__ import annotations

import torch

__all__ = ["retain_freed_memory"]

LARGE = 2**25 - 2**16  #: bytes: just below the largest block from which glibc learns


def retain_freed_memory() -> None:
    """Have glibc keep what products free for the next ones, instead of handing it back and faulting it in again.

    It does so from the first large block on that it sees freed (mallopt(3), M_TRIM_THRESHOLD), up to twice that size;
    one is, untouched. Elsewhere this does nothing.
    """
    torch.UntypedStorage(LARGE, device="cpu")

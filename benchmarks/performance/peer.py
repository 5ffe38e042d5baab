"""The peer of the spectra: the Jacobian row by row by autograd, and numpy's SVD with vectors."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from benchmarks.performance.measurement import processor_seconds
from inn_guard.core.invertible import Invertible

__all__ = ["row_seconds", "svd_seconds"]


def row_seconds(net: Invertible, x: Tensor, *, rows: int) -> float:
    """Seconds of processor time per row of J at one sample, one backward pass each.

    The first row is not counted. All rows cost the same: the whole J takes dim z times this, plus
    one forward pass.
    """
    leaf = x.detach().clone().requires_grad_()
    z = net(leaf).flatten()

    def row(k: int) -> Tensor:
        return torch.autograd.grad(z[k], leaf, retain_graph=True)[0]

    row(0)
    start = time.process_time()
    for k in range(1, rows + 1):
        row(k)
    return (time.process_time() - start) / rows


def svd_seconds(J: Tensor) -> tuple[float, Tensor]:
    """Seconds of processor time of numpy's SVD with vectors, and the singular values."""
    matrix = J.numpy()
    seconds, values = processor_seconds(lambda: np.linalg.svd(matrix)[1])
    return seconds, torch.from_numpy(values)

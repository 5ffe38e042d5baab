"""Injective linear maps A: R^d -> R^D with the algebra that a Gaussian around their image needs."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DenseGram", "DenseWidening", "DiagonalGram", "Gram", "NearestUpsampling", "Widening"]


@runtime_checkable
class Gram(Protocol):
    """A symmetric positive definite d x d matrix M, applied to latents (B, *latent)."""

    def solve(self, w: Tensor) -> Tensor:
        """The solution M^-1 w."""
        ...

    def inverse_root(self, noise: Tensor) -> Tensor:
        """R noise with R R^T = M^-1: turns N(0, I) into N(0, M^-1)."""
        ...

    def log_det(self) -> Tensor:
        """The scalar ln det M."""
        ...

    def plus_identity(self) -> Gram:
        """The matrix I + M."""
        ...


class DenseGram:
    """M as a matrix, by its Cholesky factor: O(d^3) once, O(d^2) a product."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.factor = torch.linalg.cholesky(matrix)

    def solve(self, w: Tensor) -> Tensor:
        """M^-1 w for w (B, d)."""
        return torch.cholesky_solve(w.T, self.factor).T

    def inverse_root(self, noise: Tensor) -> Tensor:
        """The draw L^-T noise, with M = L L^T."""
        return torch.linalg.solve_triangular(self.factor.T, noise.T, upper=True).T

    def log_det(self) -> Tensor:
        """ln det M = 2 sum ln L_ii."""
        return 2 * self.factor.diagonal().log().sum()

    def plus_identity(self) -> DenseGram:
        """The matrix I + M."""
        identity = torch.eye(len(self.matrix), dtype=self.matrix.dtype, device=self.matrix.device)
        return DenseGram(self.matrix + identity)


@dataclass(frozen=True)
class DiagonalGram:
    """M = diag(entries), entries of the shape of one latent: everything is O(d)."""

    entries: Tensor

    def solve(self, w: Tensor) -> Tensor:
        """The solution w / entries."""
        return w / self.entries

    def inverse_root(self, noise: Tensor) -> Tensor:
        """The draw noise / sqrt(entries)."""
        return noise / self.entries.sqrt()

    def log_det(self) -> Tensor:
        """ln det M = sum ln entries."""
        return self.entries.log().sum()

    def plus_identity(self) -> DiagonalGram:
        """The matrix with 1 + entries on its diagonal."""
        return DiagonalGram(1 + self.entries)


class Widening(nn.Module, abc.ABC):
    """z -> A z with A of full column rank, its transpose, and A^T diag(w) A."""

    @abc.abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """A z: (B, *latent) -> (B, *data)."""

    @abc.abstractmethod
    def transpose(self, r: Tensor) -> Tensor:
        """A^T r: (B, *data) -> (B, *latent)."""

    @abc.abstractmethod
    def gram(self, weight: Tensor) -> Gram:
        """A^T diag(weight) A for positive weights of the shape of one x."""


class DenseWidening(Widening):
    """A learned D x d matrix; starts with orthonormal columns.

    Args:
        latent: d, the columns.
        data: D > d, the rows.
    """

    def __init__(self, latent: int, data: int) -> None:
        super().__init__()
        if not 0 < latent < data:
            raise ValueError(f"expected 0 < d < D, got d = {latent}, D = {data}")
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(data, latent)))

    def forward(self, z: Tensor) -> Tensor:
        """A z: (B, d) -> (B, D)."""
        return z @ self.weight.T

    def transpose(self, r: Tensor) -> Tensor:
        """A^T r: (B, D) -> (B, d)."""
        return r @ self.weight

    def gram(self, weight: Tensor) -> DenseGram:
        """A^T diag(weight) A, O(D d^2)."""
        return DenseGram(self.weight.T @ (weight[:, None] * self.weight))


class NearestUpsampling(Widening):
    """Every pixel is copied into a factor x factor block.

    The columns of A have disjoint supports, so A^T diag(w) A is diagonal.

    Args:
        factor: side of a block.

    >>> NearestUpsampling()(torch.ones(1, 3, 2, 2)).shape
    torch.Size([1, 3, 4, 4])
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"expected a factor of at least 1, got {factor}")
        self.factor = factor

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, f H, f W)."""
        return z.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)

    def transpose(self, r: Tensor) -> Tensor:
        """Sums over blocks: (B, C, f H, f W) -> (B, C, H, W)."""
        # pooling gives the mean over a block
        return functional.avg_pool2d(r, self.factor) * self.factor**2

    def gram(self, weight: Tensor) -> DiagonalGram:
        """The block sums of the weights (C, f H, f W), O(D)."""
        return DiagonalGram(self.transpose(weight[None])[0])

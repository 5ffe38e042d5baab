"""Small models with known answers, and models that misbehave in one way each."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain


class Linear(Invertible):
    """z = W x, one matrix for all samples; the inverse is solved."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix.T).reshape(x.shape)

    def inverse(self, z: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix, z.flatten(1).T).T.reshape(z.shape)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), torch.linalg.slogdet(self.matrix).logabsdet.expand(len(x))

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(z), -torch.linalg.slogdet(self.matrix).logabsdet.expand(len(z))


class Warp(Invertible):
    """z = x + a tanh(W x), a small: its inverse is a fixed point; no log-determinant."""

    def __init__(self, dimension: int, seed: int = 0, iterations: int = 80) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
        self.matrix = nn.Parameter(matrix / torch.linalg.matrix_norm(matrix, 2))
        self.iterations = iterations

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * torch.tanh(x @ self.matrix.T)

    def inverse(self, z: Tensor) -> Tensor:
        x = z
        for _ in range(self.iterations):
            x = z - 0.5 * torch.tanh(x @ self.matrix.T)
        return x


class Detached(Warp):
    """The derivative of its inverse is the identity's, as where an iteration runs in no_grad."""

    def inverse(self, z: Tensor) -> Tensor:
        return z + (super().inverse(z) - z).detach()


class NoForwardMode(torch.autograd.Function):
    """Doubling, with a reverse-mode derivative only."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


class WrongTwice(torch.autograd.Function):
    """Doubling; the derivative of its reverse mode is silently 0."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient.detach() + 0 * gradient

    @staticmethod
    def jvp(ctx, v):
        return 2 * v


class ReverseOnly(Invertible):
    """z = 2 x through a function without forward-mode derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return NoForwardMode.apply(x)

    def inverse(self, z: Tensor) -> Tensor:
        return z / 2


class Embedding(Invertible):
    """An injective model: z is the first entries of Q^T x."""

    bijective = False

    def __init__(self, dimension: int, latent: int, stretch: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(
            torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
        ).Q
        self.basis = nn.Parameter(basis[:, :latent])
        self.scale = nn.Parameter(
            torch.logspace(0, math.log10(stretch), latent, dtype=torch.float64)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.basis / self.scale

    def inverse(self, z: Tensor) -> Tensor:
        return (z * self.scale) @ self.basis.T


def random_chain(depth: int = 5, dimension: int = 6, spread: float = 1.0, seed: int = 0) -> Chain:
    """Alternating warps and linear maps, with singular values over ``spread`` decades each."""
    generator = torch.Generator().manual_seed(seed)
    steps: list[Invertible] = []
    for k in range(depth):
        left, right = (
            torch.linalg.qr(
                torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
            ).Q
            for _ in range(2)
        )
        values = torch.logspace(-spread / 2, spread / 2, dimension, dtype=torch.float64)
        steps += [Linear(left @ torch.diag(values) @ right), Warp(dimension, seed + k)]
    return Chain(*steps)

"""Shadowing: how far the nearest exact orbit of a chain of layers lies from a computed one.

A computed orbit h_0, h_1, ..., h_N errs in every layer: h_k is f_k(h_{k-1}) only up to rounding.
Exact orbits are the zeros of G(h)_k = h_k - f_k(h_{k-1}), k = 1..N. With J_k = f_k'(h_{k-1}),

    (A u)_k = u_k - J_k u_{k-1},    A = G'(h),

has full rank whatever the layers are, and h - A^T (A A^T)^-1 G(h) is the nearest orbit to first
order. A A^T is block tridiagonal. Its Cholesky factor comes from a QR decomposition of A^T, block
by block, in O(N D^3) operations. The product J_N ... J_1 is never formed: a condition number of
1e16 of the whole map does no harm.

References:
    Z. Xu, T. Campbell: Embracing the chaos: analysis and diagnosis of numerical instability in
    variational flows. NeurIPS 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import AutogradJacobian
from inn_guard.core.missing import NotApplicable
from inn_guard.core.tensors import nonzero_or_one
from inn_guard.jacobian.checks import dense_jacobian

__all__ = ["ShadowingWindow", "shadowing_window"]

NEWTON_STEPS = 5  #: at most; the number of correct digits doubles in each
POWER_STEPS = 20  #: of the iteration for 1 / sigma_min(A), which multiplies a tiny residual only
#: A step of Newton's method that leaves more than this share of the residual has met rounding.
PROGRESS = 0.5


@dataclass(frozen=True)
class ShadowingWindow:
    """An orbit that is exact up to ``residual``, and how far the computed one is from it.

    Lengths of state k are in units of its scale. All (B,) tensors are float64.

    Attributes:
        moved: |h_k - orbit_k| of every state, (N + 1, B).
        residual: |G| of the new orbit, what rounding in float64 leaves, (B,).
        amplification: lambda = 1 / sigma_min(A) at the new orbit, (B,), by power iteration.
        first_residual: |G| of the computed orbit, (B,).
        orbit: the new states, N + 1 tensors (B, *) in float64.
    """

    moved: Float[Tensor, "states batch"]
    residual: Float[Tensor, " batch"]
    amplification: Float[Tensor, " batch"]
    first_residual: Float[Tensor, " batch"]
    orbit: tuple[Tensor, ...]

    @property
    def radius(self) -> Tensor:
        """2 lambda |G|: how far an exact orbit may still be from the new one, (B,)."""
        return 2 * self.amplification * self.residual

    @property
    def window(self) -> Tensor:
        """max_k |h_k - orbit_k| + 2 lambda |G|, (B,); NaN where Newton's method left floats."""
        return self.moved.amax(0) + self.radius

    @property
    def converged(self) -> Tensor:
        """Whether the window is finite and the residual is a minor part of it, (B,)."""
        return self.window.isfinite() & (self.radius <= self.moved.amax(0))


def shadowing_window(
    layers: Sequence[Invertible],
    states: Sequence[Tensor],
    *,
    relative: bool = False,
    steps: int = NEWTON_STEPS,
) -> ShadowingWindow:
    """How far exact orbits are from computed ones, by Newton's method in float64.

    Stage one moves the orbit, h <- h - A^+ G(h), until |G| is rounding in float64. Stage two is the
    theorem of Newton and Kantorovich at the new orbit: if G' is M-Lipschitz within 2 lambda |G| of
    it and 2 M lambda^2 |G| <= 1, an exact orbit lies within 2 lambda |G|. M is not known here, and
    rounding of f_k in float64 is not bounded: the window is measured, not proved.

    Args:
        layers: f_1, ..., f_N in float64, first layer first.
        states: h_0, ..., h_N, each (B, *), computed in any precision and in either direction.
        relative: measure state k in units of |h_k|, for orbits whose states differ by orders of
            magnitude. Default: all states in the units that they have.
        steps: of Newton's method at most.

    Raises:
        NotApplicable: if the layers change the number of dimensions.
        ValueError: if there is not one state more than layers.
    """
    if not layers or len(states) != len(layers) + 1:
        raise ValueError(
            f"expected one state more than layers, at least two; got {len(states)} states and "
            f"{len(layers)} layers"
        )
    if len({state[0].numel() for state in states}) > 1:
        raise NotApplicable("an orbit needs layers that keep the number of dimensions")
    shapes = [state.shape for state in states]
    start = torch.stack([state.detach().double().flatten(1) for state in states])
    scale = torch.ones_like(start[:, :, 0])
    if relative:
        scale = nonzero_or_one(start.norm(dim=2))
    orbit = start
    best = start  # the orbit with the smallest residual so far, sample by sample
    residual = torch.full_like(scale[0], math.inf)
    first = residual
    system = None
    for step in range(steps + 1):
        jacobians, errors = _linearized(layers, orbit, shapes, scale)
        size = errors.norm(dim=2).square().sum(0).sqrt()
        if step == 0:
            first = size
        better = size < PROGRESS * residual  # false for NaN
        if not bool(better.any()):
            break
        best = torch.where(better[:, None], orbit, best)
        residual = torch.where(better, size, residual)
        system = BlockBidiagonal(jacobians)
        orbit = orbit - scale[:, :, None] * system.least_solution(errors)
    if system is None:  # the computed orbit itself is not finite
        amplification = torch.full_like(residual, math.nan)
    else:
        amplification = system.inverse_norm()
    new = tuple(state.reshape(shape) for state, shape in zip(best, shapes, strict=True))
    moved = (best - start).norm(dim=2) / scale
    return ShadowingWindow(moved, residual, amplification, first, new)


class BlockBidiagonal:
    """A with (A u)_k = u_k - J_k u_{k-1}, k = 1..N, factorised as A^T = Q [R; 0].

    R is upper block bidiagonal and R^T R = A A^T. Block column k of A^T holds -J_k^T above I; an
    orthogonal matrix of 2 D rows turns both into R_k above 0, and leaves S_k above the next carry
    in the column that follows.

    Args:
        jacobians: J_1, ..., J_N, (N, B, D, D).
    """

    def __init__(self, jacobians: Float[Tensor, "layers batch d d"]) -> None:
        size = jacobians.shape[-1]
        identity = torch.eye(size).to(jacobians).expand_as(jacobians[0])
        self._rotations: list[Tensor] = []
        self._diagonal: list[Tensor] = []
        self._above: list[Tensor] = []
        carry = -jacobians[0].mT
        for k in range(len(jacobians)):
            column = torch.cat([carry, identity], dim=1)
            rotation, factor = torch.linalg.qr(column, mode="complete")
            self._rotations.append(rotation)
            self._diagonal.append(factor[:, :size])
            if k + 1 < len(jacobians):
                following = -rotation[:, size:].mT @ jacobians[k + 1].mT
                self._above.append(following[:, :size])
                carry = following[:, size:]

    def least_solution(
        self, right: Float[Tensor, "layers batch d"]
    ) -> Float[Tensor, "states batch d"]:
        """The shortest u with A u = right: A^T (A A^T)^-1 right."""
        solved = self._solve_transposed(right.unsqueeze(3))
        blocks = [*solved, torch.zeros_like(solved[0])]
        size = right.shape[2]
        for k in reversed(range(len(self._rotations))):
            pair = self._rotations[k] @ torch.cat(blocks[k : k + 2], dim=1)
            blocks[k] = pair[:, :size]
            blocks[k + 1] = pair[:, size:]
        return torch.stack(blocks).squeeze(3)

    def inverse_norm(self, *, steps: int = POWER_STEPS) -> Float[Tensor, " batch"]:
        """lambda = |A^+| = 1 / sigma_min(A), from below, by power iteration with (A A^T)^-1."""
        batch, size = self._diagonal[0].shape[:2]
        # one start vector for all samples: a sample's result does not depend on its batch
        generator = torch.Generator().manual_seed(0)
        shape = (len(self._diagonal), 1, size, 1)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        vector = drawn.to(self._diagonal[0]).expand(-1, batch, -1, -1)
        length = _length(vector)
        for _ in range(steps):
            solved = self._solve(self._solve_transposed(vector / length[:, None, None]))
            vector = torch.stack(solved)
            length = _length(vector)
        return length.sqrt()

    def _solve_transposed(self, right: Tensor) -> list[Tensor]:
        """R^-T right, first block first."""
        solved: list[Tensor] = []
        for k, diagonal in enumerate(self._diagonal):
            block = right[k]
            if k:
                block = block - self._above[k - 1].mT @ solved[-1]
            solved.append(torch.linalg.solve_triangular(diagonal.mT, block, upper=False))
        return solved

    def _solve(self, right: Sequence[Tensor]) -> list[Tensor]:
        """R^-1 right, first block first; the last block is solved for first."""
        solved: list[Tensor] = []
        for k in reversed(range(len(self._diagonal))):
            block = right[k]
            if solved:
                block = block - self._above[k] @ solved[-1]
            solved.append(torch.linalg.solve_triangular(self._diagonal[k], block, upper=True))
        return solved[::-1]


def _linearized(
    layers: Sequence[Invertible], orbit: Tensor, shapes: Sequence[torch.Size], scale: Tensor
) -> tuple[Tensor, Tensor]:
    """J_k, (N, B, D, D), and G(h)_k, (N, B, D), in units of the states' scales."""
    jacobians, errors = [], []
    for k, layer in enumerate(layers):
        state = orbit[k].reshape(shapes[k])
        jacobian = AutogradJacobian(layer, layer.inverse, state)
        ratio = (scale[k] / scale[k + 1])[:, None, None]
        jacobians.append(dense_jacobian(jacobian, state) * ratio)
        gap = orbit[k + 1] - jacobian.output.flatten(1)
        errors.append(gap / scale[k + 1][:, None])
    return torch.stack(jacobians), torch.stack(errors)


def _length(vector: Tensor) -> Tensor:
    """Euclidean length of each sample of a vector of blocks (N, B, D, 1): (B,)."""
    return vector.square().sum((0, 2, 3)).sqrt()

"""The certified bound of a chain for given multipliers.

The state's matrix is kept as base + factor factor^H, as in the search for multipliers, so that what all frequencies
share is computed once. Any matrix above the true one is valid: whatever rounding may have taken away is added to the
base as a multiple of the identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.lipschitz.lipsdp.chain import Chain, Layer, Multipliers, product
from inn_guard.numerics.rounding import UNIT, gamma, largest_eigenvalue, up

__all__ = ["certify", "covering"]

CHUNK = 2**22  #: entries of the matrices of several frequencies that are certified at once
FOLDS = 8  #: shifts that are tried to make a matrix positive definite


def certify(chain: Chain, multipliers: Multipliers) -> float:
    """A certified upper bound of sup ||J|| over all slopes of a chain, proved by the given multipliers.

    N^-1 is never trusted: an approximate solution X of N X = V enters with its residual E = V - N X,
    V^H N^-1 V <= V^H X + X^H E + ||E||^2 / lmin(N), with lmin(N) by Cholesky.

    Args:
        chain: what is bounded.
        multipliers: D of every layer, (n,) each, positive.

    Returns:
        The bound; inf if the multipliers prove nothing.

    References:
        Efficient and Accurate Estimation of Lipschitz Constants for Deep Neural Networks (Fazlyab, Robey, Hassani,
        Morari, Pappas, 2019), LipSDP-Neuron. This differs from the paper in: no semidefinite program; slopes per
        neuron; slopes of exactly one; one problem per frequency of a convolution.
    """
    return max(_certified(chain.at(part), multipliers) for part in _chunks(chain))


def _chunks(chain: Chain) -> tuple[Tensor, ...]:
    widest = max([layer.keep.shape[1] + layer.weight.shape[1] for layer in chain.layers], default=1)
    return torch.arange(chain.frequencies).split(max(CHUNK // widest**2, 1))


@dataclass(frozen=True)
class _Above:
    """J J^H <= base + factor factor^H, per frequency.

    Attributes:
        base: Hermitian (1 or frequencies, m, m), or None for zero.
        factor: (1 or frequencies, m, r).
    """

    base: Tensor | None
    factor: Tensor

    def through(self, A: Tensor, error: float) -> _Above:
        """A (base + factor factor^H) A^H, A being known up to ``error`` in the Frobenius norm."""
        F, a, f = product(A, self.factor), _frobenius(A), _frobenius(self.factor)
        lost = up((_rounded(A, A.shape[-1]) * a + error) * f * (1 + 1e-12), 2)
        slack = up((2 * _frobenius(F) + lost) * lost, 4)
        if self.base is None:
            return _Above(_times_identity(slack, A.shape[1]), F)
        B, own = _congruence(A, error, self.base)
        return _Above(_raised(B, up(slack + own)), F)

    def matrix(self) -> tuple[Tensor, float]:
        """The sum, Hermitian, and a bound of its rounding error."""
        F = self.factor
        Q = product(F, F.mH)
        slack = _rounded(F, F.shape[-1] + 2) * _frobenius(F) ** 2
        if self.base is not None:
            Q = Q + self.base
            slack += 8 * UNIT * _frobenius(Q)
        return (Q + Q.mH) / 2, up(slack * (1 + 1e-12) + 8 * UNIT * _frobenius(Q), 4)

    def folded(self) -> _Above:
        """The same with a square factor and no base, where that is smaller."""
        m, r = self.factor.shape[-2:]
        if m > 2 * r or (self.base is None and m >= r):
            return self
        L = self.root()
        return self if L is None else _Above(None, L)

    def root(self) -> Tensor | None:
        """L with L L^H >= the sum, by a shift of its diagonal; None where no shift was enough."""
        Q, error = self.matrix()
        shift = error + 4 * _cholesky_error(Q) + 1e-15 * _largest_diagonal(Q)
        for _ in range(FOLDS):
            L, info = torch.linalg.cholesky_ex(_raised(Q, shift))
            if not bool(info.any()):
                return L
            shift *= 4
        return None


def covering(chain: Chain, multipliers: Multipliers) -> Tensor | None:
    """A factor F with J J^H <= F F^H for all slopes of a chain, (1 or frequencies, out, r), proved by the multipliers.

    Returns:
        F; None if the multipliers prove nothing.
    """
    parts = []
    for part in _chunks(chain):
        state = _reached(chain.at(part), multipliers)
        factor = None if state is None else state.root()
        if factor is None:
            return None
        parts.append(factor)
    return torch.cat(parts)


def _certified(chain: Chain, multipliers: Multipliers) -> float:
    state = _reached(chain, multipliers)
    if state is None:
        return math.inf
    S, error = state.matrix()
    square = up(largest_eigenvalue(S) + error)
    return up(math.sqrt(max(square, 0.0))) if math.isfinite(square) else math.inf


def _reached(chain: Chain, multipliers: Multipliers) -> _Above | None:
    """The state behind the output; None if the multipliers prove nothing."""
    state = _Above(None, torch.eye(chain.size, dtype=torch.float64)[None])
    for layer, D in zip(chain.layers, multipliers, strict=True):
        joined = state.through(layer.joint, layer.error)
        advanced = _advanced(joined, layer, D) if len(D) else joined
        if advanced is None:
            return None
        state = advanced.folded()
    return state.through(chain.output, chain.error)


def _advanced(T: _Above, layer: Layer, D: Tensor) -> _Above | None:
    """[[P, 0], [0, R^2 D - M D M]] + V^H N^-1 V, and F' = ([K F; 0] + V^H N^-1 W F) (I - G)^{-1/2}."""
    k, M, R = layer.keep.shape[1], layer.mean, layer.half_width
    base = T.base if T.base is not None else _times_identity(0.0, k + len(D))
    kept, WF = T.factor[:, :k], T.factor[:, k:]
    solver = _Solver.of(D, base[:, k:, k:])
    if solver is None:
        return None
    C = base[:, k:, :k]
    V = torch.cat([C, torch.diag_embed(D * M).to(C.dtype).expand(len(C), -1, -1)], 2)
    X, lost = solver.solve(V)
    new, slack = solver.square(V, X, lost)
    new[:, :k, :k] += base[:, :k, :k]
    new.diagonal(dim1=1, dim2=2)[:, k:].add_(R * R * D - M * M * D)
    slack += 8 * UNIT * (_frobenius(base) + float((D * (M * M + R * R)).max()) + _frobenius(new))
    Z = product(X.mH, WF)
    w = _frobenius(WF)
    off = (
        _rounded(Z, len(D) + 2) * (_frobenius(X) * w + _frobenius(kept))
        + lost * w / solver.smallest
    )
    Z[:, :k] += kept
    Y, residual = solver.solve(WF)
    ended = _over_root(Z, up(off * (1 + 1e-9)), *solver.square(WF, Y, residual))
    if ended is None:
        return None
    factor, more = ended
    return _Above(_raised(new, up((slack + more) * (1 + 1e-9), 4)), factor)


@dataclass(frozen=True)
class _Solver:
    """N = D - S, a little less than that, with an approximate inverse and a lower bound of its smallest eigenvalue."""

    N: Tensor
    inverse: Tensor
    smallest: float

    @classmethod
    def of(cls, D: Tensor, S: Tensor) -> _Solver | None:
        """None if N is not positive definite."""
        N = torch.diag(D).to(S.dtype) - (S + S.mH) / 2
        N.diagonal(dim1=1, dim2=2).sub_(8 * UNIT * (float(S.abs().max()) + float(D.max())))
        smallest = -largest_eigenvalue(-N)
        if not smallest > 0:
            return None
        return cls(N, torch.cholesky_inverse(torch.linalg.cholesky(N)), smallest)

    def solve(self, V: Tensor) -> tuple[Tensor, float]:
        """X close to N^-1 V, and a bound of the Frobenius norm of V - N X."""
        X = product(self.inverse, V)
        n, x, v = _frobenius(self.N), _frobenius(X), _frobenius(V)
        return X, up(
            (_frobenius(V - product(self.N, X)) + _rounded(X, len(self.N[0]) + 4) * (n * x + v))
            * (1 + 1e-9)
        )

    def square(self, V: Tensor, X: Tensor, lost: float) -> tuple[Tensor, float]:
        """V^H X + X^H E, and what V^H N^-1 V may exceed it by, given ||E|| <= ``lost``."""
        E = V - product(self.N, X)
        new = product(V.mH, X) + product(X.mH, E)
        rounding = _rounded(new, len(self.N[0]) + 4)
        n, v, x = _frobenius(self.N), _frobenius(V), _frobenius(X)
        unseen = rounding * (n * x + v)  # of E itself
        slack = rounding * x * (v + lost) + 2 * unseen * x + lost * lost / self.smallest
        return (new + new.mH) / 2, up((slack + 4 * UNIT * _frobenius(new)) * (1 + 1e-9), 4)


def _over_root(Z: Tensor, off: float, G: Tensor, slack: float) -> tuple[Tensor, float] | None:
    """F' and s with Z (I - G)^-1 Z^H <= F' F'^H + s I, Z being known up to ``off`` and G to ``slack``."""
    H = -G
    H.diagonal(dim1=1, dim2=2).add_(1 - slack - 8 * UNIT * (1 + float(G.abs().max())))
    shift = 2 * _cholesky_error(H)
    L, info = torch.linalg.cholesky_ex(_raised(H, -shift))
    smallest = -largest_eigenvalue(-H) - 2 * shift
    if bool(info.any()) or not smallest > 0:
        return None
    factor = torch.linalg.solve_triangular(L.mH, Z, upper=True, left=False)
    f, z = _frobenius(factor), _frobenius(Z)
    rounding = _rounded(factor, len(L[0]) + 4) * (f * _frobenius(L) + z)
    distance = up((_frobenius(Z - factor @ L.mH) + rounding + off) * (1 + 1e-9), 2) / math.sqrt(
        smallest
    )
    return factor, up((2 * f + distance) * distance * (1 + 1e-9), 4)


def _congruence(A: Tensor, error: float, B: Tensor) -> tuple[Tensor, float]:
    """A B A^H, and a bound of the norm of its error, A being known up to ``error``."""
    S = product(product(A, B), A.mH)
    a, b = _frobenius(A), _frobenius(B)
    relative = _rounded(S, 2 * A.shape[-1] + 4)
    return (S + S.mH) / 2, up((relative * a * a + (2 * a + error) * error) * b * (1 + 1e-9), 4)


def _rounded(A: Tensor, operations: int) -> float:
    # complex products and quotients err by less than eight real roundings each (Higham, Lemma 3.5)
    return gamma((8 if A.is_complex() else 1) * operations)


def _cholesky_error(H: Tensor) -> float:
    """A bound of ||L L^H - H|| for the computed factor of H, if there is one (Higham, Theorem 10.3)."""
    weight = _rounded(H, H.shape[-1] + 2)
    trace = float(H.diagonal(dim1=1, dim2=2).real.clamp_min(0).sum(1).max()) * (
        1 + gamma(H.shape[-1] + 2)
    )
    return up(2 * weight * trace + 4 * UNIT * _largest_diagonal(H), 4)


def _largest_diagonal(H: Tensor) -> float:
    return float(H.diagonal(dim1=1, dim2=2).real.abs().max())


def _raised(H: Tensor, shift: float) -> Tensor:
    """H + shift I, the shift enlarged by its own rounding where it is positive."""
    H = H.clone()
    H.diagonal(dim1=1, dim2=2).add_(
        shift + (2 * UNIT * (_largest_diagonal(H) + shift) if shift > 0 else 0.0)
    )
    return H


def _times_identity(value: float, size: int) -> Tensor:
    return value * torch.eye(size, dtype=torch.float64)[None]


def _frobenius(A: Tensor) -> float:
    """An upper bound of the largest Frobenius norm of a batch."""
    if A.numel() == 0:
        return 0.0
    return up(
        float(torch.linalg.matrix_norm(A).max()) * (1 + gamma(4 * A.shape[-1] * A.shape[-2] + 4)), 2
    )

"""The certified bound of a chain for given multipliers.

The state's matrix is kept as base + factor factor^H, as in the search for multipliers, so that the
part that all frequencies share is computed once. Any matrix above the true one is valid: a bound of
the rounding error is added to the base as a multiple of the identity. ``|| ||`` are Frobenius norms
in the comments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.execution.deadline import spend
from inn_guard.lipschitz.lipsdp.chain import Chain, Layer, Multipliers, product
from inn_guard.numerics.rounding import (
    UNIT,
    Upper,
    frobenius_norm,
    gamma_of,
    largest_eigenvalue,
)

__all__ = ["certify", "covering_factor"]

CHUNK = 2**22  #: entries of the matrices of several frequencies that are certified at once
CERTIFICATE = 6.0  #: times an evaluation of the recursion that its certificate takes
FOLDS = 8  #: shifts that are tried to make a matrix positive definite


def certify(chain: Chain, multipliers: Multipliers) -> Upper:
    """A certified upper bound of sup ||J|| over all slopes of a chain, proved by multipliers.

    N^-1 is never trusted: an approximate solution X of N X = V enters with its residual E = V - N
    X, V^H N^-1 V <= V^H X + X^H E + ||E||^2 / lmin(N), with lmin(N) by Cholesky.

    Args:
        chain: the chain to bound.
        multipliers: D of every layer, (n,) each, positive.

    Returns:
        The bound; inf if the multipliers prove nothing.

    References:
        Efficient and Accurate Estimation of Lipschitz Constants for Deep Neural Networks (Fazlyab,
        Robey, Hassani, Morari, Pappas, 2019), LipSDP-Neuron. This differs from the paper in: no
        semidefinite program; slopes per neuron; slopes of exactly one; one problem per frequency of
        a convolution.
    """
    spend(CERTIFICATE * chain.operations)
    return Upper.max(*[_certified(chain.at(part), multipliers) for part in _chunks(chain)])


def _chunks(chain: Chain) -> tuple[Tensor, ...]:
    widest = 1
    for layer in chain.layers:
        widest = max(widest, layer.keep.shape[1] + layer.weight.shape[1])
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
        F = product(A, self.factor)
        lost = (gamma_of(A, A.shape[-1]) * frobenius_norm(A) + error) * frobenius_norm(self.factor)
        slack = (2 * frobenius_norm(F) + lost) * lost
        if self.base is None:
            return _Above(_times_identity(slack, A.shape[1]), F)
        B, own = _congruence(A, error, self.base)
        return _Above(_raised(B, slack + own), F)

    def matrix(self) -> tuple[Tensor, Upper]:
        """The sum, Hermitian, and a bound of its rounding error."""
        Q = product(self.factor, self.factor.mH)
        f = frobenius_norm(self.factor)
        slack = gamma_of(self.factor, self.factor.shape[-1] + 2) * f * f
        if self.base is not None:
            Q = Q + self.base
            slack = slack + 8 * UNIT * frobenius_norm(Q)
        return _hermitian(Q), slack + 8 * UNIT * frobenius_norm(Q)

    def folded(self) -> _Above:
        """The same with a square factor and no base, where that is smaller."""
        m, r = self.factor.shape[-2:]
        if m > 2 * r or (self.base is None and m >= r):
            return self
        L = self.root()
        if L is None:
            return self
        return _Above(None, L)

    def root(self) -> Tensor | None:
        """L with L L^H >= the sum, by a shift of its diagonal; None where no shift was enough."""
        Q, error = self.matrix()
        # the last term only keeps the first shift away from zero
        shift = error + 4 * _cholesky_error(Q) + 1e-15 * _largest_diagonal(Q)
        for _ in range(FOLDS):
            L, info = torch.linalg.cholesky_ex(_raised(Q, shift))
            if not bool(info.any()):
                return L
            shift = 4 * shift
        return None


def covering_factor(chain: Chain, multipliers: Multipliers) -> Tensor | None:
    """A factor F with J J^H <= F F^H for all slopes of a chain, proved by multipliers.

    Returns:
        F, (1 or frequencies, out, r); None if the multipliers prove nothing.
    """
    parts = []
    spend(CERTIFICATE * chain.operations)
    for part in _chunks(chain):
        state = _output_state(chain.at(part), multipliers)
        if state is None:
            return None
        factor = state.root()
        if factor is None:
            return None
        parts.append(factor)
    return torch.cat(parts)


def _certified(chain: Chain, multipliers: Multipliers) -> Upper:
    state = _output_state(chain, multipliers)
    if state is None:
        return Upper(math.inf)
    S, error = state.matrix()
    return (largest_eigenvalue(S) + error).sqrt()


def _output_state(chain: Chain, multipliers: Multipliers) -> _Above | None:
    """The matrix of the output; None if the multipliers prove nothing."""
    state = _Above(None, torch.eye(chain.size, dtype=torch.float64)[None])
    for layer, D in zip(chain.layers, multipliers, strict=True):
        joined = state.through(layer.joint, layer.error)
        if not len(D):
            state = joined.folded()
            continue
        advanced = _advanced(joined, layer, D)
        if advanced is None:
            return None
        state = advanced.folded()
    return state.through(chain.output, chain.error)


def _advanced(T: _Above, layer: Layer, D: Tensor) -> _Above | None:
    """The matrix after the slopes.

    Its factor is ([K F; 0] + V^H N^-1 W F) (I - G)^{-1/2}.

    The base is [[P, 0], [0, R^2 D - M D M]] + V^H N^-1 V. None if the multipliers prove nothing.
    """
    k, M, R = layer.keep.shape[1], layer.mean, layer.half_width
    base = T.base
    if base is None:
        base = _times_identity(0.0, k + len(D))
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
    # roundings of the two sums just made
    terms = frobenius_norm(base) + Upper(float((D * (M * M + R * R)).max())) + frobenius_norm(new)
    slack = slack + 8 * UNIT * terms
    Z = product(X.mH, WF)
    w = frobenius_norm(WF)
    rounding = gamma_of(Z, len(D) + 2) * (frobenius_norm(X) * w + frobenius_norm(kept))
    Z[:, :k] += kept
    Y, residual = solver.solve(WF)
    G, G_slack = solver.square(WF, Y, residual)
    ended = _over_root(Z, rounding + lost * w / solver.smallest, G, G_slack)
    if ended is None:
        return None
    factor, more = ended
    return _Above(_raised(new, slack + more), factor)


@dataclass(frozen=True)
class _Solver:
    """N <= D - S with an approximate inverse and a lower bound of its smallest eigenvalue."""

    N: Tensor
    inverse: Tensor
    smallest: float

    @classmethod
    def of(cls, D: Tensor, S: Tensor) -> _Solver | None:
        """None if N is not positive definite."""
        N = torch.diag(D).to(S.dtype) - _hermitian(S)
        rounding = 8 * UNIT * (Upper(float(S.abs().max())) + float(D.max()))
        N.diagonal(dim1=1, dim2=2).sub_(rounding)
        smallest = -largest_eigenvalue(-N)
        if not smallest > 0:
            return None
        return cls(N, torch.cholesky_inverse(torch.linalg.cholesky(N)), smallest)

    def solve(self, V: Tensor) -> tuple[Tensor, Upper]:
        """X close to N^-1 V, and a bound of ||V - N X||."""
        X = product(self.inverse, V)
        residual = frobenius_norm(V - product(self.N, X))
        return X, residual + self._unseen(V, X)

    def _unseen(self, V: Tensor, X: Tensor) -> Upper:
        """The rounding error of V - N X."""
        terms = frobenius_norm(self.N) * frobenius_norm(X) + frobenius_norm(V)
        return gamma_of(X, len(self.N[0]) + 4) * terms

    def square(self, V: Tensor, X: Tensor, lost: Upper) -> tuple[Tensor, Upper]:
        """V^H X + X^H E, and by how much V^H N^-1 V may exceed it; E = V - N X, ||E|| <= lost."""
        E = V - product(self.N, X)
        new = product(V.mH, X) + product(X.mH, E)
        x = frobenius_norm(X)
        rounding = gamma_of(new, len(self.N[0]) + 4) * x * (frobenius_norm(V) + lost)
        slack = rounding + 2 * self._unseen(V, X) * x + lost * lost / self.smallest
        return _hermitian(new), slack + 4 * UNIT * frobenius_norm(new)


def _over_root(Z: Tensor, off: Upper, G: Tensor, slack: Upper) -> tuple[Tensor, Upper] | None:
    """F' and s with Z (I - G)^-1 Z^H <= F' F'^H + s I; Z is known up to ``off``, G to ``slack``."""
    H = -G
    rounding = 8 * UNIT * (Upper(float(G.abs().max())) + 1)
    H.diagonal(dim1=1, dim2=2).add_(1 - (slack + rounding))
    shift = 2 * _cholesky_error(H)
    L, info = torch.linalg.cholesky_ex(_raised(H, -shift))
    smallest = -(largest_eigenvalue(-H) + 2 * shift)
    if bool(info.any()) or not smallest > 0:
        return None
    factor = torch.linalg.solve_triangular(L.mH, Z, upper=True, left=False)
    f = frobenius_norm(factor)
    rounding = gamma_of(factor, len(L[0]) + 4) * (f * frobenius_norm(L) + frobenius_norm(Z))
    residual = frobenius_norm(Z - factor @ L.mH) + rounding + off
    distance = residual / _root_below(smallest)
    return factor, (2 * f + distance) * distance


def _root_below(x: float) -> float:
    """A lower bound of the root of x > 0."""
    return math.nextafter(math.sqrt(x), 0.0)


def _congruence(A: Tensor, error: float, B: Tensor) -> tuple[Tensor, Upper]:
    """A B A^H, and a bound of the norm of its error, A being known up to ``error``."""
    S = product(product(A, B), A.mH)
    a = frobenius_norm(A)
    relative = gamma_of(S, 2 * A.shape[-1] + 4) * a * a + (2 * a + error) * error
    return _hermitian(S), relative * frobenius_norm(B)


def _hermitian(A: Tensor) -> Tensor:
    return (A + A.mH) / 2


def _cholesky_error(H: Tensor) -> Upper:
    """A bound of ||L L^H - H|| for the computed factor L of H (Higham, Theorem 10.3)."""
    n = H.shape[-1]
    diagonal = H.diagonal(dim1=1, dim2=2).real
    trace = Upper.computed(float(diagonal.clamp_min(0).sum(1).max()), n + 2)
    return 2 * gamma_of(H, n + 2) * trace + 4 * UNIT * Upper(_largest_diagonal(H))


def _largest_diagonal(H: Tensor) -> float:
    return float(H.diagonal(dim1=1, dim2=2).real.abs().max())


def _raised(H: Tensor, shift: float) -> Tensor:
    """H + shift I; a positive shift is enlarged by its own rounding."""
    if shift > 0:
        shift = shift + 2 * UNIT * (Upper(_largest_diagonal(H)) + shift)
    H = H.clone()
    H.diagonal(dim1=1, dim2=2).add_(shift)
    return H


def _times_identity(value: float, size: int) -> Tensor:
    return value * torch.eye(size, dtype=torch.float64)[None]

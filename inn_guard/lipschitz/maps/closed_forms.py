"""Bi-Lipschitz bounds of building blocks, numbers to numbers, every operation rounded outwards.

Each function returns `Pair(forward, inverse)`. With ``paper=True`` those of Table 3 return the printed formula instead.
A bound that depends on a box is a bound of sup ||J|| and sup ||J^-1|| over that box; sup ||J^-1|| over the image of a
box is the Lipschitz constant of F^-1 on that image only where the image is convex.

References:
    Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann, Vicol, Wang, Grosse,
    Jacobsen, 2021), Table 3 and appendix B.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import UNIT, gamma, up
from inn_guard.numerics.spectral_norm import exact, inverse_norm, spectral_norm

__all__ = [
    "Pair",
    "additive_coupling",
    "affine_coupling",
    "autoregressive",
    "diagonal",
    "elementwise",
    "invertible_residual",
    "linear",
    "logit",
    "neural_ode",
    "planar",
    "radial",
    "sylvester",
    "triangular_norm",
]


class Pair(NamedTuple):
    """Upper bounds of the Lipschitz constants of a map and of its inverse."""

    forward: float
    inverse: float


def triangular_norm(off_diagonal: float, scale: float) -> float:
    """The spectral norm of [[1, 0], [m, c]] = (sqrt(m^2 + (1 + c)^2) + sqrt(m^2 + (1 - c)^2)) / 2, rounded up.

    It bounds ||[[I, 0], [M, D]]|| for ||M|| <= m and ||D|| <= c, because the norm of a block matrix is at most that of
    the matrix of its blocks' norms.

    >>> abs(triangular_norm(0.0, 3.0) - 3) < 1e-14
    True
    """
    if not (math.isfinite(off_diagonal) and math.isfinite(scale)):
        return math.inf
    m, c = Interval.of(off_diagonal).square(), Interval.of(scale)
    return (((m + (c + 1.0).square()).sqrt() + (m + (c - 1.0).square()).sqrt()) * 0.5).sup()


def additive_coupling(lipschitz: float, *, paper: bool = False) -> Pair:
    """x2 + t(x1): phi(L) = (L + sqrt(L^2 + 4)) / 2 both ways, exact in L = sup ||J_t||; Table 3 says 1 + L.

    The singular values of [[I, 0], [T, I]] come in pairs sigma, 1/sigma with sigma - 1/sigma = a singular value of T.

    >>> round(additive_coupling(1.0).forward, 6), round(additive_coupling(1.0, paper=True).forward, 6)
    (1.618034, 2.0)
    """
    bound = up(1 + lipschitz) if paper else triangular_norm(lipschitz, 1.0)
    return Pair(bound, bound)


def affine_coupling(off_diagonal: Pair, scale: Pair, *, paper: bool = False) -> Pair:
    """x2 * g(s(x1)) + t(x1), on a box: ||[[1, 0], [m, c]]|| each way; Table 3 says max(1, c) + M.

    Tightened, M* is taken at x: J^-1 = [[I, 0], [-D^-1 M, D^-1]] and D^-1 M = diag(x2 g'/g) J_s + D^-1 J_t, which needs
    sup |g'/g| where the paper's M*, taken at y, needs sup |(1/g)'|.

    Args:
        off_diagonal: bounds of ||M|| and of ||M*||: for ``paper`` those printed beneath Table 3.
        scale: sup g and sup 1/g.
        paper: the printed formula.

    Returns:
        The bounds.
    """
    if paper:
        return Pair(*(up(max(1.0, c) + m) for m, c in zip(off_diagonal, scale, strict=True)))
    return Pair(*(triangular_norm(m, c) for m, c in zip(off_diagonal, scale, strict=True)))


def invertible_residual(
    lipschitz: float,
    *,
    largest: float | None = None,
    smallest: float | None = None,
    paper: bool = False,
) -> Pair:
    """x + g(x), Lip(g) < 1: sqrt(1 + 2 mu + L^2) and 1 / (1 + inf lmin(sym J_g)); Table 3: 1 + L and 1 / (1 - L).

    Args:
        lipschitz: L, a bound of Lip(g).
        largest: mu, a bound of lmax((J_g + J_g^T) / 2); L unless given.
        smallest: a lower bound of lmin of the same; -L unless given.
        paper: the printed formula.

    Returns:
        The bounds; an infinite inverse where none is proved.
    """
    mu = lipschitz if largest is None or paper else min(largest, lipschitz)
    low = -lipschitz if smallest is None or paper else max(smallest, -lipschitz)
    L = Interval.of(lipschitz)
    forward = L + 1.0 if paper else (L.square() + Interval.of(mu) * 2.0 + 1.0).sqrt()
    room = Interval.of(low) + 1.0
    return Pair(forward.sup(), room.reciprocal().sup() if room.inf() > 0 else math.inf)


def neural_ode(
    lipschitz: float,
    time: float,
    *,
    largest: float | None = None,
    smallest: float | None = None,
    paper: bool = False,
) -> Pair:
    """dx/dt = F(x, t) on [0, T]: exp(T mu) with mu = sup lmax(sym J_F), and exp(-T inf lmin); Table 3: exp(T L).

    This is about the flow of the equation. What a solver computes is a chain of residual steps: see their row.

    Args:
        lipschitz: L, a bound of Lip(F) for all t.
        time: T.
        largest: mu; L unless given.
        smallest: a lower bound of lmin(sym J_F); -L unless given.
        paper: the printed formula.

    Returns:
        The bounds.
    """
    mu = lipschitz if largest is None or paper else min(largest, lipschitz)
    low = -lipschitz if smallest is None or paper else max(smallest, -lipschitz)
    T = Interval.of(abs(time))
    return Pair((T * mu).exp().sup(), (T * -low).exp().sup())


def diagonal(scale: Float[Tensor, "*shape"], *, paper: bool = False) -> Pair:
    """D x: max |D_ii| and 1 / min |D_ii|, exact; ActNorm, and batch normalisation in evaluation mode.

    >>> diagonal(torch.tensor([-4.0, 0.5])).forward
    4.0
    """
    size = exact(scale).abs()
    low = float(size.min())
    return Pair(float(size.max()), up(1 / low) if low > 0 else math.inf)


def linear(weight: Float[Tensor, "m n"], *, paper: bool = False) -> Pair:
    """W x, the invertible 1x1 convolution, LU, QR, Householder: ||W|| and ||W^-1||, certified.

    For an injective map (m > n) the inverse is that on the range, 1 / sigma_min(W).
    """
    W = exact(weight)
    if W.shape[0] == W.shape[1]:
        return Pair(spectral_norm(W), inverse_norm(W))
    tall = W if W.shape[0] > W.shape[1] else W.mT
    gram = inverse_norm(tall.mT @ tall)
    # the computed Gram matrix is off by no more than gamma ||W||_F^2, which moves 1 / lmin by a factor 1 / (1 - slip)
    slip = up(gram * 2 * (tall.shape[0] + 2) * UNIT * float(tall.square().sum()) * (1 + 1e-9), 2)
    inverse = up(math.sqrt(up(gram / (1 - slip), 2))) if slip < 1 else math.inf
    return Pair(spectral_norm(W), inverse)


def elementwise(slope: Interval) -> Pair:
    """y_i = f_i(x_i): sup |f'| and 1 / inf |f'| over a box."""
    low = float(slope.mignitude.min())
    return Pair(float(slope.magnitude.max()), up(1 / low) if low > 0 else math.inf)


def logit(alpha: float) -> Pair:
    """The logit of a + (1 - 2 a) x on [0, 1], a = alpha: (1 - 2 a) / (a (1 - a)) and 1 / (4 (1 - 2 a)), exact."""
    a = Interval.of(alpha)
    width = 1.0 - a * 2.0
    return Pair(
        (width / (a * (1.0 - a))).sup() if alpha > 0 else math.inf, (width * 4.0).reciprocal().sup()
    )


def planar(
    u: Float[Tensor, "d"], w: Float[Tensor, "d"], *, slope: tuple[float, float] = (0.0, 1.0)
) -> Pair:
    """z + u h(w.z + b) with h' in [a, b]: the larger norm of I + k u w^T at k = a, b; inverse k = -h' / (1 + h' u.w).

    The norm is convex in k, so its ends attain it; Sherman-Morrison's coefficient is monotone in h'.
    """
    uw, size = _dot(u, w), _dot(u, u) * _dot(w, w)
    ends = [Interval.of(h) for h in slope]
    gaps = [1.0 + h * uw for h in ends]
    forward = max(_rank_one(h, uw, size) for h in ends)
    if any(gap.inf() <= 0 for gap in gaps):
        return Pair(forward, math.inf)
    return Pair(
        forward, max(_rank_one(-(h / gap), uw, size) for h, gap in zip(ends, gaps, strict=True))
    )


def _rank_one(k: Interval, uw: Interval, size: Interval) -> float:
    """||I + k u w^T||: on the plane of u and w (sqrt(q + 2 p) + sqrt(q - 2 p)) / 2 with q = ||.||_F^2, p = |det|."""
    q, p = k * uw * 2.0 + k.square() * size + 2.0, (k * uw + 1.0).abs()
    return max(1.0, (((q + p * 2.0).sqrt() + (q - p * 2.0).sqrt()) * 0.5).sup())


def _dot(a: Tensor, b: Tensor) -> Interval:
    return (Interval.of(a.flatten()) * Interval.of(b.flatten())).sum()


def radial(alpha: float, beta: float) -> Pair:
    """z + beta (z - z0) / (alpha + r): eigenvalues 1 + beta h, 1 + beta alpha h^2, h = 1 / (alpha + r) <= 1/alpha.

    Both lie between 1 and 1 + beta / alpha, and J is symmetric: 1 + max(0, beta/alpha), and 1 / min(1, 1 + beta/alpha).
    """
    ratio = Interval.of(beta) / alpha + 1.0
    return Pair(
        max(1.0, ratio.sup()), max(1.0, ratio.reciprocal().sup()) if ratio.inf() > 0 else math.inf
    )


def sylvester(
    R: Float[Tensor, "m m"],
    R_tilde: Float[Tensor, "m m"],
    *,
    slope: tuple[float, float] = (0.0, 1.0),
) -> Pair:
    """z + Q R h(R~ Q^T z + b), Q with orthonormal columns, R and R~ upper triangular, h' in [a, b].

    The Jacobian acts on the columns of Q as I + R diag(h') R~, on their complement as the identity. Its inverse is
    I - R (I + diag(h') R~ R)^-1 diag(h') R~, and the inverse of the triangular matrix within is bounded entry by entry
    by the M-matrix inverse of (|diagonal| - |off-diagonal|).
    """
    most = max(abs(slope[0]), abs(slope[1]))
    size = up(up(most * spectral_norm(R)) * spectral_norm(R_tilde))
    product = (Interval.of(exact(R_tilde).T[:, :, None]) * Interval.of(exact(R)[:, None, :])).sum(0)
    ends = [1.0 + Interval.of(h) * product.map(torch.diagonal) for h in slope]
    least = torch.minimum(ends[0].lo, ends[1].lo)
    within = (
        autoregressive(least, most * (1 + 1e-15) * product.magnitude.triu(1).T).inverse
        if bool((least > 0).all())
        else math.inf
    )
    return Pair(max(1.0, up(1 + size)), max(1.0, up(1 + up(size * within))))


def autoregressive(
    least_diagonal: Float[Tensor, "d"],
    off_diagonal: Float[Tensor, "d d"],
    *,
    forward: float = math.inf,
) -> Pair:
    """A lower triangular J = D + N with D >= least > 0 and |N_ij| <= B_ij: |J^-1| <= (diag(least) - B)^-1 entrywise.

    (diag(least) - B) is an M-matrix for strictly triangular B, so its inverse is nonnegative; the norm is monotone.

    Args:
        least_diagonal: lower bounds of the diagonal, (d,).
        off_diagonal: B, strictly lower triangular, nonnegative.
        forward: a bound of ||J||, passed on.

    Returns:
        ``forward`` and ||(diag(least) - B)^-1||, certified.
    """
    if not bool((least_diagonal > 0).all()) or not bool(off_diagonal.isfinite().all()):
        return Pair(forward, math.inf)
    return Pair(forward, _solved_norm(exact(least_diagonal), exact(off_diagonal)))


def _solved_norm(diagonal: Tensor, B: Tensor) -> float:
    """||(diag - B)^-1|| for strictly lower triangular B >= 0, row by row from the top: sums of what is not negative."""
    X = torch.zeros_like(B)
    tiny = torch.finfo(B.dtype).tiny  # more than underflow takes
    for i in range(len(B)):
        row = B[i, :i] @ X[:i] + tiny
        row[i] += 1.0
        X[i] = row / diagonal[i] * (1 + gamma(i + 8)) + tiny
    return spectral_norm(X) if bool(X.isfinite().all()) else math.inf

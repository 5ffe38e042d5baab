"""Bi-Lipschitz bounds of building blocks, numbers to numbers, every operation rounded outwards.

Each function returns ``Pair(forward, inverse)``. With ``paper=True`` those of Table 3 return the
printed formula instead. A bound that depends on a box is a bound of sup ||J|| and sup ||J^-1|| over
that box; sup ||J^-1|| over the image of a box is the Lipschitz constant of F^-1 on that image only
where the image is convex.

References:
    Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann, Vicol,
    Wang, Grosse, Jacobsen, 2021), Table 3 and appendix B.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import Upper, frobenius_norm, gamma
from inn_guard.numerics.spectral_norm import exact, inverse_norm, spectral_norm

__all__ = [
    "Pair",
    "affine_coupling",
    "elementwise",
    "invertible_residual",
    "linear",
    "supremum",
    "triangular_norm",
]


class Pair(NamedTuple):
    """Upper bounds of the Lipschitz constants of a map and of its inverse."""

    forward: float
    inverse: float

    @property
    def finite(self) -> bool:
        """Whether both are."""
        return math.isfinite(self.forward) and math.isfinite(self.inverse)

    @property
    def swapped(self) -> Pair:
        """The bounds of the inverse map."""
        return Pair(self.inverse, self.forward)

    def at_least(self, constant: float) -> Pair:
        """Both raised to a constant that part of the map has."""
        return Pair(max(constant, self.forward), max(constant, self.inverse))


def supremum(x: Interval) -> Upper:
    """The largest magnitude over all entries."""
    return Upper(float(x.magnitude.max()))


def triangular_norm(off_diagonal: float, scale: float) -> float:
    """||[[1, 0], [m, c]]|| = (sqrt(m^2 + (1 + c)^2) + sqrt(m^2 + (1 - c)^2)) / 2, rounded up.

    It bounds ||[[I, 0], [M, D]]|| for ||M|| <= m and ||D|| <= c, because the norm of a block matrix
    is at most that of the matrix of its blocks' norms.

    >>> abs(triangular_norm(0.0, 3.0) - 3) < 1e-14
    True
    """
    if not (math.isfinite(off_diagonal) and math.isfinite(scale)):
        return math.inf
    m, c = Interval.of(off_diagonal).square(), Interval.of(scale)
    sum_of_roots = (m + (c + 1.0).square()).sqrt() + (m + (c - 1.0).square()).sqrt()
    return (sum_of_roots * 0.5).sup()


def affine_coupling(off_diagonal: Pair, scale: Pair, *, paper: bool = False) -> Pair:
    """x2 * g(s(x1)) + t(x1), on a box: ||[[1, 0], [m, c]]|| each way; Table 3 says max(1, c) + M.

    J^-1 = [[I, 0], [-D^-1 M, D^-1]] and D^-1 M = diag(x2 g'/g) J_s + D^-1 J_t, so that M* needs
    sup |g'/g|, where the paper's M*, taken at y, needs sup |(1/g)'|. An additive coupling has
    scale (1, 1): (L + sqrt(L^2 + 4)) / 2 both ways, exact in L = sup ||J_t||; Table 3 says 1 + L.

    Args:
        off_diagonal: bounds of ||M|| and of ||M*||: for ``paper`` those printed beneath Table 3.
        scale: sup g and sup 1/g.
        paper: whether the printed formula is meant.

    >>> additive = affine_coupling(Pair(1.0, 1.0), Pair(1.0, 1.0))
    >>> round(additive.forward, 6)
    1.618034
    """
    if paper:
        larger = scale.at_least(1.0)
        forward = Upper(larger.forward) + off_diagonal.forward
        return Pair(forward, Upper(larger.inverse) + off_diagonal.inverse)
    return Pair(
        triangular_norm(off_diagonal.forward, scale.forward),
        triangular_norm(off_diagonal.inverse, scale.inverse),
    )


def invertible_residual(lipschitz: float) -> Pair:
    """x + g(x), L = Lip(g) < 1: 1 + L and 1 / (1 - L), as in Table 3; inf where L >= 1."""
    L = Upper(lipschitz)
    return Pair(L + 1, Upper(1.0) / (1 - L))


def elementwise(slope: Interval) -> Pair:
    """y_i = f_i(x_i): sup |f'| and 1 / inf |f'| over a box, exact; Table 3's diagonal maps as well.

    >>> import torch
    >>> elementwise(Interval.of(torch.tensor([-4.0, 0.5]))).forward
    4.0
    """
    return Pair(supremum(slope), Upper(1.0) / float(slope.mignitude.min()))


def linear(weight: Float[Tensor, "m n"]) -> Pair:
    """W x, the invertible 1x1 convolution, LU, QR, Householder: ||W|| and ||W^-1||, certified.

    For an injective map (m > n) the inverse is that on the range, 1 / sigma_min(W).
    """
    W = exact(weight)
    if W.shape[0] == W.shape[1]:
        return Pair(spectral_norm(W), inverse_norm(W))
    tall = W
    if W.shape[0] < W.shape[1]:
        tall = W.mT
    gram = inverse_norm(tall.mT @ tall)
    # the computed Gram matrix is off by no more than gamma ||W||_F^2, which moves 1 / lmin by a
    # factor 1 / (1 - slip)
    size = frobenius_norm(tall)
    slip = gram * gamma(2 * (tall.shape[0] + 2)) * size * size
    return Pair(spectral_norm(W), (gram / (1 - slip)).sqrt())

"""Bounds of monotone splines: exact extreme slopes of rational-quadratic and linear bins."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.numerics.rounding import up
from inn_guard.numerics.spectral_norm import exact

__all__ = ["linear_spline", "rational_quadratic_spline"]


def linear_spline(
    widths: Float[Tensor, "*shape bins"], heights: Float[Tensor, "*shape bins"]
) -> Pair:
    """A monotone piecewise linear map: max h/w and max w/h over the bins, exact.

    >>> linear_spline(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])).forward
    1.5000000000000002
    """
    slope = exact(heights) / exact(widths)
    return Pair(up(float(slope.max())), up(float((1 / slope).max()), 2))


def rational_quadratic_spline(
    widths: Float[Tensor, "*shape bins"],
    heights: Float[Tensor, "*shape bins"],
    derivatives: Float[Tensor, "*shape knots"],
) -> Pair:
    """A monotone rational-quadratic spline with known knots: extreme slopes over all bins, exact up to rounding.

    In a bin of slope s = h / w with a = d_k / s, b = d_{k+1} / s and xi in [0, 1],
    f' = s P / D^2, P = a (1 - xi)^2 + 2 xi (1 - xi) + b xi^2, D = 1 + (a + b - 2) xi (1 - xi);
    extrema are at 0, 1 and at the roots of P' D - 2 P D', a cubic.

    Args:
        widths: w, positive.
        heights: h, positive.
        derivatives: d at the bins + 1 knots, positive.

    Returns:
        sup f' and 1 / inf f'.

    References:
        Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios, 2019).
    """
    s = exact(heights) / exact(widths)
    a, b = exact(derivatives)[..., :-1] / s, exact(derivatives)[..., 1:] / s
    points = torch.cat(
        [torch.zeros_like(a)[..., None], torch.ones_like(a)[..., None], _stationary(a, b)], -1
    )
    slope = s[..., None] * _relative_slope(points, a[..., None], b[..., None])
    margin = 1 + 1e-12  # a root that is off by e changes the extreme slope by O(e^2)
    return Pair(up(float(slope.max()) * margin), up(float((1 / slope).max()) * margin))


def _relative_slope(xi: Tensor, a: Tensor, b: Tensor) -> Tensor:
    rest = 1 - xi
    D = 1 + (a + b - 2) * xi * rest
    return (a * rest.square() + 2 * xi * rest + b * xi.square()) / D.square()


def _stationary(a: Tensor, b: Tensor) -> Tensor:
    """The zeros in [0, 1] of P' D - 2 P D', (*, 3): eigenvalues of companion matrices; others are set to 0."""
    # P = p2 xi^2 + p1 xi + a and D = 1 + e xi - e xi^2 with e = a + b - 2
    e, p2, p1 = a + b - 2, a + b - 2, 2 - 2 * a
    cubic = torch.stack([2 * p2 * e, 3 * p1 * e, 2 * p2 - p1 * e + 4 * a * e, p1 - 2 * a * e], -1)
    return _roots(cubic)


def _roots(coefficients: Tensor) -> Tensor:
    """Real roots in [0, 1] of cubics (highest power first) by bisection between the turning points; others are 0."""
    c3, c2, c1, c0 = coefficients.unbind(-1)
    discriminant = (c2 * c2 - 3 * c3 * c1).clamp_min(0).sqrt()
    q = -(c2 + torch.where(c2 >= 0, discriminant, -discriminant))
    turns = torch.stack([q / (3 * c3), c1 / q], -1).nan_to_num(0, 0, 0).clamp(0, 1)
    turns = turns.sort(-1).values
    ends = torch.cat([torch.zeros_like(turns[..., :1]), turns, torch.ones_like(turns[..., :1])], -1)
    low, high = ends[..., :-1], ends[..., 1:]

    def cubic(x: Tensor) -> Tensor:
        return ((c3[..., None] * x + c2[..., None]) * x + c1[..., None]) * x + c0[..., None]

    rising = cubic(low) <= 0
    for _ in range(60):
        middle = (low + high) / 2
        left = (cubic(middle) <= 0) == rising
        low, high = torch.where(left, middle, low), torch.where(left, high, middle)
    return (low + high) / 2

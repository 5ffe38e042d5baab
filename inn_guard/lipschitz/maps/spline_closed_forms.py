"""Monotone splines with known knots: extreme slopes of rational-quadratic and linear bins."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.numerics.rounding import Upper
from inn_guard.numerics.spectral_norm import exact

__all__ = ["linear_spline", "rational_quadratic_spline"]

BISECTIONS = 60  #: of [0, 1]: down to the spacing of floats
ROOT_ERROR = 1e-12  #: relative; a root that is off by e changes the extreme slope by O(e^2)


def linear_spline(
    widths: Float[Tensor, "*shape bins"], heights: Float[Tensor, "*shape bins"]
) -> Pair:
    """A monotone piecewise linear map: max h/w and max w/h over the bins, exact.

    >>> pair = linear_spline(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75]))
    >>> 1.5 < pair.forward < 1.5000001
    True
    """
    return _extremes(exact(heights) / exact(widths))


def rational_quadratic_spline(
    widths: Float[Tensor, "*shape bins"],
    heights: Float[Tensor, "*shape bins"],
    derivatives: Float[Tensor, "*shape knots"],
) -> Pair:
    """A monotone rational-quadratic spline: extreme slopes over all bins, exact up to rounding.

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
    d = exact(derivatives)
    a, b = d[..., :-1] / s, d[..., 1:] / s
    zero, one = torch.zeros_like(a)[..., None], torch.ones_like(a)[..., None]
    xi = torch.cat([zero, one, _critical_points(a, b)], -1)
    a, b, rest = a[..., None], b[..., None], 1 - xi
    D = 1 + (a + b - 2) * xi * rest
    P = a * rest.square() + 2 * xi * rest + b * xi.square()
    pair = _extremes(s[..., None] * (P / D.square()))
    return Pair(pair.forward * (1 + ROOT_ERROR), pair.inverse * (1 + ROOT_ERROR))


def _extremes(slope: Tensor) -> Pair:
    """sup and 1 / inf of slopes that are quotients, rounded once."""
    largest = Upper.computed(float(slope.max()), 1)
    return Pair(largest, Upper.computed(float((1 / slope).max()), 2))


def _critical_points(a: Tensor, b: Tensor) -> Tensor:
    """Points of [0, 1], among them the zeros of P' D - 2 P D', (*, 3)."""
    # P = e xi^2 + p1 xi + a and D = 1 + e xi - e xi^2
    e, p1 = a + b - 2, 2 - 2 * a
    c3, c2 = 2 * e * e, 3 * p1 * e
    c1, c0 = 2 * e - p1 * e + 4 * a * e, p1 - 2 * a * e
    return _roots(c3, c2, c1, c0)


def _roots(c3: Tensor, c2: Tensor, c1: Tensor, c0: Tensor) -> Tensor:
    """Points of [0, 1], among them a cubic's roots, by bisection between its turning points."""
    discriminant = (c2 * c2 - 3 * c3 * c1).clamp_min(0).sqrt()
    q = -(c2 + torch.where(c2 >= 0, discriminant, -discriminant))
    turning_points = torch.stack([q / (3 * c3), c1 / q], -1).nan_to_num(0, 0, 0).clamp(0, 1)
    turning_points = turning_points.sort(-1).values
    zero, one = torch.zeros_like(c0)[..., None], torch.ones_like(c0)[..., None]
    ends = torch.cat([zero, turning_points, one], -1)
    low, high = ends[..., :-1], ends[..., 1:]

    def cubic(x: Tensor) -> Tensor:
        return ((c3[..., None] * x + c2[..., None]) * x + c1[..., None]) * x + c0[..., None]

    rising = cubic(low) <= 0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        left = (cubic(middle) <= 0) == rising
        low, high = torch.where(left, middle, low), torch.where(left, high, middle)
    return (low + high) / 2

"""Elementwise activations: enclosures of value and slope over an interval, and curvature bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inn_guard.core.missing import Missing
from inn_guard.core.readable import RulesByClass
from inn_guard.numerics.intervals import Interval

__all__ = [
    "FUNCTIONS",
    "Activation",
    "activation",
    "atan_activation",
    "known_activation",
    "scaled",
]

Function = Callable[[Tensor], Tensor]
CriticalPoints = Mapping[float, tuple[float, float]]
SLACK = 2e-14  #: relative and absolute error allowed to the formulas below in float64
FAR = 1e150  #: where every slope has reached its limit, and squares have not overflowed
REACH = 700.0  #: beyond it errors no longer grow with the argument, only with the value
#: threshold of softplus from which its jump to the identity is rounding: 2e-9 / beta
SMALL_JUMP = 20.0
ROOT_TWO_PI = math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class Activation:
    """An elementwise function f.

    Attributes:
        function: f.
        derivative: f', away from kinks.
        critical_points: point -> (least, largest) slope, for every kink and extremum of f'.
        limits: f at -infinity and at +infinity.
        curvature: sup |f''|, the Lipschitz constant of f'; infinite where f' jumps.
        minima: point -> value, for every local minimum of f, and the values next to a jump.
        second: f'', or None where only its bound is known.
        third: sup |f'''|, the Lipschitz constant of f'' where that is given.
        jump: how far f jumps at most: differences are slopes times distances, and that.
    """

    function: Function
    derivative: Function
    critical_points: CriticalPoints
    limits: tuple[float, float]
    curvature: float = math.inf
    minima: Mapping[float, float] = field(default_factory=dict)
    second: Function | None = None
    third: float = math.inf
    jump: float = 0.0

    def value(self, x: Interval) -> Interval:
        """An enclosure of f over x."""
        minima = {point: (value, value) for point, value in self.minima.items()}
        return _enclose(x, self._value_at(x.lo), self._value_at(x.hi), minima)

    def _value_at(self, end: Tensor) -> Tensor:
        value = torch.where(end == math.inf, self.limits[1], self.function(end))
        return torch.where(end == -math.inf, self.limits[0], value)

    def slope(self, x: Interval) -> Interval:
        """An enclosure of f' over x, both one-sided slopes at kinks included."""
        low, high = self.derivative(x.lo.clamp(-FAR, FAR)), self.derivative(x.hi.clamp(-FAR, FAR))
        return _enclose(x, low, high, self.critical_points)

    def second_derivative(self, x: Interval) -> Interval:
        """An enclosure of f'' over x, from its value in the middle and the bound of f'''."""
        most = torch.full_like(x.lo, self.curvature)
        for point, (low, high) in self.critical_points.items():
            # softplus has a curvature everywhere but where torch switches to the identity
            if low < high:
                most = most.masked_fill(_is_near(x, point), math.inf)
        if self.second is None:
            return Interval(-most, most)
        reach = self.third * (1 + SLACK) * x.radius + SLACK * (1 + self.third)
        middle = self.second(x.centre.clamp(-REACH, REACH))
        return Interval(torch.maximum(middle - reach, -most), torch.minimum(middle + reach, most))

    def slopes(self) -> tuple[float, float]:
        """inf f' and sup f' over the real line, rounded outwards."""
        line = torch.tensor([math.inf], dtype=torch.float64)
        everywhere = self.slope(Interval(-line, line))
        return everywhere.inf(), everywhere.sup()


def _enclose(x: Interval, low: Tensor, high: Tensor, extrema: CriticalPoints) -> Interval:
    """The hull of a function's values at the two ends and at the extrema inside."""
    size = torch.maximum(low.abs(), high.abs()).nan_to_num(0, 0, 0)
    margin = SLACK * (1 + x.magnitude.clamp_max(REACH) + size)
    lo, hi = torch.minimum(low, high) - margin, torch.maximum(low, high) + margin
    for point, (least, most) in extrema.items():
        inside = _is_near(x, point)
        lo = torch.where(inside, lo.clamp_max(least - SLACK * (1 + abs(least))), lo)
        hi = torch.where(inside, hi.clamp_min(most + SLACK * (1 + abs(most))), hi)
    return Interval.unless_nan(lo, hi)


def _is_near(x: Interval, point: float) -> Tensor:
    """Whether the point lies in an interval, which is widened: the point itself is rounded."""
    return (x.lo <= point + 1e-6) & (x.hi >= point - 1e-6)


@RulesByClass
def activation(why: Missing, module: Any) -> Activation | None:
    """The elementwise function of a module, or None if the module is no known activation.

    A rule returns None too, where it does not know the function for the module's arguments.
    """
    return None


def known_activation(module: nn.Module) -> Activation:
    """The elementwise function of a module.

    Raises:
        TypeError: if the module is no known activation.
    """
    function = activation(module)
    if function is None:
        raise TypeError(f"expected an activation with a rule, got {type(module).__name__}")
    return function


@activation.register
def _identity(module: nn.Identity) -> Activation:
    return Activation(lambda x: x, torch.ones_like, {}, (-math.inf, math.inf), 0.0)


@activation.register
def _relu(module: nn.ReLU) -> Activation:
    return _leaky(0.0)


@activation.register
def _leaky_relu(module: nn.LeakyReLU) -> Activation:
    return _leaky(float(module.negative_slope))


def _leaky(slope: float) -> Activation:
    left = 0.0
    if slope != 0:
        left = math.copysign(math.inf, -slope)
    minima = {}
    if slope < 0:
        minima = {0.0: 0.0}
    return Activation(
        lambda x: torch.where(x > 0, x, slope * x),
        lambda x: torch.where(x > 0, 1.0, torch.full_like(x, slope)),
        {0.0: (min(slope, 1.0), max(slope, 1.0))},
        (left, math.inf),
        minima=minima,
    )


@activation.register
def _elu(module: nn.ELU) -> Activation:
    return _exponential(float(module.alpha), 1.0)


@activation.register
def _selu(module: nn.SELU) -> Activation:
    return _exponential(1.6732632423543772848, 1.0507009873554804934)


@activation.register
def _celu(module: nn.CELU) -> Activation | None:
    alpha = float(module.alpha)
    if not alpha > 0:
        return None
    return scaled(_exponential(1.0, 1.0), alpha, 1 / alpha)


def _exponential(size: float, scale: float) -> Activation:
    """scale * x for x > 0, scale * size * (e^x - 1) below."""
    at_zero = scale * size
    minima = {}
    if at_zero < 0:
        # it falls below zero
        minima = {0.0: 0.0}
    curvature = math.inf
    if at_zero == scale:
        curvature = at_zero
    return Activation(
        lambda x: scale * torch.where(x > 0, x, size * torch.expm1(x.clamp_max(0))),
        lambda x: torch.where(x > 0, torch.full_like(x, scale), at_zero * x.clamp_max(0).exp()),
        {0.0: (min(at_zero, scale), max(at_zero, scale))},
        (-at_zero, math.inf),
        curvature,
        minima,
    )


def _extreme_slopes(derivative: Function, top: float) -> CriticalPoints:
    """The extreme slopes at +-top of a function with f'(-x) = 1 - f'(x)."""
    most = float(derivative(torch.tensor(top, dtype=torch.float64)))
    return {-top: (1 - most, 1 - most), top: (most, most)}


@activation.register
def _silu(module: nn.SiLU) -> Activation:
    def derivative(x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return s + x * s * torch.sigmoid(-x)

    def second(x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return s * torch.sigmoid(-x) * (2 + x * (1 - 2 * s))

    # f'' = 0 at x tanh(x / 2) = 2; f' = 0 at x = -1.2784645
    slopes = _extreme_slopes(derivative, 2.3993572805154094)
    minima = {-1.2784645427610738: -0.2784645427610738}
    return Activation(F.silu, derivative, slopes, (0.0, math.inf), 0.5, minima, second, 0.309)


@activation.register
def _gelu(module: nn.GELU) -> Activation | None:
    if module.approximate != "none":
        return None

    def cumulative(x: Tensor) -> Tensor:
        return torch.special.erfc(-x / math.sqrt(2)) / 2

    def value(x: Tensor) -> Tensor:
        return x * cumulative(x)

    def derivative(x: Tensor) -> Tensor:
        density = (-x.square() / 2).exp() / ROOT_TWO_PI
        return cumulative(x) + x * density

    slopes = _extreme_slopes(derivative, math.sqrt(2))
    minimum = -0.7517915246935645
    minima = {minimum: float(value(torch.tensor(minimum, dtype=torch.float64)))}
    curvature = 0.7978845608028655  # f'' = (2 - x^2) density, largest at 0
    return Activation(value, derivative, slopes, (0.0, math.inf), curvature, minima)


@activation.register
def _tanh(module: nn.Tanh) -> Activation:
    def derivative(x: Tensor) -> Tensor:
        # 1 - tanh^2 without cancellation
        return 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x)

    def second(x: Tensor) -> Tensor:
        return -2 * torch.tanh(x) * derivative(x)

    return Activation(
        torch.tanh,
        derivative,
        {0.0: (1.0, 1.0)},
        (-1.0, 1.0),
        0.76980035892,
        second=second,
        third=2.0,
    )


@activation.register
def _sigmoid(module: nn.Sigmoid) -> Activation:
    def derivative(x: Tensor) -> Tensor:
        return torch.sigmoid(x) * torch.sigmoid(-x)

    def second(x: Tensor) -> Tensor:
        return derivative(x) * (1 - 2 * torch.sigmoid(x))

    return Activation(
        torch.sigmoid,
        derivative,
        {0.0: (0.25, 0.25)},
        (0.0, 1.0),
        0.09622504487,
        second=second,
        third=0.125,
    )


@activation.register
def _log_sigmoid(module: nn.LogSigmoid) -> Activation:
    return Activation(F.logsigmoid, lambda x: torch.sigmoid(-x), {}, (-math.inf, 0.0), 0.25)


@activation.register
def _softplus(module: nn.Softplus) -> Activation | None:
    beta, threshold = float(module.beta), float(module.threshold)
    if not beta > 0 or not threshold >= SMALL_JUMP:
        return None

    def value(x: Tensor) -> Tensor:
        return F.softplus(x, beta, threshold)

    def derivative(x: Tensor) -> Tensor:
        return torch.where(beta * x > threshold, 1.0, torch.sigmoid(beta * x))

    # above the threshold torch switches to x, which moves the slope from 1 / (1 + jump) to 1
    jump = math.exp(-threshold)
    switch = threshold / beta
    slopes = {switch: (1 / (1 + jump), 1.0)}
    # and the value down to the switch itself, from a little above it
    extrema = {switch: switch, math.nextafter(switch, 0.0): switch + jump / beta}
    return Activation(
        value, derivative, slopes, (0.0, math.inf), beta / 4, extrema, jump=2 * jump / beta
    )


@activation.register
def _hardtanh(module: nn.Hardtanh) -> Activation:
    low, high = float(module.min_val), float(module.max_val)
    return Activation(
        lambda x: x.clamp(low, high),
        lambda x: ((x > low) & (x < high)).to(x.dtype),
        {low: (0.0, 1.0), high: (0.0, 1.0)},
        (low, high),
    )


def atan_activation(size: float) -> Activation:
    """size * atan(x), size positive."""
    # the limits round pi, a quotient and a product
    limit = size * math.pi / 2 * (1 + 1e-14)
    return Activation(
        lambda x: size * torch.atan(x),
        lambda x: size / (1 + x.square()),
        {0.0: (size, size)},
        (-limit, limit),
        size,
    )


def scaled(
    function: Activation, outer: float, inner: float = 1.0, shift: float = 0.0
) -> Activation:
    """outer * f(inner * x) + shift, outer not zero and inner positive."""

    def times(derivative: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: outer * inner * derivative(inner * x)

    critical_points = {}
    for point, (low, high) in function.critical_points.items():
        ends = sorted((outer * inner * low, outer * inner * high))
        critical_points[point / inner] = (ends[0], ends[1])
    minima = {}
    for point, value in function.minima.items():
        minima[point / inner] = outer * value + shift
    return Activation(
        lambda x: outer * function.function(inner * x) + shift,
        times(function.derivative),
        critical_points,
        (outer * function.limits[0] + shift, outer * function.limits[1] + shift),
        function.curvature * abs(outer) * inner * inner,
        minima,
        jump=function.jump * abs(outer),
    )


#: functions of torch and torch.nn.functional -> the module that does the same
FUNCTIONS: Mapping[Any, nn.Module] = {
    torch.relu: nn.ReLU(),
    F.relu: nn.ReLU(),
    torch.tanh: nn.Tanh(),
    F.tanh: nn.Tanh(),
    torch.sigmoid: nn.Sigmoid(),
    F.sigmoid: nn.Sigmoid(),
    F.silu: nn.SiLU(),
    F.elu: nn.ELU(),
    F.selu: nn.SELU(),
    F.celu: nn.CELU(),
    F.gelu: nn.GELU(),
    F.leaky_relu: nn.LeakyReLU(),
    F.softplus: nn.Softplus(),
    F.hardtanh: nn.Hardtanh(),
    F.relu6: nn.ReLU6(),
    F.logsigmoid: nn.LogSigmoid(),
}

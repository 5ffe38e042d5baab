"""Elementwise activations: enclosures of value and slope over an interval, and bounds of the curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inn_guard.numerics.intervals import Interval

__all__ = ["FUNCTIONS", "Activation", "activation", "known_activation"]

Function = Callable[[Tensor], Tensor]
CriticalPoints = Mapping[float, tuple[float, float]]
SLACK = 2e-14  #: relative and absolute error allowed to the formulas below in float64
FAR = 1e150  #: where every slope has reached its limit, and squares have not overflowed
REACH = 700.0  #: beyond which errors no longer grow with the argument, only with the value
ROOT_PI = math.sqrt(math.pi)


@dataclass(frozen=True)
class Activation:
    """An elementwise function f.

    Attributes:
        function: f.
        derivative: f', away from kinks.
        critical_points: point -> (least, largest) slope there, for every kink and every extremum of f'.
        limits: f at -infinity and at +infinity.
        curvature: sup |f''|, the Lipschitz constant of f'; infinite where f' jumps.
        minima: point -> value, for every local minimum of f.
        second: f'', or None where only its bound is known.
        third: sup |f'''|, the Lipschitz constant of f'' where that is given.
    """

    function: Function
    derivative: Function
    critical_points: CriticalPoints
    limits: tuple[float, float]
    curvature: float = math.inf
    minima: Mapping[float, float] = field(default_factory=dict)
    second: Function | None = None
    third: float = math.inf

    def value(self, x: Interval) -> Interval:
        """An enclosure of f over x."""
        ends = [
            torch.where(
                end == -math.inf,
                self.limits[0],
                torch.where(end == math.inf, self.limits[1], self.function(end)),
            )
            for end in (x.lo, x.hi)
        ]
        return _enclose(x, ends, {point: (value, value) for point, value in self.minima.items()})

    def slope(self, x: Interval) -> Interval:
        """An enclosure of f' over x, both one-sided slopes at kinks included."""
        return _enclose(
            x, [self.derivative(end.clamp(-FAR, FAR)) for end in (x.lo, x.hi)], self.critical_points
        )

    def second_derivative(self, x: Interval) -> Interval:
        """An enclosure of f'' over x, from its value in the middle and the bound of f'''."""
        most = torch.full_like(x.lo, self.curvature)
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


def _enclose(x: Interval, ends: list[Tensor], critical_points: CriticalPoints) -> Interval:
    """The hull of an elementary function's values at the ends and at the turning points inside."""
    size = torch.maximum(ends[0].abs(), ends[1].abs()).nan_to_num(0, 0, 0)
    margin = SLACK * (1 + x.magnitude.clamp_max(REACH) + size)
    lo, hi = torch.minimum(*ends) - margin, torch.maximum(*ends) + margin
    for point, (least, most) in critical_points.items():
        inside = (x.lo <= point + 1e-6) & (x.hi >= point - 1e-6)
        lo = torch.where(inside, lo.clamp_max(least - SLACK * (1 + abs(least))), lo)
        hi = torch.where(inside, hi.clamp_min(most + SLACK * (1 + abs(most))), hi)
    return Interval(
        lo.nan_to_num(-math.inf, math.inf, -math.inf), hi.nan_to_num(math.inf, math.inf, -math.inf)
    )


@singledispatch
def activation(module: Any) -> Activation | None:
    """The elementwise function that a module is, or None if it is none that is known."""
    return None


def known_activation(module: nn.Module) -> Activation:
    """The elementwise function that a module is.

    Raises:
        TypeError: if it is none that is known.
    """
    function = activation(module)
    if function is None:
        raise TypeError(f"expected an activation with a rule, got {type(module).__name__}")
    return function


@activation.register
def _(module: nn.Identity) -> Activation:
    return Activation(lambda x: x, torch.ones_like, {}, (-math.inf, math.inf), 0.0)


def _leaky(slope: float) -> Activation:
    return Activation(
        lambda x: torch.where(x > 0, x, slope * x),
        lambda x: torch.where(x > 0, 1.0, torch.full_like(x, slope)),
        {0.0: (min(slope, 1.0), max(slope, 1.0))},
        (-math.inf if slope > 0 else math.inf if slope < 0 else 0.0, math.inf),
        minima={0.0: 0.0} if slope < 0 else {},
    )


@activation.register
def _(module: nn.ReLU) -> Activation:
    return _leaky(0.0)


@activation.register
def _(module: nn.LeakyReLU) -> Activation:
    return _leaky(float(module.negative_slope))


def _exponential(size: float, scale: float) -> Activation:
    """scale * x for x > 0, scale * size * (e^x - 1) below."""
    at_zero = scale * size
    return Activation(
        lambda x: scale * torch.where(x > 0, x, size * torch.expm1(x.clamp_max(0))),
        lambda x: torch.where(x > 0, torch.full_like(x, scale), at_zero * x.clamp_max(0).exp()),
        {0.0: (min(at_zero, scale), max(at_zero, scale))},
        (-scale * size, math.inf),
        at_zero if at_zero == scale else math.inf,
    )


@activation.register
def _(module: nn.ELU) -> Activation:
    return _exponential(float(module.alpha), 1.0)


@activation.register
def _(module: nn.SELU) -> Activation:
    return _exponential(1.6732632423543772848, 1.0507009873554804934)


@activation.register
def _(module: nn.SiLU) -> Activation:
    def derivative(x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return s + x * s * torch.sigmoid(-x)

    # f'' = 0 at x tanh(x / 2) = 2; f' = 0 at x = -1.2784645
    top = 2.3993572805154094
    most = float(derivative(torch.tensor(top, dtype=torch.float64)))
    critical_points = {-top: (1 - most, 1 - most), top: (most, most)}

    def second(x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return s * torch.sigmoid(-x) * (2 + x * (1 - 2 * s))

    minima = {-1.2784645427610738: -0.2784645427610738}
    return Activation(
        F.silu, derivative, critical_points, (0.0, math.inf), 0.5, minima, second, 0.309
    )


@activation.register
def _(module: nn.GELU) -> Activation | None:
    if module.approximate != "none":
        return None

    def density(x: Tensor) -> Tensor:
        return (-x.square() / 2).exp() / (math.sqrt(2) * ROOT_PI)

    def cumulative(x: Tensor) -> Tensor:
        return torch.special.erfc(-x / math.sqrt(2)) / 2

    def derivative(x: Tensor) -> Tensor:
        return cumulative(x) + x * density(x)

    top = math.sqrt(2)
    most = float(derivative(torch.tensor(top, dtype=torch.float64)))
    critical_points = {-top: (1 - most, 1 - most), top: (most, most)}
    minimum = -0.7517915246935645
    least = float(minimum * cumulative(torch.tensor(minimum, dtype=torch.float64)))
    curvature = 0.7978845608028655  # f'' = (2 - x^2) density, largest at 0
    return Activation(
        lambda x: x * cumulative(x),
        derivative,
        critical_points,
        (0.0, math.inf),
        curvature,
        {minimum: least},
    )


@activation.register
def _(module: nn.Tanh) -> Activation:
    # 1 - tanh^2 without cancellation: 4 s(2x) s(-2x)
    slope = lambda x: 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x)  # noqa: E731
    return Activation(
        torch.tanh,
        slope,
        {0.0: (1.0, 1.0)},
        (-1.0, 1.0),
        0.76980035892,
        second=lambda x: -2 * torch.tanh(x) * slope(x),
        third=2.0,
    )


@activation.register
def _(module: nn.Sigmoid) -> Activation:
    slope = lambda x: torch.sigmoid(x) * torch.sigmoid(-x)  # noqa: E731
    return Activation(
        torch.sigmoid,
        slope,
        {0.0: (0.25, 0.25)},
        (0.0, 1.0),
        0.09622504487,
        second=lambda x: slope(x) * (1 - 2 * torch.sigmoid(x)),
        third=0.125,
    )


@activation.register
def _(module: nn.LogSigmoid) -> Activation:
    return Activation(F.logsigmoid, lambda x: torch.sigmoid(-x), {}, (-math.inf, 0.0), 0.25)


@activation.register
def _(module: nn.Softplus) -> Activation:
    # torch's switch to x above the threshold moves the value by less than e^-threshold / beta and the slope to 1
    beta, threshold = float(module.beta), float(module.threshold)
    jump = math.exp(-threshold)

    def value(x: Tensor) -> Tensor:
        return F.softplus(x, beta, threshold)

    critical_points = {threshold / beta: (1 / (1 + jump), 1.0)}

    def slope(x: Tensor) -> Tensor:
        return torch.where(beta * x > threshold, 1.0, torch.sigmoid(beta * x))

    return Activation(value, slope, critical_points, (0.0, math.inf), beta / 4)


@activation.register
def _(module: nn.Hardtanh) -> Activation:
    low, high = float(module.min_val), float(module.max_val)
    return Activation(
        lambda x: x.clamp(low, high),
        lambda x: ((x > low) & (x < high)).to(x.dtype),
        {low: (0.0, 1.0), high: (0.0, 1.0)},
        (low, high),
    )


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
    F.gelu: nn.GELU(),
    F.leaky_relu: nn.LeakyReLU(),
    F.softplus: nn.Softplus(),
    F.hardtanh: nn.Hardtanh(),
    F.relu6: nn.ReLU6(),
    F.logsigmoid: nn.LogSigmoid(),
}

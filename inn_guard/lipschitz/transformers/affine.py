"""What couplings and autoregressive maps do to one entry, h(x; parameters): enclosures of value and derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from inn_guard.lipschitz.networks.activations import Activation
from inn_guard.numerics.intervals import Interval

__all__ = [
    "Additive",
    "Affine",
    "ConstantScale",
    "LogScale",
    "ScaleBounds",
    "SigmoidScaleBounds",
    "SoftplusScaleBounds",
    "Transformer",
    "atan_activation",
    "scaled",
]


@runtime_checkable
class Transformer(Protocol):
    """z = h(x; theta), increasing in x, entry by entry. Every tensor has the shape of the changed entries.

    Attributes:
        count: parameters per entry.
    """

    @property
    def count(self) -> int:
        """Parameters per entry."""
        ...

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        """h."""
        ...

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        """dh/dx."""
        ...

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """dh/dtheta_k."""
        ...

    def relative(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """dh/dtheta_k divided by dh/dx: what the inverse Jacobian holds."""
        ...


@dataclass(frozen=True)
class Additive:
    """x + t."""

    count = 1

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        """x + t."""
        return x + theta[0]

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        """One."""
        one = torch.ones_like(x.lo)
        return Interval(one, one)

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """One."""
        return [self.slope(x, theta)]

    relative = sensitivities


@runtime_checkable
class ScaleBounds(Protocol):
    """Enclosures of a positive scale g(s) over intervals of s."""

    def value(self, s: Interval) -> Interval:
        """g."""
        ...

    def slope(self, s: Interval) -> Interval:
        """g'."""
        ...

    def log_slope(self, s: Interval) -> Interval:
        """g'/g."""
        ...

    def second_derivative(self, s: Interval) -> Interval:
        """g''."""
        ...


@dataclass(frozen=True)
class Affine:
    """x * g(s) + t.

    Attributes:
        scale: g.
        order: positions of t and of s among the parameters.
    """

    scale: ScaleBounds
    order: tuple[int, int] = (0, 1)
    count = 2

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        """x g + t."""
        t, s = self._named(theta)
        return x * self.scale.value(s) + t

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        """g."""
        return self.scale.value(self._named(theta)[1])

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """1 for t, x g' for s."""
        one = torch.ones_like(x.lo)
        return self._ordered(Interval(one, one), x * self.scale.slope(self._named(theta)[1]))

    def relative(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """1/g for t, x g'/g for s."""
        s = self._named(theta)[1]
        return self._ordered(self.scale.value(s).reciprocal(), x * self.scale.log_slope(s))

    def _named(self, theta: list[Interval]) -> tuple[Interval, Interval]:
        return theta[self.order[0]], theta[self.order[1]]

    def _ordered(self, t: Interval, s: Interval) -> list[Interval]:
        return [t, s] if self.order == (0, 1) else [s, t]


@dataclass(frozen=True)
class SigmoidScaleBounds:
    """g(s) = lower + (upper - lower) sigmoid(s + offset).

    With w = upper - lower and a = lower / w, g'/g = p (1 - p) / (a + p) for p = sigmoid; it is largest,
    1 + 2a - 2 sqrt(a^2 + a), at p = sqrt(a^2 + a) - a.
    """

    lower: float
    upper: float
    offset: float = 0.0

    def value(self, s: Interval) -> Interval:
        """g."""
        return self._p(s) * self._width() + self.lower

    def slope(self, s: Interval) -> Interval:
        """g'."""
        return self._steepness(s) * self._width()

    def second_derivative(self, s: Interval) -> Interval:
        """g'' = w p (1 - p) (1 - 2 p)."""
        return self.slope(s) * (1.0 - self._p(s) * 2.0)

    def log_slope(self, s: Interval) -> Interval:
        """g'/g: at p from 0 to 1 it rises to its maximum and falls."""
        a = Interval.of(self.lower) / self._width()
        s = s + self.offset

        def at(end: Tensor) -> Interval:
            point = Interval(end, end)
            p = point.increasing(torch.sigmoid)
            # p / (a + p) = 1 / (1 + a (1 + e^-s)), without 0 / 0 where p underflows
            return (
                (-point).increasing(torch.sigmoid) / (a * (1.0 + (-point).exp()) + 1.0)
                if self.lower
                else 1.0 - p
            )

        low, high = at(s.lo), at(s.hi)
        lo, hi = torch.minimum(low.lo, high.lo), torch.maximum(low.hi, high.hi)
        if not self.lower:
            return Interval(lo.clamp_min(0), hi)
        root = (a.square() + a).sqrt()
        peak, turn = 1.0 + a * 2.0 - root * 2.0, root - a
        p = s.increasing(torch.sigmoid)
        inside = (p.lo <= turn.hi + 1e-9) & (p.hi >= turn.lo - 1e-9)
        return Interval(lo.clamp_min(0), torch.where(inside, torch.maximum(hi, peak.hi), hi))

    def _p(self, s: Interval) -> Interval:
        p = (s + self.offset).increasing(torch.sigmoid)
        return Interval(p.lo.clamp_min(0), p.hi.clamp_max(1))

    def _width(self) -> Interval:
        return Interval.of(self.upper) - self.lower

    def _steepness(self, s: Interval) -> Interval:
        p = self._p(s)
        ends = [Interval(end, end) * (1.0 - Interval(end, end)) for end in (p.lo, p.hi)]
        top = (p.lo <= 0.5) & (p.hi >= 0.5)
        hi = torch.maximum(ends[0].hi, ends[1].hi)
        return Interval(
            torch.minimum(ends[0].lo, ends[1].lo).clamp_min(0),
            torch.where(top, hi.clamp_min(0.25), hi),
        )


@dataclass(frozen=True)
class SoftplusScaleBounds:
    """g(s) = softplus(s) + floor; g'/g <= 1 because log(1 + u) >= u / (1 + u)."""

    floor: float

    def value(self, s: Interval) -> Interval:
        """g."""
        g = s.increasing(torch.nn.functional.softplus)
        return Interval(g.lo.clamp_min(0), g.hi) + self.floor

    def slope(self, s: Interval) -> Interval:
        """The sigmoid."""
        return s.increasing(torch.sigmoid)

    def second_derivative(self, s: Interval) -> Interval:
        """The sigmoid's slope."""
        p = s.increasing(torch.sigmoid)
        return p * (1.0 - p)

    def log_slope(self, s: Interval) -> Interval:
        """Sigmoid over g, at most one."""
        ratio = self.slope(s) / self.value(s)
        return Interval(ratio.lo.clamp_min(0), ratio.hi.clamp_max(1))


@dataclass(frozen=True)
class LogScale:
    """g(s) = exp(f(s))."""

    log: Activation

    def value(self, s: Interval) -> Interval:
        """e^f."""
        return self.log.value(s).exp()

    def slope(self, s: Interval) -> Interval:
        """e^f f'."""
        return self.value(s) * self.log.slope(s)

    def second_derivative(self, s: Interval) -> Interval:
        """e^f (f'^2 + f'')."""
        return self.value(s) * (self.log.slope(s).square() + self.log.second_derivative(s))

    def log_slope(self, s: Interval) -> Interval:
        """f'."""
        return self.log.slope(s)


@dataclass(frozen=True)
class ConstantScale:
    """A scale of which only global constants are known."""

    lower: float
    upper: float
    max_slope: float
    max_log_slope: float

    def value(self, s: Interval) -> Interval:
        """[lower, upper]."""
        return self._all(s, self.lower, self.upper)

    def slope(self, s: Interval) -> Interval:
        """[-max_slope, max_slope]."""
        return self._all(s, -self.max_slope, self.max_slope)

    def log_slope(self, s: Interval) -> Interval:
        """[-max_log_slope, max_log_slope]."""
        return self._all(s, -self.max_log_slope, self.max_log_slope)

    def second_derivative(self, s: Interval) -> Interval:
        """NoRule."""
        return self._all(s, -math.inf, math.inf)

    @staticmethod
    def _all(s: Interval, lo: float, hi: float) -> Interval:
        slack = 1e-14
        return Interval(
            torch.full_like(s.lo, lo - slack * abs(lo)), torch.full_like(s.hi, hi + slack * abs(hi))
        )


def atan_activation(size: float) -> Activation:
    """size * atan(x), size positive."""
    limit = size * math.pi / 2
    return Activation(
        lambda x: size * torch.atan(x),
        lambda x: size / (1 + x.square()),
        {0.0: (size, size)},
        (-limit * (1 + 1e-14), limit * (1 + 1e-14)),
        size,
    )


def scaled(
    function: Activation, outer: float, inner: float = 1.0, shift: float = 0.0
) -> Activation:
    """outer * f(inner * x) + shift, outer and inner positive."""

    def times(derivative: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: outer * inner * derivative(inner * x)

    return Activation(
        lambda x: outer * function.function(inner * x) + shift,
        times(function.derivative),
        {
            point / inner: (outer * inner * low, outer * inner * high)
            for point, (low, high) in function.critical_points.items()
        },
        (outer * function.limits[0] + shift, outer * function.limits[1] + shift),
        function.curvature * outer * inner * inner,
        {point / inner: outer * value + shift for point, value in function.minima.items()},
    )


__all__ = ["Reparametrised"]


@dataclass(frozen=True)
class Reparametrised:
    """z = h(x; f_1(theta_1), ..., f_n(theta_n)).

    Attributes:
        inner: h.
        functions: f_k, one for each parameter of an entry.
    """

    inner: Transformer
    functions: Sequence[Activation]

    @property
    def count(self) -> int:
        """Parameters per entry."""
        return self.inner.count

    def value(self, x: Interval, theta: list[Interval]) -> Interval:
        """h."""
        return self.inner.value(x, self._moved(theta))

    def slope(self, x: Interval, theta: list[Interval]) -> Interval:
        """dh/dx."""
        return self.inner.slope(x, self._moved(theta))

    def sensitivities(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """dh/df_k f_k'."""
        return self._times(self.inner.sensitivities(x, self._moved(theta)), theta)

    def relative(self, x: Interval, theta: list[Interval]) -> list[Interval]:
        """The same divided by dh/dx."""
        return self._times(self.inner.relative(x, self._moved(theta)), theta)

    def _moved(self, theta: list[Interval]) -> list[Interval]:
        return [function.value(u) for function, u in zip(self.functions, theta, strict=True)]

    def _times(self, parts: list[Interval], theta: list[Interval]) -> list[Interval]:
        rates = (function.slope(u) for function, u in zip(self.functions, theta, strict=True))
        return [part * rate for part, rate in zip(parts, rates, strict=True)]

"""Scale functions g of affine couplings: elementwise and positive, with bounds of g and g'."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "ClampedScale",
    "ExpScale",
    "ScaleFunction",
    "SigmoidScale",
    "SoftplusScale",
    "squashed_sigmoid",
]


@runtime_checkable
class ScaleFunction(Protocol):
    """A positive elementwise function g of a network's raw output h."""

    @property
    def lower(self) -> float:
        """The infimum of g."""
        ...

    @property
    def upper(self) -> float:
        """The supremum of g."""
        ...

    @property
    def max_slope(self) -> float:
        """The supremum of |g'|, or an upper bound of it."""
        ...

    @property
    def max_log_slope(self) -> float:
        """The supremum of |g'/g|, or an upper bound of it."""
        ...

    def value(self, h: Tensor) -> Tensor:
        """The scale g(h), in the shape of h."""
        ...

    def log(self, h: Tensor) -> Tensor:
        """The logarithm log g(h), in the shape of h; finite where g(h) itself underflows."""
        ...

    def slope(self, h: Tensor) -> Tensor:
        """The derivative g'(h), in the shape of h."""
        ...


@dataclass(frozen=True)
class SigmoidScale:
    """g(h) = lower + (upper - lower) sigmoid(h + offset), in (lower, upper).

    With a = lower / (upper - lower), sup g'/g = 1 + 2a - 2 sqrt(a^2 + a): 1 for lower = 0, 3 - 2
    sqrt 2 for (0.5, 1).

    Args:
        lower: infimum; 0 gives Glow's sigmoid(h + 2), whose inverse 1/g is unbounded.
        upper: supremum.
        offset: added to h, so that a network of output 0 scales by nearly ``upper``.

    >>> SigmoidScale().value(torch.zeros(1)).item() == torch.sigmoid(torch.tensor(2.0)).item()
    True
    """

    lower: float = 0.0
    upper: float = 1.0
    offset: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.lower < self.upper:
            raise ValueError(
                f"expected 0 <= lower < upper, got lower = {self.lower}, upper = {self.upper}"
            )

    @property
    def max_slope(self) -> float:
        """The supremum of g', (upper - lower) / 4, at the inflection point."""
        return (self.upper - self.lower) / 4

    @property
    def max_log_slope(self) -> float:
        """The supremum of g'/g, 1 + 2a - 2 sqrt(a^2 + a)."""
        a = self.lower / (self.upper - self.lower)
        return 1 + 2 * a - 2 * math.sqrt(a * a + a)

    def value(self, h: Tensor) -> Tensor:
        """The scale g(h), in the shape of h."""
        scale = torch.sigmoid(h + self.offset) * (self.upper - self.lower)
        return scale + self.lower if self.lower else scale

    def log(self, h: Tensor) -> Tensor:
        """The logarithm log g(h), in the shape of h."""
        if self.lower:
            return self.value(h).log()
        # logsigmoid stays finite where the sigmoid has underflown
        return functional.logsigmoid(h + self.offset) + math.log(self.upper)

    def slope(self, h: Tensor) -> Tensor:
        """The derivative g'(h), in the shape of h."""
        sigmoid = torch.sigmoid(h + self.offset)
        return (self.upper - self.lower) * sigmoid * (1 - sigmoid)


def squashed_sigmoid() -> SigmoidScale:
    """0.5 + 0.5 sigmoid(h + 2), in (0.5, 1): the stable scale of the exploding-inverses paper.

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks
        (Behrmann, Vicol, Wang, Grosse, Jacobsen, 2021), appendix C.
    """
    return SigmoidScale(lower=0.5)


@dataclass(frozen=True)
class ExpScale:
    """g(h) = exp(h), in (0, inf): the scale of RealNVP without a bound."""

    lower = 0.0
    upper = math.inf
    max_slope = math.inf
    max_log_slope = 1.0

    def value(self, h: Tensor) -> Tensor:
        """The scale g(h), in the shape of h."""
        return h.exp()

    def log(self, h: Tensor) -> Tensor:
        """The logarithm log g(h), in the shape of h."""
        return h

    def slope(self, h: Tensor) -> Tensor:
        """The derivative g'(h), in the shape of h."""
        return h.exp()


@dataclass(frozen=True)
class ClampedScale:
    """g(h) = exp(clamp (2/pi) atan(h)), in (e^-clamp, e^clamp).

    The slope's supremum is bounded by (2/pi) clamp e^clamp, which it does not reach.

    Args:
        clamp: bound of |log g|.

    References:
        Guided Image Generation with Conditional Invertible Neural Networks (Ardizzone,
        Lüth, Kruse, Rother, Köthe, 2019), where the factor 2/pi is rounded to 0.636.
    """

    clamp: float = 2.0

    def __post_init__(self) -> None:
        if self.clamp <= 0:
            raise ValueError(f"expected a positive clamp, got {self.clamp}")

    @property
    def lower(self) -> float:
        """The infimum of g, e^-clamp."""
        return math.exp(-self.clamp)

    @property
    def upper(self) -> float:
        """The supremum of g, e^clamp."""
        return math.exp(self.clamp)

    @property
    def max_slope(self) -> float:
        """An upper bound of g', (2/pi) clamp e^clamp."""
        return self.max_log_slope * self.upper

    @property
    def max_log_slope(self) -> float:
        """The supremum of g'/g, (2/pi) clamp, at h = 0."""
        return self.clamp * 2 / math.pi

    def value(self, h: Tensor) -> Tensor:
        """The scale g(h), in the shape of h."""
        return self.log(h).exp()

    def log(self, h: Tensor) -> Tensor:
        """The logarithm log g(h), in the shape of h."""
        return self.max_log_slope * torch.atan(h)

    def slope(self, h: Tensor) -> Tensor:
        """The derivative g'(h), in the shape of h."""
        return self.value(h) * self.max_log_slope / (1 + h.square())


@dataclass(frozen=True)
class SoftplusScale:
    """g(h) = lower + log(1 + exp(h)), in (lower, inf): linear where it is large.

    The supremum of g'/g is 1 for lower = 0, in the limit h -> -inf, and below 1 otherwise.

    Args:
        lower: infimum; 0.001 in the autoregressive layers of nflows.
    """

    lower: float = 0.0
    upper = math.inf
    max_slope = 1.0
    max_log_slope = 1.0

    def __post_init__(self) -> None:
        if self.lower < 0:
            raise ValueError(f"expected lower >= 0, got {self.lower}")

    def value(self, h: Tensor) -> Tensor:
        """The scale g(h), in the shape of h."""
        # the default threshold of 20 is too low for float64: e^-20 = 2e-9
        return functional.softplus(h, threshold=40) + self.lower

    def log(self, h: Tensor) -> Tensor:
        """The logarithm log g(h), in the shape of h."""
        if self.lower:
            return self.value(h).log()
        # log g = h - e^h / 2 + ...; below -40 that is h, also where g has underflown
        return torch.where(h < -40, h, self.value(h.clamp(min=-40)).log())

    def slope(self, h: Tensor) -> Tensor:
        """The derivative g'(h), in the shape of h."""
        return torch.sigmoid(h)

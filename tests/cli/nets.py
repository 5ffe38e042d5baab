"""Models for the command line to import: each factory is one case."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import inn_guard as ig
from inn_guard.core.base import BaseDistribution


class Scale(nn.Module):
    """x -> s x, whose inverse is exact up to rounding, useless, or NaN, depending on s."""

    def __init__(self, scale: float = 2.0, *, features: int = 4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((features,), scale))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale

    def inverse(self, z: Tensor) -> Tensor:
        return z / self.scale


class Lossy(Scale):
    """Adds 1e6 before it scales: the digits of x below 0.1 are lost in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1e6) * self.scale

    def inverse(self, z: Tensor) -> Tensor:
        return z / self.scale - 1e6


class Shift(nn.Module):
    """x -> x + c, where c is the context."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + context

    def inverse(self, z: Tensor, context: Tensor) -> Tensor:
        return z - context


class Drawn(Scale, ig.Invertible):
    """Scale with a standard normal base of its own."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__(scale)

    def base(self) -> BaseDistribution:
        def sample(n: int, context: object) -> Tensor:
            return torch.randn(n, 4)

        return BaseDistribution(sample, self.scale.detach())


class DrawnLossy(Lossy, Drawn):
    """Draws of which float32 loses the digits."""


class Unwilling(Drawn):
    """Cannot be drawn from."""

    def inverse(self, z: Tensor) -> Tensor:
        raise RuntimeError("no inverse today")


def stable() -> nn.Module:
    return Scale()


def unstable() -> nn.Module:
    return Lossy()


def singular() -> nn.Module:
    return Scale(0.0)


class Shrinking(nn.Module):
    """x -> (x e^s + 1, log det): float32 loses what lies beside the 1, until s is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((4,), -16.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp() + 1.0, self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return (z - 1.0) / self.log_scale.exp(), -self.log_scale.sum().expand(len(z))


def shrinking() -> nn.Module:
    return Shrinking().float()


def no_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return 0.0 * model(batch[0])[0].sum()


def image() -> nn.Module:
    return Scale(features=3)


def random() -> nn.Module:
    net = Scale()
    net.scale.data = torch.rand(4) + 1
    return net


def raises() -> nn.Module:
    raise ValueError("first line\nsecond line")


def leaves() -> nn.Module:
    raise SystemExit(0)


def needs(width: int) -> nn.Module:
    return Scale(features=width)


def wide_base() -> torch.distributions.Normal:
    return torch.distributions.Normal(torch.zeros(4), torch.full((4,), 2.0))


def number() -> int:
    return 3


ready = Scale()
not_callable = 3

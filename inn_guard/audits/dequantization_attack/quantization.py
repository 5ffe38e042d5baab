"""The cube of dequantized samples around every integer image, in the model's own dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.core.layer_jacobian import NotApplicable

__all__ = ["Cubes", "Quantization"]

Bound = float | int | Sequence[float | int] | Tensor

#: Rounding units by which a value may lie below its grid line and still be taken to lie on it.
SLACK = 16.0


@dataclass(frozen=True)
class Quantization:
    """How integers n = 0 ... 2^bits - 1 became model inputs.

        low + (high - low) (n + u) / 2^bits,   u uniform in [0, 1)

    Any affine normalisation is of this form: x = (v - mean) / std with v in [0, 1] has low = -mean
    / std and high = (1 - mean) / std, per channel if need be.

    Attributes:
        bits: of the integers.
        low: what v = 0 becomes: one number, one per channel (dimension 1 of the batch), or a tensor
            like one sample.
        high: what v = 1 becomes.
    """

    bits: int = 8
    low: Bound = 0.0
    high: Bound = 1.0

    def __post_init__(self) -> None:
        if self.bits < 1:
            raise ValueError(f"expected at least one bit, got {self.bits}")
        low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (self.low, self.high))
        if not bool((low.isfinite() & high.isfinite() & (low < high)).all()):
            raise ValueError(f"expected finite low < high, got {self.low} and {self.high}")

    @classmethod
    def assumed(cls, x: Tensor) -> Quantization:
        """8 bits over the first of [0, 1], [-0.5, 0.5], [-1, 1] and its range that holds x."""
        low, high = x.min().item(), x.max().item()
        for bounds in ((0.0, 1.0), (-0.5, 0.5), (-1.0, 1.0)):
            if bounds[0] <= low and high <= bounds[1]:
                return cls(8, *bounds)
        if low == high:  # one value says nothing of a range
            low, high = low - max(1.0, abs(low)) / 2, low + max(1.0, abs(low)) / 2
        if not math.isfinite(high - low):
            raise NotApplicable(
                f"no quantization can be assumed for data from {low:.3g} to {high:.3g}"
            )
        return cls(8, low, high)

    def cubes(self, x: Tensor) -> Cubes:
        """The cubes of the integers that samples x (B, *data), dequantized or not, came from.

        Raises:
            ValueError: if x has values outside of [low, high].
            NotApplicable: if the dtype of x has no number in some cube.
        """
        low, high = (_like_samples(bound, x) for bound in (self.low, self.high))
        width = (high - low) / 2**self.bits
        slack = SLACK * torch.finfo(x.dtype).eps * torch.maximum(low.abs(), high.abs()) / width
        place = (x.double() - low) / width
        if not bool(((place >= -slack) & (place <= 2**self.bits + slack)).all()):
            bounds = f"[{self.low}, {self.high}]"
            raise ValueError(
                f"expected x within {bounds}, got values from {x.min():.4g} to {x.max():.4g}: type "
                "quantization=Quantization(bits, low, high) with what 0 and 1 become in your "
                "normalisation"
            )
        index = (place + slack.clamp(max=0.25)).floor().clamp(0, 2**self.bits - 1)
        return Cubes(low + index * width, low + (index + 1) * width, high - low, x.dtype)


class Cubes:
    """One closed box per sample: the numbers of ``dtype`` in [lower, upper).

    Attributes:
        lower, upper: smallest and largest number in it, (B, *data), of the dtype.
        centre: its middle, rounded.
        half: half its width.
        span: high - low of the normalisation, broadcastable to x: what a step of 1 in [0, 1] is for
            the model.
    """

    def __init__(self, lower: Tensor, upper: Tensor, span: Tensor, dtype: torch.dtype) -> None:
        self._exact_lower, self._exact_upper = lower, upper
        self.lower, self.upper = _at_least(lower, dtype), _below(upper, dtype)
        if bool((self.lower > self.upper).any()):
            name = str(dtype).removeprefix("torch.")
            raise NotApplicable(
                f"{name} has no number in some of the cubes: it cannot hold data of this bit depth"
            )
        self.half = ((upper - lower) / 2).to(dtype)
        self.centre = self.project(((lower + upper) / 2).to(dtype))
        self.span = span.to(dtype)

    def project(self, x: Tensor) -> Tensor:
        """The point of the cube that is nearest to x."""
        return torch.minimum(torch.maximum(x, self.lower), self.upper)

    def uniform(self, generator: torch.Generator) -> Tensor:
        """One random point per cube."""
        u = torch.rand(self.lower.shape, generator=generator, device="cpu", dtype=torch.float64).to(
            self.lower.device
        )
        exact = self._exact_lower + u * (self._exact_upper - self._exact_lower)
        return self.project(exact.to(self.lower.dtype))

    def near(self, x: Tensor, radius: float, generator: torch.Generator) -> Tensor:
        """A random point of the cube at most ``radius`` half-widths from x in every coordinate."""
        u = (
            2
            * torch.rand(x.shape, generator=generator, device="cpu", dtype=torch.float64).to(
                x.device
            )
            - 1
        )
        return self.project((x.double() + radius * self.half.double() * u).to(x.dtype))

    def contain(self, x: Tensor) -> Tensor:
        """Which samples lie in their cubes, lower <= x < upper in float64: (B,) bool."""
        inside = (x.double() >= self._exact_lower) & (x.double() < self._exact_upper)
        return inside.flatten(1).all(1)


def _like_samples(bound: Bound, x: Tensor) -> Tensor:
    """The bound as float64, broadcastable to x."""
    values = torch.as_tensor(bound, dtype=torch.float64, device=x.device)
    if values.numel() == 1:
        return values.reshape([1] * x.dim())
    if values.shape == x.shape[1:]:
        return values.unsqueeze(0)
    if values.shape == x.shape[1:2]:
        return values.reshape(1, -1, *[1] * (x.dim() - 2))
    raise ValueError(
        f"expected one bound, {x.shape[1]}, one per channel, or a tensor {tuple(x.shape[1:])} like "
        "one sample; "
        f"got shape {tuple(values.shape)}"
    )


def _at_least(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest number of ``dtype`` that is not below ``exact``."""
    nearest = exact.to(dtype)
    return torch.where(nearest.double() < exact, _next(nearest, math.inf), nearest)


def _below(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of ``dtype`` below ``exact``."""
    nearest = exact.to(dtype)
    return torch.where(nearest.double() >= exact, _next(nearest, -math.inf), nearest)


def _next(t: Tensor, towards: float) -> Tensor:
    return torch.nextafter(t, torch.full_like(t, towards))

"""Limits: up to which figure a model is fit for a use, each with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from inn_guard.report.verdict import Verdict

__all__ = ["Limits"]

#: In units of the dtype's eps: rounding alone may cost a round trip of a few operations half of
#: this, in whichever direction. A bfloat16 round trip cannot come back to 1 %.
RESOLUTION = 8.0


@dataclass(frozen=True)
class Limits:
    """The largest figure with which a model is still fit for each use.

    Attributes:
        density: error of log p(x) of one sample, in nats. 0.1 nats changes an importance weight by
            10 %.
        sampling: rate of lost draws. One lost draw in a thousand can spoil an average without being
            noticed.
        draw: a draw x = F^-1(z) is lost if F(x) is off from z by more than this, as the root mean
            square over the latent's entries in units of the base's deviation, or if it is not
            finite. In a coarse dtype it is `returned_draw`.
        reconstruction: error of one entry of a round trip x -> z -> x, relative to the deviation of
            its feature or to its own size, whichever is larger. 1 % is what one sees in a plot.
        gradient_angle: between the memory-saving gradient and the true one, in degrees. Minibatch
            noise turns a gradient by far more than 1 degree.
        gradient_length: relative error of the gradient's length.
        other_inputs: share of the families of other inputs that may fail. None may.
        marginal: a figure above this share of its limit is marginal, not stable.
        confidence: of the interval that decides a rate.
    """

    density: float = 0.1
    sampling: float = 1e-3
    draw: float = 0.01
    reconstruction: float = 0.01
    gradient_angle: float = 1.0
    gradient_length: float = 0.01
    other_inputs: float = 0.0
    marginal: float = 0.1
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # a share of zero says that no family may fail; a limit of zero would fail everything
            least = math.ulp(0.0)
            if field.name == "other_inputs":
                least = 0.0
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"expected the limit {field.name} as a number; got {value!r}")
            if not least <= value < math.inf:
                what = "a positive" if least else "a non-negative"
                raise ValueError(f"expected {what} limit {field.name}; got {value!r}")
        for name in ("sampling", "confidence", "marginal"):
            if getattr(self, name) > 1:
                raise ValueError(f"expected {name} between 0 and 1; got {getattr(self, name)!r}")
        if self.confidence == 1:
            raise ValueError("expected a confidence below 1: no finite number of draws is certain")

    def round_trip(self, dtype: torch.dtype) -> float:
        """The limit of a reconstruction in this dtype: at least what the dtype can hold.

        >>> Limits().round_trip(torch.float32), Limits().round_trip(torch.bfloat16)
        (0.01, 0.0625)
        """
        return max(self.reconstruction, RESOLUTION * torch.finfo(dtype).eps)

    def returned_draw(self, dtype: torch.dtype) -> float:
        """The limit of the error of a draw in this dtype: at least what the dtype can hold.

        >>> Limits().returned_draw(torch.float32), Limits().returned_draw(torch.bfloat16)
        (0.01, 0.0625)
        """
        return max(self.draw, RESOLUTION * torch.finfo(dtype).eps)

    def verdict(self, figure: float, limit: float) -> Verdict:
        """The verdict on a figure that ought to be small.

        >>> [str(Limits().verdict(figure, 0.1)) for figure in (0.001, 0.05, 0.2, math.inf)]
        ['stable', 'marginal', 'unstable', 'non_finite']
        """
        if not math.isfinite(figure):
            return Verdict.NON_FINITE
        if figure > limit:
            return Verdict.UNSTABLE
        if figure > self.marginal * limit:
            return Verdict.MARGINAL
        return Verdict.STABLE

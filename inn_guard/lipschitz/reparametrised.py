"""Transformers whose parameters go through functions of their own before they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inn_guard.lipschitz.activations import Activation
from inn_guard.lipschitz.intervals import Interval
from inn_guard.lipschitz.transformers import Transformer

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

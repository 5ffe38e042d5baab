"""Guarded(model): a call can neither hang nor lose a whole batch to one bad sample."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from inn_guard.audits.audited_model import ModelError
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable
from inn_guard.core.tensors import finite_rows, peak
from inn_guard.execution.time_limit import TimedOut, time_limit

__all__ = ["Failures", "Guarded", "patience"]

LEAST = 10.0  #: seconds that any call may take
FIRST = 300.0  #: the limit of the very first call, when nothing is known yet
FACTOR = 50.0  #: a call may take this many times as long as one that is known to be good


def patience(model: Invertible, x: Tensor) -> float:
    """Seconds that one call on a batch like x may take, from the time of a round trip of x."""
    start = time.perf_counter()
    try:
        with torch.no_grad(), time_limit(FIRST):
            z = model(x)
            rows = finite_rows(z).nonzero()[:, 0]
            if len(rows):
                model.select(rows).inverse(z[rows])
    except (ModelError, NotApplicable, TimedOut):
        return LEAST
    return max(LEAST, FACTOR * (time.perf_counter() - start))


class Failures:
    """Why samples have no number: reason -> how many of them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __str__(self) -> str:
        return "; ".join(f"{count} x {reason}" for reason, count in self.counts.items())


class Guarded:
    """Forward and inverse of a model, sample by sample as far as failures go, without a graph.

    Only finite samples are handed to the model: some loop forever on NaN, others raise for the
    whole batch. Where a batch raises, it is halved until the samples that raise are alone; where a
    call takes longer than ``seconds``, its samples fail together. What a sample did not return is
    NaN.

    Args:
        model: the map, as `AuditedModel`.
        x: data on which the model is known to run; gives the shapes.
        seconds: limit of one call.

    Attributes:
        latent_shape: of z, per sample.
        failures: why samples have no number; shared by what `select` returns.

    Raises:
        ModelError: if the forward of x itself raises or does not return.
    """

    def __init__(self, model: Invertible, x: Tensor, *, seconds: float | int) -> None:
        self.model = model
        self.seconds = seconds
        self.failures = Failures()
        self._data_shape = x.shape[1:]
        try:
            with torch.no_grad(), time_limit(seconds):
                self.latent_shape = model(x).shape[1:]
        except TimedOut as hang:
            raise ModelError(f"the model's forward does not return: {hang}") from None

    def select(self, rows: Tensor) -> Guarded:
        """The same for some rows of the batch."""
        clone = copy.copy(self)
        clone.model = self.model.select(rows)
        return clone

    def of(self, model: Invertible) -> Guarded:
        """The same for another model with the same shapes."""
        clone = copy.copy(self)
        clone.model = model
        return clone

    def fresh_copy(self) -> Guarded:
        """The same without failures so far."""
        clone = copy.copy(self)
        clone.failures = Failures()
        return clone

    def refuses(self, x: Tensor) -> Tensor:
        """Whether the model's forward raises for a finite sample, (B,) bool."""
        refused = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        rows = finite_rows(x).nonzero()[:, 0]
        if not len(rows):
            return refused
        try:
            with torch.no_grad(), time_limit(self.seconds):
                self.model.select(rows)(x[rows])
        except TimedOut:
            return refused
        except (ModelError, NotApplicable):
            if len(rows) == 1:
                refused[rows] = True
                return refused
            for half in rows.tensor_split(2):
                refused[half] = self.select(half).refuses(x[half])
        return refused

    def forward(self, x: Tensor) -> Tensor:
        """F(x), (B, *latent); NaN for samples that failed."""
        return self._run(self.model, x, self.latent_shape, lambda part, t: part(t))

    def inverse(self, z: Tensor) -> Tensor:
        """F^-1(z), (B, *data); NaN for samples that failed."""
        return self._run(self.model, z, self._data_shape, lambda part, t: part.inverse(t))

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F(x) and log|det J|, (B,), in one call; NaN for samples that failed."""
        return self._both(x, self.latent_shape, lambda part, t: part.forward_and_log_det(t))

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """F^-1(z) and log|det J^-1|, (B,), in one call; NaN for samples that failed."""
        return self._both(z, self._data_shape, lambda part, t: part.inverse_and_log_det(t))

    def inverse_and_peak(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """F^-1(z) and the largest magnitude of any state on the way, (B,); NaN where it failed.

        The states are those between the layers, or z and F^-1(z) alone if the model is opaque.
        """
        return self._both(z, self._data_shape, _inverse_and_peak)

    def _both(
        self,
        t: Tensor,
        shape: torch.Size,
        call: Callable[[Invertible, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        def joined(part: Invertible, rows: Tensor) -> Tensor:
            value, log_det = call(part, rows.to(t))
            return torch.cat([value.flatten(1).double(), log_det.reshape(-1, 1).double()], dim=1)

        out = self._run(self.model, t.double(), torch.Size([shape.numel() + 1]), joined)
        return out[:, :-1].to(t.dtype).reshape(len(t), *shape), out[:, -1]

    def _run(
        self,
        model: Invertible,
        t: Tensor,
        shape: torch.Size,
        call: Callable[[Invertible, Tensor], Tensor],
    ) -> Tensor:
        out = t.new_full((len(t), *shape), math.nan)
        rows = finite_rows(t).nonzero()[:, 0]
        if not len(rows):
            return out
        part = model if len(rows) == len(t) else model.select(rows)
        try:
            with torch.no_grad(), time_limit(self.seconds):
                out[rows] = call(part, t[rows]).to(out.dtype)
        except TimedOut as hang:
            self.failures.counts[str(hang)] += len(rows)
        except ModelError as error:
            if len(rows) == 1:
                self.failures.counts[str(error)] += 1
                return out
            for half in rows.tensor_split(2):
                out[half] = self._run(model.select(half), t[half], shape, call)
        return out


def _inverse_and_peak(model: Invertible, z: Tensor) -> tuple[Tensor, Tensor]:
    layers = model.layers()
    state, largest = z, peak(z)
    for layer in reversed(layers):
        state = layer.inverse(state)
        largest = torch.maximum(largest, peak(state))
    if layers:
        return state, largest
    x = model.inverse(z)
    return x, torch.maximum(largest, peak(x))

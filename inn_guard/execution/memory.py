"""Peak memory of a computation, measured, and how it grows with the number of samples."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.jacobian.chain import Linearization

__all__ = ["Footprint", "forward_footprint", "linearized_footprint", "peak_bytes"]


@dataclass(frozen=True)
class Footprint:
    """Peak memory as a linear function of the number of samples.

    Attributes:
        fixed: bytes for any number of samples.
        each: bytes per sample, > 0.
    """

    fixed: float | int
    each: float | int

    def of(self, samples: int) -> float | int:
        """Bytes for this number of samples."""
        return self.fixed + self.each * samples

    def samples_within(self, memory: float | int) -> int:
        """The number of samples that fit into ``memory`` bytes, at least 1.

        >>> footprint = Footprint(fixed=10.0, each=3.0)
        >>> footprint.samples_within(20), footprint.samples_within(5)
        (3, 1)
        """
        return max(1, int((memory - self.fixed) // self.each))

    def plus(self, each: float | int) -> Footprint:
        """The same with ``each`` more bytes per sample."""
        return Footprint(self.fixed, self.each + each)


def forward_footprint(model: Invertible, x: Tensor, *, within: float = math.inf) -> Footprint:
    """Memory of one forward pass and one inverse pass without a graph.

    Args:
        model: the map.
        x: data, (B, *data).
        within: bytes that the measurement should not exceed.
    """

    def passes(part: Invertible, rows: Tensor) -> None:
        with torch.no_grad():
            part.inverse(part(rows))

    return _linear_fit(model, x, passes, within)


def linearized_footprint(
    model: Invertible, x: Tensor, *, vectors: int = 0, within: float = math.inf
) -> Footprint:
    """Memory of a linearization with its four products.

    Args:
        model: the map.
        x: data, (B, *data).
        vectors: further vectors of the shape of a sample that are held per sample.
        within: bytes that the measurement should not exceed.
    """

    def passes(part: Invertible, rows: Tensor) -> None:
        linearization = Linearization(part, rows)
        try:
            linearization.vjp(linearization.jvp(rows).vector)
            linearization.inverse_vjp(linearization.inverse_jvp(linearization.output).vector)
        except NotApplicable:  # the products before the one that is missing have been measured
            return

    width = torch.promote_types(x.dtype, torch.float32).itemsize
    return _linear_fit(model, x, passes, within).plus(vectors * x[0].numel() * width)


def _linear_fit(
    model: Invertible, x: Tensor, passes: Callable[[Invertible, Tensor], None], within: float
) -> Footprint:
    """Measure one and two samples; or one only, with no fixed part, where two may need too much."""

    def measured(count: int) -> int:
        rows = torch.zeros(count, dtype=torch.long, device=x.device)
        return peak_bytes(lambda: passes(model.select(rows), x[rows]))

    one = measured(1)
    each = one
    if 2 * one <= within:
        each = measured(2) - one
    each = max(each, x[0].numel() * x.element_size())
    return Footprint(max(0, one - each), each)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The largest number of bytes of new tensors that ``call`` holds at once, on any device.

    Workspace that an operation of torch allocates and frees internally is not counted.

    >>> peak_bytes(lambda: torch.ones(1000, dtype=torch.float32) + 1)
    8000
    """
    meter = _Meter()
    with meter:
        call()
    return meter.peak


class _Meter(TorchDispatchMode):
    """Adds up the sizes of the living storages that operations have returned."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(_storage(tensor), given)
        return result

    def _count(self, storage: Any, given: set[Any]) -> None:
        if storage is None or storage in given or storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._released, size)

    def _released(self, size: int) -> None:
        self.held -= size


def _storage(tensor: Tensor) -> Any:
    if tensor.layout is not torch.strided:
        return None
    return tensor.untyped_storage()

"""How many bytes of tensors a computation holds at once, measured; and how that grows with the number of samples."""

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
    """Bytes held at once as a straight line in the number of samples.

    Attributes:
        fixed: bytes whatever the number of samples.
        each: bytes per sample, > 0.
    """

    fixed: float | int
    each: float | int

    def of(self, samples: int) -> float | int:
        """Bytes for so many samples."""
        return self.fixed + self.each * samples

    def samples_within(self, memory: float | int) -> int:
        """How many samples fit into so many bytes; 1 where not even one does.

        >>> Footprint(fixed=10.0, each=3.0).samples_within(20), Footprint(fixed=10.0, each=3.0).samples_within(5)
        (3, 1)
        """
        return max(1, int((memory - self.fixed) // self.each))

    def plus(self, each: float | int) -> Footprint:
        """With so many more bytes for every sample."""
        return Footprint(self.fixed, self.each + each)


def forward_footprint(model: Invertible, x: Tensor, *, within: float = math.inf) -> Footprint:
    """Of one pass forward and back without a graph; measured holding no more bytes than ``within`` if it can be."""

    def passes(part: Invertible, rows: Tensor) -> None:
        with torch.no_grad():
            part.inverse(part(rows))

    return _line(model, x, passes, within)


def linearized_footprint(
    model: Invertible, x: Tensor, *, vectors: int = 0, within: float = math.inf
) -> Footprint:
    """Of a linearisation at x with its four products, and so many vectors like x per sample; measured alike."""

    def passes(part: Invertible, rows: Tensor) -> None:
        linearization = Linearization(part, rows)
        try:
            linearization.vjp(linearization.jvp(rows).vector)
            linearization.inverse_vjp(linearization.inverse_jvp(linearization.output).vector)
        except NotApplicable:  # what there is counts
            return

    width = torch.promote_types(x.dtype, torch.float32).itemsize
    return _line(model, x, passes, within).plus(vectors * x[0].numel() * width)


def _line(
    model: Invertible, x: Tensor, passes: Callable[[Invertible, Tensor], None], within: float
) -> Footprint:
    """The line through one and two samples; through one and the origin where two may be too many."""

    def measured(count: int) -> int:
        rows = torch.zeros(count, dtype=torch.long, device=x.device)
        return peak_bytes(lambda: passes(model.select(rows), x[rows]))

    one = measured(1)
    each = max(one if 2 * one > within else measured(2) - one, x[0].numel() * x.element_size())
    return Footprint(max(0, one - each), each)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Largest number of bytes of new tensors that ``call`` held at once, on any device.

    What libraries use within one operation of torch does not count.

    >>> peak_bytes(lambda: torch.ones(1000, dtype=torch.float32) + 1)
    8000
    """
    meter = _Meter()
    with meter:
        call()
    return meter.peak


class _Meter(TorchDispatchMode):
    """Counts the storages that operations return while they live."""

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
    return tensor.untyped_storage() if tensor.layout is torch.strided else None

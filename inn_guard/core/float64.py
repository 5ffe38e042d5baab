"""Calls that compute in float64 throughout, also where a model's code says float32.

A copy of a model with its weights in float64 still computes in float32 where the code casts
(``x.float()``), names a dtype (``softmax(x, dtype=torch.float32)``), makes tensors in the default
dtype (``torch.zeros(n)``), or keeps a tensor that is no buffer. Such a copy raises because of mixed
dtypes, or shares the rounding that it should reveal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["float64_throughout", "is_float64_throughout"]

#: what stands for a coarser dtype
FINER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
CASTS = frozenset(
    {Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type, Tensor.type_as}
)
REINTERPRETS = frozenset({Tensor.view})  #: bits, where it is given a dtype


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Within, what would be computed in a coarser dtype is computed in float64.

    >>> with float64_throughout():
    ...     (torch.ones(2).float() / 3).dtype
    torch.float64
    """
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Refining():
            yield
    finally:
        torch.set_default_dtype(usual)


def is_float64_throughout(call: Callable[[], Any]) -> bool:
    """Whether a call makes no tensor of a coarser dtype; False if it raises.

    >>> is_float64_throughout(lambda: torch.ones(2, dtype=torch.float64).float().double())
    False
    """
    watch = _Watch()
    try:
        with watch:
            call()
    except Exception:  # most often because float32 and float64 meet
        return False
    return not watch.coarse


class _Refining(TorchFunctionMode):
    """Replaces dtypes in arguments, results of casts, and coarse tensors that meet finer ones."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in CASTS:
            cast = func(*args, **kwargs)
            finer = FINER.get(cast.dtype) if isinstance(cast, Tensor) else None
            return cast if finer is None else args[0].to(cast.device, finer)
        if func in REINTERPRETS:
            return func(*args, **kwargs)
        args, kwargs = tree_map(_finer_dtype, (args, kwargs))
        if _is_mixed((args, kwargs)):
            kept = args[:1] if _writes_into_first(func) else ()
            rest, kwargs = tree_map(_finer_tensor, (args[len(kept) :], kwargs))
            args = (*kept, *rest)
        return func(*args, **kwargs)


class _Watch(TorchDispatchMode):
    """Notes whether an operation returns a coarse tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.coarse = self.coarse or any(map(_is_coarse, tree_leaves(out)))
        return out


def _finer_dtype(value: Any) -> Any:
    return FINER.get(value, value) if isinstance(value, torch.dtype) else value


def _finer_tensor(value: Any) -> Any:
    return value.to(FINER[value.dtype]) if _is_coarse(value) else value


def _is_coarse(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in FINER


def _is_mixed(arguments: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    fine = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    return fine and any(map(_is_coarse, tensors))


def _writes_into_first(func: Any) -> bool:
    """Whether the first argument is written into, so that it must stay the same tensor."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))

"""Contexts (conditions) of a map: tensors with one row per sample, in any nesting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Context", "cast_context", "context_length", "map_tensors", "select_rows"]

#: a tensor (B, ...), or a (nested) tuple, list or dict of tensors, with one row per sample; or None
Context = Any


def map_tensors(context: Context, function: Callable[[Tensor], Any]) -> Context:
    """``context`` with ``function(tensor)`` in the place of every tensor in it."""
    if isinstance(context, Tensor):
        return function(context)
    if isinstance(context, dict):
        return {key: map_tensors(value, function) for key, value in context.items()}
    if isinstance(context, (list, tuple)):
        return type(context)([map_tensors(value, function) for value in context])
    return context


def select_rows(context: Context, rows: Tensor) -> Context:
    """``context`` with every tensor in it indexed by ``rows`` along its first dimension."""
    return map_tensors(context, lambda tensor: tensor[rows.to(tensor.device)])


def cast_context(context: Context, dtype: torch.dtype) -> Context:
    """``context`` with its floating-point tensors in ``dtype``; integers and booleans stay."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return map_tensors(context, cast)


def context_length(context: Context) -> int:
    """Number of rows of the first tensor in ``context``.

    Raises:
        ValueError: if there is no tensor in it.

    >>> context_length({"y": [torch.zeros(5, 2)]})
    5
    """
    lengths: list[int] = []
    map_tensors(context, lambda tensor: lengths.append(len(tensor)))
    if not lengths:
        raise ValueError(f"expected a tensor in the context, got {type(context).__name__}")
    return lengths[0]

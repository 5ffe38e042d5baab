"""Copies of a whole model that share nothing with it."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from inn_guard.core.invertible import Invertible, copies_of_computed_tensors

__all__ = ["independent_copy"]


def independent_copy(model: nn.Module) -> nn.Module:
    """A deep copy, of the same class, that can be changed without changing ``model``.

    Tensors with a graph, which some modules keep from their last call, are detached, and caches
    are emptied. The context of an Invertible stays the same object.

    Raises:
        TypeError: if it cannot be copied, or the copy still shares a parameter with the model.
    """
    context, bare = None, model
    if isinstance(model, Invertible):
        # the output of an embedding net is no leaf and cannot be copied
        context, bare = model.context, model.with_context(None)
    memo = {**copies_of_computed_tensors(bare), **_empty_caches(bare)}
    try:
        made = copy.deepcopy(bare, memo)
    except (TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise TypeError(
            f"expected a model that copy.deepcopy can copy; {type(model).__name__} raises "
            f"{type(error).__name__}: {error}"
        ) from error
    _check_shares_nothing(model, made)
    if isinstance(made, Invertible) and context is not None:
        made = made.with_context(context)
    return made


def _empty_caches(model: nn.Module) -> dict[int, Any]:
    """id -> new object, for the caches that layers keep between calls, as nflows' Linear does."""
    caches: dict[int, Any] = {}
    for module in model.modules():
        cache = getattr(module, "cache", None)
        if hasattr(cache, "invalidate"):
            caches[id(cache)] = type(cache)()
    return caches


def _check_shares_nothing(model: nn.Module, made: nn.Module) -> None:
    def memories(of: nn.Module) -> dict[int, str]:
        tensors: list[tuple[str, Tensor]] = list(of.named_parameters())
        return {tensor.data_ptr(): name for name, tensor in tensors if tensor.numel()}

    own = memories(model)
    shared = [own[place] for place in memories(made) if place in own]
    if shared:
        raise TypeError(
            f"expected a model whose deep copy has weights of its own; {type(model).__name__} "
            f"shares {shared[0]} with its copy: pass a module that owns its weights"
        )

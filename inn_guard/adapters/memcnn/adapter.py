"""MemCNN: couplings and modules with InvertibleModuleWrappers as Invertibles.

A wrapper frees the storage of the tensor that it is given and differentiates by ``.backward()`` alone. So no wrapper is
ever called here: what is inside it is, in a shallow copy of the model that shares every parameter and statistic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from memcnn import InvertibleModuleWrapper
from torch import Tensor, nn

from inn_guard.adapters.callables import ForwardAndInverse
from inn_guard.adapters.memcnn import jacobians as tangents_memcnn  # noqa: F401 - register bound rules and tangents
from inn_guard.core.invertible import Context, Invertible

__all__ = ["MemcnnModule", "adapt", "bare", "switched_gradients"]


def adapt(model: nn.Module, context: Context = None) -> Invertible:
    """A module of MemCNN, or one with ``forward`` and ``inverse`` that has such modules inside, as an Invertible.

    A Sequential of wrappers is ``wrap(layers=sequential)``.

    Raises:
        TypeError: if the model has no inverse.
    """
    if not callable(getattr(model, "inverse", None)):
        raise TypeError(
            f"expected a module with forward and inverse, got {type(model).__name__}; "
            "type wrap(layers=[...]) with its invertible parts instead"
        )
    return MemcnnModule(model, context)


class MemcnnModule(ForwardAndInverse):
    """One module, called without its wrappers. MemCNN knows no log-determinants."""

    missing_log_det = "MemCNN computes no log-determinants"

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        return ForwardAndInverse(self.block, self.context)._encode(x)

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        return ForwardAndInverse(self.block, self.context)._decode(z)

    @property
    def block(self) -> nn.Module:
        """What is inside the wrappers."""
        return bare(self.module)


def bare(module: nn.Module) -> nn.Module:
    """The module without its wrappers and with the plain implementation of its couplings; itself if it has neither.

    Parameters, buffers and all parts without wrappers are shared; nothing in the module is changed.
    """
    if isinstance(module, InvertibleModuleWrapper):
        return bare(module._fn)
    parts = {name: None if part is None else bare(part) for name, part in module._modules.items()}
    switches = [
        name
        for name in ("implementation_fwd", "implementation_bwd")
        if getattr(module, name, -1) != -1
    ]
    if not switches and all(parts[name] is part for name, part in module._modules.items()):
        return module
    twin = copy.copy(module)
    vars(twin).update(dict.fromkeys(switches, -1), _modules=parts)
    return twin


def switched_gradients(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """For every parameter, the gradient that MemCNN trains with and the true one, by its own switch ``disable``.

    Args:
        model: a module with InvertibleModuleWrappers; a copy is differentiated.
        x: data, (B, *data).
        loss: z -> scalar.

    Returns:
        (memory-saving, true), in the order of ``model.parameters()``; None where a parameter has no gradient.
    """
    saving, true = (_gradients(model, x, loss, disable=disable) for disable in (False, True))
    return list(zip(saving, true, strict=True))


def _gradients(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], *, disable: bool
) -> list[Tensor | None]:
    twin = copy.deepcopy(model)
    twin.zero_grad()
    for part in twin.modules():
        if isinstance(part, InvertibleModuleWrapper):
            part.disable = disable
    loss(twin(x.clone())).backward()
    return [parameter.grad for parameter in twin.parameters()]

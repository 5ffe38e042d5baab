"""MemCNN: couplings and modules with InvertibleModuleWrappers as Invertibles.

A wrapper frees the storage of the tensor that it is given, and only ``.backward()`` differentiates
it. So no wrapper is called here: the modules inside are, in a shallow copy of the model that shares
every parameter and statistic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from memcnn import InvertibleModuleWrapper
from torch import Tensor, nn

from inn_guard.adapters.callables import ForwardAndInverse
from inn_guard.adapters.memcnn import jacobians  # noqa: F401 - registers them
from inn_guard.core.invertible import Context, Invertible

__all__ = ["MemcnnModule", "adapt", "switched_gradients", "unwrapped"]


def adapt(model: nn.Module, context: Context = None) -> Invertible:
    """A module of MemCNN, or one with ``forward`` and ``inverse`` that holds such modules.

    For a Sequential of wrappers, call ``wrap(layers=sequential)``.

    Raises:
        TypeError: if the model has no inverse.
    """
    if not callable(getattr(model, "inverse", None)):
        raise TypeError(
            f"expected a module with forward and inverse, got {type(model).__name__}; "
            "call wrap(layers=[...]) with its invertible parts"
        )
    return MemcnnModule(model, context)


class MemcnnModule(ForwardAndInverse):
    """One module, called without its wrappers. MemCNN computes no log-determinants."""

    missing_log_det = "MemCNN computes no log-determinants"

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        return ForwardAndInverse(self.block, self.context)._encode(x)

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        return ForwardAndInverse(self.block, self.context)._decode(z)

    @property
    def block(self) -> nn.Module:
        """The module without its wrappers, which is what runs."""
        return unwrapped(self.module)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module without its wrappers and with the plain implementation of its couplings.

    The module itself if it has neither. Parameters, buffers and all parts without wrappers are
    shared; nothing in the module is changed.
    """
    if isinstance(module, InvertibleModuleWrapper):
        return unwrapped(module._fn)
    parts: dict[str, nn.Module | None] = {}
    changed = False
    for name, part in module._modules.items():
        parts[name] = part if part is None else unwrapped(part)
        changed = changed or parts[name] is not part
    # -1 is the implementation by plain autograd
    implementations = ("implementation_fwd", "implementation_bwd")
    switches = [name for name in implementations if getattr(module, name, -1) != -1]
    if not changed and not switches:
        # parametrized modules cannot be copied
        return module
    clone = copy.copy(module)
    vars(clone)["_modules"] = parts
    for switch in switches:
        setattr(clone, switch, -1)
    return clone


def switched_gradients(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """For every parameter, the gradient that MemCNN trains with and the true one.

    The true one is computed by MemCNN with its own switch ``disable``.

    Args:
        model: a module with InvertibleModuleWrappers; a copy is differentiated.
        x: data, (B, *data).
        loss: z -> scalar.

    Returns:
        (memory-saving, true), in the order of ``model.parameters()``; None where a parameter has no
        gradient.
    """
    saving = _gradients(model, x, loss, disable=False)
    true = _gradients(model, x, loss, disable=True)
    return list(zip(saving, true, strict=True))


def _gradients(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], *, disable: bool
) -> list[Tensor | None]:
    """Gradients of ``loss`` for all parameters, with the wrappers on or off."""
    copied = copy.deepcopy(model)
    copied.zero_grad()
    for part in copied.modules():
        if isinstance(part, InvertibleModuleWrapper):
            part.disable = disable
    # a clone: a wrapper frees the storage of its input
    loss(copied(x.clone())).backward()
    return [parameter.grad for parameter in copied.parameters()]

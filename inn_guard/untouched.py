"""untouched(model): whatever happens inside the block, the model comes out bit for bit as it went in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["changed_state", "untouched"]

_TORCH_OWNED = frozenset({"_parameters", "_buffers", "_modules"})


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore, also after an error, everything that a call of ``model`` can change.

    Parameters and buffers (values and identity), ``.grad``, ``requires_grad``, training flags module by module,
    plain attributes of every module (flags and caches that libraries keep outside the state_dict), and the random
    number generators of torch (CPU and every initialised CUDA device), numpy and python.
    """
    modules = [_Module(module) for module in model.modules()]
    tensors = [_Leaf(tensor) for tensor in _tensors(model)]
    generators = _Generators()
    try:
        yield
    finally:
        for module in modules:
            module.restore()
        for tensor in tensors:
            tensor.restore()
        generators.restore()


@contextmanager
def changed_state(model: nn.Module) -> Iterator[list[str]]:
    """Names of the parameters and buffers that differ at the end of the block; the list is filled on leaving it."""
    before = {name: tensor.detach().clone() for name, tensor in _named_tensors(model)}
    changed: list[str] = []
    yield changed
    after = dict(_named_tensors(model))
    changed += [name for name, old in before.items() if name not in after or not _identical(old, after[name])]
    changed += [name for name in after if name not in before]


class _Module:
    """One module's registries, training flag and plain attributes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.registries = {key: dict(vars(module)[key]) for key in _TORCH_OWNED}
        self.attributes = {key: _shallow(value) for key, value in vars(module).items() if key not in _TORCH_OWNED}
        self.objects = [
            (value, {key: _shallow(inner) for key, inner in vars(value).items()})
            for value in self.attributes.values()
            if _is_plain_object(value)
        ]

    def restore(self) -> None:
        state = vars(self.module)
        for key, entries in self.registries.items():
            _refill(state[key], entries)
        for key in [key for key in state if key not in _TORCH_OWNED and key not in self.attributes]:
            del state[key]
        for key, saved in self.attributes.items():
            state[key] = _restored(saved)
        for owner, saved_vars in self.objects:
            vars(owner).clear()
            vars(owner).update({key: _restored(saved) for key, saved in saved_vars.items()})


class _Container:
    """A list, dict or set attribute: the object itself and what was in it."""

    def __init__(self, container: Any) -> None:
        self.container, self.content = container, container.copy()

    def restore(self) -> Any:
        if isinstance(self.container, list):
            self.container[:] = self.content
        elif self.container != self.content:
            self.container.clear()
            self.container.update(self.content)
        return self.container


class _Leaf:
    """One tensor: its values, its gradient and whether it wants one."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.wants_grad = tensor, tensor.requires_grad
        self.value = tensor.detach().clone()
        self.data = tensor.data
        self.grad = tensor.grad if tensor.is_leaf else None
        self.grad_value = None if self.grad is None else self.grad.detach().clone()

    def restore(self) -> None:
        if self.tensor.data_ptr() != self.data.data_ptr() or self.tensor.shape != self.data.shape:
            self.tensor.data = self.data
        if not _identical(self.tensor.detach(), self.value):
            with torch.no_grad():
                self.tensor.detach().copy_(self.value)
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self.wants_grad)
            if self.grad is not None and self.grad_value is not None and not _identical(self.grad, self.grad_value):
                self.grad.detach().copy_(self.grad_value)
            self.tensor.grad = self.grad


class _Generators:
    """The global random number generators."""

    def __init__(self) -> None:
        self.torch, self.numpy, self.python = torch.get_rng_state(), np.random.get_state(), random.getstate()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _tensors(model: nn.Module) -> list[Tensor]:
    plain = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    unique = {id(tensor): tensor for tensor in [*(tensor for _, tensor in _named_tensors(model)), *plain]}
    return list(unique.values())


def _identical(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN equal to NaN."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.is_meta or torch.equal(a, b):
        return True
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _is_plain_object(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type)) and not callable(value)


def _shallow(value: Any) -> Any:
    return _Container(value) if type(value) in (list, dict, set) else value


def _restored(saved: Any) -> Any:
    return saved.restore() if isinstance(saved, _Container) else saved


def _refill(registry: Any, entries: dict[str, Any]) -> None:
    if list(registry.items()) != list(entries.items()):
        registry.clear()
        registry.update(entries)

"""untouched(model): whatever happens inside the block, the model comes out bit for bit as it went in."""

from __future__ import annotations

import collections
import operator
import random
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["changed_state", "preserve_state"]

Restore = Callable[[], None]

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, dict, set, collections.deque, bytearray)
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_EXACT_ATOMS = frozenset(
    _ATOMS
)  #: most values are of these very types, which is asked faster than isinstance
_EXACT_CONTAINERS = frozenset((*_CONTAINERS, collections.OrderedDict))
_TURNS = threading.RLock()
_DEPTH = 3  #: how far plain objects inside plain attributes are followed
_INTEGER_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Restore, also after an error, everything that a call of ``model`` can change.

    Parameters and buffers (values and identity), ``.grad``, ``requires_grad``, training flags module by module, plain
    attributes of every module with the containers, tensors, generators and objects in them (flags and caches that
    libraries keep outside the state_dict, hooks, modules in lists), and the global random number generators of torch
    (CPU and every initialised CUDA device), numpy and python.

    What did not change is not written to: graphs that the caller holds stay valid. Blocks of several threads take
    turns: modules and the random number generators are theirs in common, and each would restore the other's changes.
    """
    with _TURNS:
        restorations = [_global_generators(), *_snapshots(model)]
        try:
            yield
        finally:
            # tensors and objects before the modules that hold them, and these before the random number generators
            _restored(reversed(restorations))


def _restored(restorations: Iterator[Restore]) -> None:
    """All of them, also if one raises."""
    failures = []
    for restore in restorations:
        try:
            restore()
        except Exception as failure:  # whatever it is, the others come first
            failures.append(failure)
    if failures:
        raise failures[0]


@contextmanager
def changed_state(model: nn.Module) -> Iterator[list[str]]:
    """Names of the parameters and buffers that differ at the end of the block; the list is filled on leaving it."""
    before = {name: tensor.detach().clone() for name, tensor in _named_tensors(model)}
    changed: list[str] = []
    yield changed
    after = dict(_named_tensors(model))
    changed += [
        name
        for name, old in before.items()
        if name not in after or not _identical(old, after[name])
    ]
    changed += [name for name in after if name not in before]


def _snapshots(model: nn.Module) -> Iterator[Restore]:
    """One restoration for each thing that is reachable from the model and can change."""
    seen: set[int] = set()
    empty: list[Any] = []  # most containers: every module has a dozen empty registries of hooks
    stack: list[tuple[Any, int]] = [(model, 0)]
    while stack:
        value, depth = stack.pop()
        kind = type(value)
        if kind in _EXACT_ATOMS:
            continue
        if kind in _EXACT_CONTAINERS and not value:
            empty.append(value)
            continue
        if isinstance(value, _ATOMS) or id(value) in seen or isinstance(value, _OPAQUE):
            continue
        seen.add(id(value))
        if isinstance(value, _CONTAINERS) and len(value) == 0:
            empty.append(value)
            continue
        inside, restore = _taken(value, depth)
        stack += inside
        if restore is not None:
            yield restore
    yield lambda: _emptied(empty)


def _emptied(containers: list[Any]) -> None:
    for container in containers:
        if len(container):
            container.clear()


def _taken(value: Any, depth: int) -> tuple[list[tuple[Any, int]], Restore | None]:
    """What lies inside ``value``, and how to restore ``value`` itself."""
    if isinstance(value, Tensor):
        return [], _tensor(value)
    if isinstance(value, nn.Module):
        parts = [part for key in _REGISTRIES for part in dict(vars(value)[key]).values()]
        plain = [
            part
            for key, part in vars(value).items()
            if type(part) not in _EXACT_ATOMS and key not in _REGISTRIES
        ]
        return [(part, 0) for part in parts] + [(part, 1) for part in plain], _module(value)
    if isinstance(value, tuple):
        return [(part, depth) for part in value], None
    if isinstance(value, _CONTAINERS):
        parts = (
            []
            if isinstance(value, bytearray)
            else list(value.values() if isinstance(value, dict) else value)
        )
        return [(part, depth) for part in parts], _container(value)
    if isinstance(
        value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    ):
        return [], _generator(value)
    if isinstance(value, np.ndarray):
        return [], _array(value)
    if depth < _DEPTH and isinstance(getattr(value, "__dict__", None), dict):
        return [(part, depth + 1) for part in vars(value).values()], _attributes(vars(value))
    return [], None


def _module(module: nn.Module) -> Restore:
    state = vars(module)
    # a scripted module keeps its tensors in C++, behind registries that are views
    registries = [
        (state[key], _container(state[key]))
        for key in _REGISTRIES
        if isinstance(state.get(key), dict)
    ]
    attributes = _attributes(state)

    def restore() -> None:
        attributes()
        for _, refill in registries:
            refill()

    return restore


def _attributes(state: dict[str, Any]) -> Restore:
    """Restore which names an object has and what they point to."""
    saved = dict(state)

    def restore() -> None:
        if _same_content(state, saved):
            return
        for name in [name for name in state if name not in saved]:
            del state[name]
        for name, value in saved.items():
            if name not in state or state[name] is not value:
                state[name] = value

    return restore


def _container(container: Any) -> Restore:
    content = container.copy()

    def restore() -> None:
        if _same_content(container, content):
            return
        if isinstance(container, (list, bytearray)):
            container[:] = content
            return
        container.clear()
        container.extend(content) if isinstance(container, collections.deque) else container.update(
            content
        )

    return restore


def _same_content(now: Any, before: Any) -> bool:
    if len(now) != len(before) or isinstance(now, (set, bytearray)):
        return bool(now == before)
    if isinstance(now, dict):
        return all(map(operator.is_, now, before)) and all(
            map(operator.is_, now.values(), before.values())
        )
    return all(map(operator.is_, now, before))


def _tensor(tensor: Tensor) -> Restore:
    """Restore one tensor: its memory, its values, its gradient and whether it wants one."""
    restore_values = _values(tensor)
    if not tensor.is_leaf:
        return restore_values
    wants_grad, grad = tensor.requires_grad, tensor.grad
    restore_grad = None if grad is None else _values(grad)

    def restore() -> None:
        restore_values()
        if tensor.requires_grad != wants_grad:
            tensor.requires_grad_(wants_grad)
        if restore_grad is not None:
            restore_grad()
        if tensor.grad is not grad:
            tensor.grad = grad

    return restore


def _values(tensor: Tensor) -> Restore:
    memory, value = tensor.data, tensor.detach().clone()

    def restore() -> None:
        if not _same_memory(tensor, memory):
            tensor.data = memory
        if not _identical(tensor.detach(), value):
            with torch.no_grad():
                tensor.detach().copy_(value)

    return restore


def _same_memory(tensor: Tensor, memory: Tensor) -> bool:
    if (
        tensor.shape != memory.shape
        or tensor.dtype != memory.dtype
        or tensor.layout != memory.layout
    ):
        return False
    return tensor.layout != torch.strided or tensor.data_ptr() == memory.data_ptr()


def _array(array: np.ndarray) -> Restore:
    value = array.copy()

    def restore() -> None:
        if array.tobytes() != value.tobytes():
            array[...] = value

    return restore


def _generator(generator: Any) -> Restore:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: _put_back(generator, state)
    if isinstance(generator, np.random.Generator):
        numpy_state = generator.bit_generator.state
        return lambda: setattr(generator.bit_generator, "state", numpy_state)
    if isinstance(generator, np.random.RandomState):
        legacy_state = generator.get_state()
        return lambda: generator.set_state(legacy_state)
    python_state = generator.getstate()
    return lambda: generator.setstate(python_state)


def _put_back(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _global_generators() -> Restore:
    """The global random number generators."""
    cpu, legacy, python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        np.random.set_state(legacy)
        random.setstate(python)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return restore


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _identical(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: NaN equals the same NaN, and -0 is not 0."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.is_meta or a.numel() == 0:
        return True
    if a.layout != torch.strided:
        return torch.equal(a.to_dense(), b.to_dense())
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    return torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    return t.view(_INTEGER_OF[t.element_size()]) if t.is_floating_point() else t

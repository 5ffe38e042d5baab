"""What a repeated evaluation of a layer must find again: modes, randomness, buffers, autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from inn_guard.core.random import generator_of_device

__all__ = ["Autocast", "Modules", "RandomAndBufferState", "hooks_suspended"]


@dataclass(frozen=True)
class Autocast:
    """The autocast state of the CPU and of one more device.

    Attributes:
        dtypes: device type -> the dtype that autocast uses there; None: it is off.
    """

    dtypes: dict[str, torch.dtype | None]

    @classmethod
    def current(cls, like: Tensor) -> Autocast:
        """The present state, for the CPU and the device of ``like``."""
        dtypes: dict[str, torch.dtype | None] = {}
        for device in sorted({"cpu", like.device.type}):
            dtypes[device] = None
            if torch.is_autocast_enabled(device):
                dtypes[device] = torch.get_autocast_dtype(device)
        return cls(dtypes)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A block with this state, without the cache of cast weights.

        A weight that is cast under no_grad and cached would have no gradient in a later pass.
        """
        with ExitStack() as stack:
            for device, dtype in self.dtypes.items():
                if dtype is None:
                    stack.enter_context(torch.autocast(device, enabled=False))
                else:
                    stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
            yield


class Modules:
    """The training modes and the parameters of modules at the moment of construction.

    Args:
        modules: the modules; their submodules are included.

    Attributes:
        cache_parametrizations: whether ``parametrize.cached()`` is active and applies to one.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parts = _all_parts(modules)
        self._modes = [(part, part.training) for part in parts]
        self._parameters: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        for part in parts:
            for name, parameter in part._parameters.items():
                self._parameters.append((part, name, parameter))
        self.cache_parametrizations = False
        if parametrize._cache_enabled:
            self.cache_parametrizations = any(map(parametrize.is_parametrized, parts))

    @contextmanager
    def restored_modes(self) -> Iterator[None]:
        """A block in which every module is in the training mode that it had."""
        switched = []
        for module, training in self._modes:
            if module.training != training:
                switched.append((module, training))
        try:
            for module, training in switched:
                module.training = training
            yield
        finally:
            for module, training in switched:
                module.training = not training

    def constants(self) -> list[Tensor]:
        """The buffers that no evaluation changes: those of modules in evaluation mode."""
        found: list[Tensor] = []
        for module, training in self._modes:
            if not training:
                found += dict(_buffers_of(module)).values()
        return found

    def check_parameters(self) -> None:
        """Check that every module still has the same parameters.

        Raises:
            RuntimeError: if one has been replaced.
        """
        for module, name, parameter in self._parameters:
            if module._parameters.get(name) is not parameter:
                raise RuntimeError(
                    f"expected the parameter {name!r} of {type(module).__name__} of the forward "
                    "pass, got another one, as torch.func.functional_call puts it there: call the "
                    "model itself there"
                )


class RandomAndBufferState:
    """The state that a layer reads and writes in addition to its parameters and its input.

    It consists of random number generators (the global ones of torch and numpy, and every
    ``torch.Generator`` that a module of the layer has as an attribute) and of the buffers of
    modules in training mode.

    Args:
        layer: the layer, about to be evaluated.
        like: a tensor on the device of the evaluation.
        previous: the state of the evaluation just before this one, after its ``changed()``. The
            global generators have not moved since.
    """

    def __init__(
        self, layer: nn.Module, like: Tensor, previous: RandomAndBufferState | None = None
    ) -> None:
        modules = list(layer.modules())
        known: Sequence[Any] = ()
        if previous is not None:
            known = previous._after
        self._random = _Random(modules, like)
        self._states = self._random.states(known)
        self._after: list[Any] = []
        self._buffers = _Buffers(modules)
        self._random_used = self._buffers_used = False

    def changed(self) -> bool:
        """Whether the evaluation has drawn random numbers or written buffers."""
        now = self._random.states()
        self._after = now[: len(_GLOBAL)]
        self._random_used = not self._random.same(self._states, now)
        self._buffers_used = self._buffers.changed()
        return self._random_used or self._buffers_used

    def rewind(self) -> None:
        """Go back to the recorded state."""
        self._random.go_to(self._states)
        self._buffers.rewind()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A block with the recorded state. What it draws and writes is undone at its end."""
        with ExitStack() as stack:
            if self._random_used:
                stack.enter_context(self._random.set_to(self._states))
            if self._buffers_used:
                stack.enter_context(self._buffers.swapped_in())
            yield


@contextmanager
def hooks_suspended(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A block in which the hooks of the tensors do not run.

    They are meant for the whole gradient of a tensor, not for each of its parts.
    """
    suspended = []
    for tensor in tensors:
        hooks = tensor._backward_hooks  # type: ignore[attr-defined]
        if hooks:
            suspended.append((hooks, dict(hooks)))
    try:
        for hooks, _ in suspended:
            hooks.clear()
        yield
    finally:
        for hooks, content in suspended:
            hooks.update(content)


class _Source(NamedTuple):
    """One generator of random numbers."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]
    same: Callable[[Any, Any], bool]


def _same_numpy(a: Any, b: Any) -> bool:
    return a[2:] == b[2:] and np.array_equal(a[1], b[1])


_GLOBAL = (
    _Source(torch.get_rng_state, torch.set_rng_state, torch.equal),
    _Source(np.random.get_state, np.random.set_state, _same_numpy),
)


class _Random:
    """The generators from which a layer may draw, the global ones of the CPU first."""

    def __init__(self, modules: list[nn.Module], like: Tensor) -> None:
        own: dict[int, _Source] = {}
        for module in modules:
            for value in vars(module).values():
                if type(value) is torch.Generator:
                    own[id(value)] = _Source(value.get_state, value.set_state, torch.equal)
        self._sources = [*_GLOBAL, *own.values()]
        holder = generator_of_device(like.device)
        if holder is not None:
            self._sources.append(_of_device(holder, like.device))

    def states(self, known: Sequence[Any] = ()) -> list[Any]:
        """The states of all generators; those of the first ones may be known already."""
        return [*known, *(source.get() for source in self._sources[len(known) :])]

    def same(self, states: list[Any], others: list[Any]) -> bool:
        """Whether all generators are in the same state in both lists."""
        for source, state, other in zip(self._sources, states, others, strict=True):
            if not source.same(state, other):
                return False
        return True

    @contextmanager
    def set_to(self, states: list[Any]) -> Iterator[None]:
        """A block that starts with these states."""
        before = self.states()
        try:
            self.go_to(states)
            yield
        finally:
            self.go_to(before)

    def go_to(self, states: list[Any]) -> None:
        """Set the generators to these states."""
        for source, state in zip(self._sources, states, strict=True):
            source.set(state)


def _of_device(holder: Any, device: torch.device) -> _Source:
    read = functools.partial(holder.get_rng_state, device)
    return _Source(read, lambda state: holder.set_rng_state(state, device), torch.equal)


class _Buffers:
    """The buffers of modules in training mode, and a copy of their values.

    A module that has set its own parameters since then (initialisation from the data) counts as
    unchanged: it has to be repeated with the buffers that say so.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._live: list[tuple[nn.Module, str]] = []
        self._values: list[Tensor] = []
        for module in modules:
            if not module.training:
                continue
            for name, buffer in _buffers_of(module):
                self._live.append((module, name))
                self._values.append(buffer.detach().clone())
        self._versions = self._parameter_versions()

    def changed(self) -> bool:
        """Whether a buffer has other values now."""
        if self._versions != self._parameter_versions():
            return False
        for (module, name), value in zip(self._live, self._values, strict=True):
            now = module._buffers[name]
            if now is None or not torch.equal(now, value):
                return True
        return False

    @torch.no_grad()
    def rewind(self) -> None:
        """Give the buffers their recorded values."""
        for (module, name), value in zip(self._live, self._values, strict=True):
            now = module._buffers[name]
            if now is None or now.shape != value.shape:
                module._buffers[name] = value.clone()
            else:
                now.copy_(value)

    def _parameter_versions(self) -> list[tuple[int, int]]:
        owners = {id(module): module for module, _ in self._live}
        versions = []
        for module in owners.values():
            for parameter in module._parameters.values():
                if parameter is not None:
                    versions.append((parameter._version, parameter.data_ptr()))
        return versions

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """A block in which copies of the recorded values take the place of the buffers."""
        # the versions of the buffers, which other graphs have saved, stay as they are
        now = [module._buffers[name] for module, name in self._live]
        try:
            for (module, name), value in zip(self._live, self._values, strict=True):
                module._buffers[name] = value.clone()
            yield
        finally:
            for (module, name), buffer in zip(self._live, now, strict=True):
                module._buffers[name] = buffer


def _all_parts(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules and all their submodules, each one once."""
    parts: dict[int, nn.Module] = {}
    for module in modules:
        for part in module.modules():
            parts[id(part)] = part
    return list(parts.values())


def _buffers_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    found = []
    for name, buffer in module._buffers.items():
        if buffer is not None:
            found.append((name, buffer))
    return found

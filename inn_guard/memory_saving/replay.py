"""What a layer's second evaluation must find as the first one did: modes, randomness, running statistics, autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Autocast", "Modules", "RandomAndBufferState", "hooks_suspended"]


@dataclass(frozen=True)
class Autocast:
    """Whether and how a block of code casts, for the CPU and for the device of a tensor."""

    dtypes: dict[str, torch.dtype | None]

    @classmethod
    def current(cls, like: Tensor) -> Autocast:
        """The state at this moment; None stands for off."""
        return cls(
            {device: _autocast_dtype(device) for device in sorted({"cpu", like.device.type})}
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The recorded state, without the cache of cast weights.

        A weight cast under no_grad and kept in that cache would have no gradient in a pass with gradients.
        """
        with ExitStack() as stack:
            for device, dtype in self.dtypes.items():
                stack.enter_context(_autocast(device, dtype))
            yield


class Modules:
    """All modules of a walk as they are at this moment.

    Args:
        modules: each with its submodules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parts = {id(part): part for module in modules for part in module.modules()}.values()
        self._modes = [(part, part.training) for part in parts]
        self._parameters = [
            (part, name, parameter)
            for part in parts
            for name, parameter in part._parameters.items()
        ]
        self.parametrized = (
            any(map(parametrize.is_parametrized, parts)) if parametrize._cache_enabled else False
        )

    @contextmanager
    def in_their_modes(self) -> Iterator[None]:
        """A block in which those train that did, and no others."""
        switched = [
            (module, training) for module, training in self._modes if module.training != training
        ]
        try:
            for module, training in switched:
                module.training = training
            yield
        finally:
            for module, training in switched:
                module.training = not training

    def constants(self) -> list[Tensor]:
        """The buffers that no evaluation moves: those of modules in evaluation mode."""
        resting = [module for module, training in self._modes if not training]
        return [
            buffer
            for module in resting
            for buffer in module._buffers.values()
            if buffer is not None
        ]

    def check_parameters(self) -> None:
        """Refuse other parameters than those that there were.

        Raises:
            RuntimeError: if one has been exchanged.
        """
        for module, name, parameter in self._parameters:
            if module._parameters.get(name) is not parameter:
                raise RuntimeError(
                    f"the parameter {name!r} of {type(module).__name__} is another one than in the forward pass, as it "
                    "is where torch.func.functional_call has exchanged it: use the model itself there"
                )


class RandomAndBufferState:
    """The state outside a layer's parameters and input that its evaluation reads and writes, recorded before it.

    These are the random number generators (the global ones of torch and numpy, and every ``torch.Generator``
    that a module of the layer has as an attribute) and the buffers of modules in training mode.

    Args:
        layer: what is about to be evaluated.
        like: a tensor on the device of the evaluation.
        previous: those of the evaluation right before this one, which have been asked whether they changed.
    """

    def __init__(
        self, layer: nn.Module, like: Tensor, previous: RandomAndBufferState | None = None
    ) -> None:
        modules = list(layer.modules())
        self._random = _Random(modules, like)
        self._states = self._random.states(() if previous is None else previous._after)
        self._after: list[Any] = []
        self._buffers = _Buffers(modules)
        self._random_used = self._buffers_used = False

    def changed(self) -> bool:
        """Whether the evaluation since then has drawn randomness or written buffers, so that repeating it differs."""
        now = self._random.states()
        self._after = now[: len(_GLOBAL)]
        self._random_used = not self._random.same(self._states, now)
        self._buffers_used = self._buffers.changed()
        return self._random_used or self._buffers_used

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The recorded state; whatever the block draws or writes leaves no trace."""
        drawn = self._random.set_to(self._states) if self._random_used else nullcontext()
        buffers = self._buffers.swapped_in() if self._buffers_used else nullcontext()
        with drawn, buffers:
            yield


@contextmanager
def hooks_suspended(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A block in which hooks on the tensors do not run: they are for the whole gradient, not for each part of it."""
    running = [hooks for tensor in tensors if (hooks := tensor._backward_hooks)]  # type: ignore[attr-defined]
    saved = [dict(hooks) for hooks in running]
    try:
        for hooks in running:
            hooks.clear()
        yield
    finally:
        for hooks, content in zip(running, saved, strict=True):
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
    """The generators that a layer may draw from."""

    def __init__(self, modules: list[nn.Module], like: Tensor) -> None:
        found = [
            value
            for module in modules
            for value in vars(module).values()
            if type(value) is torch.Generator
        ]
        own = {
            id(generator): _Source(generator.get_state, generator.set_state, torch.equal)
            for generator in found
        }
        self._sources = [
            *_GLOBAL,
            *own.values(),
            *([_of_device(like.device)] if like.is_cuda else []),
        ]

    def states(self, known: Sequence[Any] = ()) -> list[Any]:
        return [*known, *(source.get() for source in self._sources[len(known) :])]

    def same(self, states: list[Any], others: list[Any]) -> bool:
        return all(
            source.same(*pair) for source, *pair in zip(self._sources, states, others, strict=True)
        )

    @contextmanager
    def set_to(self, states: list[Any]) -> Iterator[None]:
        before = self.states()
        try:
            self._set(states)
            yield
        finally:
            self._set(before)

    def _set(self, states: list[Any]) -> None:
        for source, state in zip(self._sources, states, strict=True):
            source.set(state)


def _of_device(device: torch.device) -> _Source:
    read = functools.partial(torch.cuda.get_rng_state, device)
    return _Source(read, lambda state: torch.cuda.set_rng_state(state, device), torch.equal)


class _Buffers:
    """The buffers of modules in training mode, and a copy of their values.

    A module that has set its own parameters since (initialisation from data) counts as unchanged: it is to be repeated
    with the buffers that say so.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._live = [
            (module, name, buffer)
            for module in modules
            if module.training
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._values = [buffer.detach().clone() for _, _, buffer in self._live]
        self._versions = self._parameter_versions()

    def changed(self) -> bool:
        now = (module._buffers[name] for module, name, _ in self._live)
        same = all(
            new is not None and torch.equal(new, old)
            for new, old in zip(now, self._values, strict=True)
        )
        return not same and self._versions == self._parameter_versions()

    def _parameter_versions(self) -> list[tuple[int, int]]:
        owners = {id(module): module for module, _, _ in self._live}.values()
        parameters = [p for module in owners for p in module._parameters.values() if p is not None]
        return [(parameter._version, parameter.data_ptr()) for parameter in parameters]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        # copies take the place of the buffers, so that their versions, which other graphs rely on, do not move
        now = [module._buffers[name] for module, name, _ in self._live]
        try:
            for (module, name, _), value in zip(self._live, self._values, strict=True):
                module._buffers[name] = value.clone()
            yield
        finally:
            for (module, name, _), buffer in zip(self._live, now, strict=True):
                module._buffers[name] = buffer


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _autocast(device: str, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    if dtype is None:
        return torch.autocast(device, enabled=False)
    return torch.autocast(device, dtype=dtype, cache_enabled=False)

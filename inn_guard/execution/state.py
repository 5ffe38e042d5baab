"""preserve_state(model): the model and the process leave a block bit for bit as they entered it."""

from __future__ import annotations

import collections
import contextlib
import functools
import operator
import os
import random
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from inn_guard.core.random import generator_of_device

__all__ = [
    "StateSnapshot",
    "changed_state",
    "preserve_state",
    "real_default_device",
    "without_autocast",
]

Restore = Callable[[], None]
Found = list[tuple[Any, int]]  #: values still to be looked into, each with its depth

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, dict, set, collections.deque, bytearray)
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
# most values are of exactly these types, and a look into a set is faster than isinstance
_EXACT_ATOMS = frozenset(_ATOMS)
_EXACT_CONTAINERS = frozenset((*_CONTAINERS, collections.OrderedDict))
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_ONE_AT_A_TIME = threading.RLock()
_DEPTH = 3  #: how far plain objects inside plain attributes are followed
CUDNN = ("enabled", "benchmark", "deterministic", "allow_tf32")
_SDP = torch.backends.cuda
ATTENTION = (
    (_SDP.flash_sdp_enabled, _SDP.enable_flash_sdp),
    (_SDP.mem_efficient_sdp_enabled, _SDP.enable_mem_efficient_sdp),
    (_SDP.math_sdp_enabled, _SDP.enable_math_sdp),
)
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[Restore]:
    """Restore, also after an error, everything that a call of ``model`` can change.

    The block gets a function that restores the model at once, for a call that was broken off in
    the middle: it leaves the process as it is, and parameters and buffers to which nothing was
    written.

    Of the model: parameters and buffers (values, identity, version), ``.grad``, ``requires_grad``,
    the training flag of every module, and the plain attributes of every module: hooks, flags,
    modules in lists, caches (such as the keys and values of a transformer), generators, and the
    containers, arrays and objects in them.

    Of the process: the global random number generators of torch (CPU and every initialised CUDA
    device), numpy and Python; environment variables; warning filters; the number of threads, the
    default dtype and device, the grad mode, the anomaly mode, the determinism, the float32
    precision and the switches of cuDNN and of attention of torch; the error handling of numpy.

    A tensor that did not change is not written to. One that did gets its values and its version
    back, so that graphs that the caller holds can still be differentiated.

    Not restored: objects nested more than three levels deep in plain attributes, objects with
    ``__slots__`` or with state in C++, variables of closures and of Python modules, files.

    Blocks of several threads run one at a time: they share the modules and the process, and each
    would revert the changes of the others.
    """
    with _ONE_AT_A_TIME, StateSnapshot(model).preserved() as restore:
        yield restore


class StateSnapshot:
    """What calls of ``model`` can change, as it is now, for any number of blocks.

    A snapshot looks at every tensor and attribute of the model. An audit takes one for all its
    checks.
    """

    # without a dictionary: a snapshot of what refers to this one must not look inside
    __slots__ = ("_of_model",)

    def __init__(self, model: nn.Module) -> None:
        with _ONE_AT_A_TIME:
            # checks of types at run time draw random numbers
            generators = _global_generators()
            self._of_model = list(_snapshots(model))
            generators()

    @contextmanager
    def preserved(self) -> Iterator[Restore]:
        """A block after which the model is that of the snapshot, and the process as before.

        Else as `preserve_state`.
        """
        with _ONE_AT_A_TIME:
            of_process = [_global_generators(), *_process_settings()]
            try:
                yield self.restore_written
            finally:
                # in reverse: the content of modules, the modules, last what restoring itself uses
                _restore_all(reversed([*of_process, *self._of_model]))

    def restore(self) -> None:
        """Restore the model."""
        _restore_all(reversed(self._of_model))

    def restore_written(self) -> None:
        """Restore the model, without a look at tensors to which no operation has written."""
        _restore_all(map(_if_written, reversed(self._of_model)))


@contextmanager
def real_default_device() -> Iterator[None]:
    """New tensors have numbers inside, also under ``torch.device("meta")``."""
    if not torch.empty(0).is_meta:  # torch 2.6 has no other way to see a ``with torch.device``
        yield
        return
    with torch.device("cpu"):
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast of the caller is off.

    Weights that a pass without a graph has cast stay in its cache, and have no gradient there.
    """
    accelerator = _accelerator()
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    with contextlib.ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def changed_state(model: nn.Module) -> Iterator[list[str]]:
    """The names of the parameters and buffers that the block changes; filled in at its end."""
    before = {name: tensor.detach().clone() for name, tensor in _named_tensors(model)}
    changed: list[str] = []
    yield changed
    after = dict(_named_tensors(model))
    for name, old in before.items():
        if name not in after or not _identical(old, after[name]):
            changed.append(name)
    changed += [name for name in after if name not in before]


def _restore_all(restorations: Iterator[Restore]) -> None:
    failures = []
    for restore in restorations:
        try:
            restore()
        except Exception as failure:  # the other restorations must still run
            failures.append(failure)
    if failures:
        raise failures[0]


def _snapshots(model: nn.Module) -> Iterator[Restore]:
    """One restoration for each object that is reachable from the model and can change."""
    seen: set[int] = set()
    empty: list[Any] = []  # most containers: every module has a dozen empty registries of hooks
    stack: Found = [(model, 0)]
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
        if isinstance(value, nn.Module):
            stack += _inside_module(value)
            yield _Attributes(vars(value))
            for key in _REGISTRIES:
                registry = vars(value).get(key)
                # those of a scripted module are views of tensors in C++, which cannot be exchanged
                if isinstance(registry, dict):
                    yield _Container(registry)
            continue
        inside, restore = _snapshot(value, depth)
        stack += inside
        if restore is not None:
            yield restore
    yield lambda: _clear(empty)


def _clear(containers: list[Any]) -> None:
    for container in containers:
        if len(container):
            container.clear()


def _snapshot(value: Any, depth: int) -> tuple[Found, Restore | None]:
    """What lies inside ``value``, and how to restore ``value`` itself."""
    if isinstance(value, Tensor):
        return [], _TensorState(value)
    if isinstance(value, tuple):
        return [(item, depth) for item in value], None
    if isinstance(value, bytearray):
        return [], _Container(value)
    if isinstance(value, dict):
        return [(item, depth) for item in value.values()], _Container(value)
    if isinstance(value, _CONTAINERS):
        return [(item, depth) for item in value], _Container(value)
    if isinstance(value, _GENERATORS):
        return [], _generator(value)
    if isinstance(value, np.ndarray):
        return [], _array(value)
    if depth < _DEPTH and isinstance(getattr(value, "__dict__", None), dict):
        state = vars(value)
        return [(item, depth + 1) for item in state.values()], _Attributes(state)
    return [], None


def _inside_module(module: nn.Module) -> Found:
    state = vars(module)
    inside: Found = []
    for key in _REGISTRIES:
        # a scripted module has views here, which only dict() can read
        inside += [(item, 0) for item in dict(state[key]).values()]
    for key, value in state.items():
        if type(value) not in _EXACT_ATOMS and key not in _REGISTRIES:
            inside.append((value, 1))
    return inside


class _Attributes:
    """Restores the names of an object's attributes and what they refer to."""

    # thousands of these are kept at once: slots, for the garbage collector's sake
    __slots__ = ("_saved", "_state")

    def __init__(self, state: dict[str, Any]) -> None:
        self._state, self._saved = state, dict(state)

    def __call__(self) -> None:
        state, saved = self._state, self._saved
        if _same_content(state, saved):
            return
        for name in state.keys() - saved.keys():
            del state[name]
        for name, value in saved.items():
            if name not in state or state[name] is not value:
                state[name] = value


class _Container:
    """Restores what a list, dictionary, set or queue holds."""

    __slots__ = ("_container", "_content")

    def __init__(self, container: Any) -> None:
        self._container, self._content = container, container.copy()

    def __call__(self) -> None:
        container, content = self._container, self._content
        if _same_content(container, content):
            return
        if isinstance(container, (list, bytearray)):
            container[:] = content
            return
        container.clear()
        if isinstance(container, collections.deque):
            container.extend(content)
        else:
            container.update(content)


def _same_content(now: Any, before: Any) -> bool:
    """Whether both have the same items in the same order, compared by identity."""
    if len(now) != len(before) or isinstance(now, (set, bytearray)):
        return bool(now == before)
    if not all(map(operator.is_, now, before)):
        return False
    if isinstance(now, dict):
        return all(map(operator.is_, now.values(), before.values()))
    return True


class _TensorState:
    """Restores one tensor: its values, its gradient and whether it requires one."""

    __slots__ = ("grad", "requires_grad", "tensor", "values")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.values = [_Values(tensor)]
        self.requires_grad = tensor.requires_grad
        self.grad = tensor.grad if tensor.is_leaf else None
        if self.grad is not None:
            self.values.append(_Values(self.grad))

    def __call__(self) -> None:
        for values in self.values:
            values()
        self._flags()

    def if_written(self) -> None:
        """The same without a comparison of all values where no operation was seen that writes."""
        for values in self.values:
            values.if_written()
        self._flags()

    def _flags(self) -> None:
        if not self.tensor.is_leaf:
            return
        if self.tensor.requires_grad != self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)
        if self.tensor.grad is not self.grad:
            self.tensor.grad = self.grad


class _Values:
    """Restores the values and the version of one tensor.

    The version is the counter by which autograd notices that a tensor has changed. The values come
    back bit for bit, so a graph that has saved the tensor is right again.
    """

    __slots__ = ("_bits", "_counter", "_memory", "_tensor", "_value", "_value_bits", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._memory, self._value = tensor, tensor.data, tensor.detach().clone()
        # views of both, made once: an audit compares them after every check
        self._bits, self._value_bits = _comparable(self._memory), _comparable(self._value)
        # an inference tensor has no version
        self._version = None if tensor.is_inference() else tensor._version
        self._counter = None
        if self._version is not None:
            self._counter = _unsafe_preserve_version_counter(tensor)

    def __call__(self) -> None:
        if not _same_memory(self._tensor, self._memory):
            self._tensor.data = self._memory
        if not self._is_unchanged():
            self._tensor.data.copy_(self._value)
        if self._counter is not None and self._tensor._version != self._version:
            self._counter.__exit__(None, None, None)

    def _is_unchanged(self) -> bool:
        """Whether the memory of the tensor holds the values that it held."""
        if self._bits is None or self._value_bits is None:
            return _identical(self._tensor.detach(), self._value)
        return torch.equal(self._bits, self._value_bits)

    def if_written(self) -> None:
        """The same without a comparison of all values where no operation was seen that writes."""
        unseen = self._version is not None and self._tensor._version == self._version
        if not (unseen and _same_memory(self._tensor, self._memory)):
            self()


def _if_written(restore: Restore) -> Restore:
    return getattr(restore, "if_written", restore)


def _same_memory(tensor: Tensor, memory: Tensor) -> bool:
    if tensor.shape != memory.shape or tensor.dtype != memory.dtype:
        return False
    if tensor.layout != memory.layout:
        return False
    return tensor.layout != torch.strided or tensor.data_ptr() == memory.data_ptr()


def _array(array: np.ndarray) -> Restore:
    value = array.copy()

    def restore() -> None:
        if array.tobytes() != value.tobytes():
            array[...] = value

    return restore


def _generator(generator: Any) -> Restore:
    if isinstance(generator, np.random.Generator):
        numpy_state = generator.bit_generator.state
        return lambda: setattr(generator.bit_generator, "state", numpy_state)
    if isinstance(generator, random.Random):
        python_state = generator.getstate()
        return lambda: generator.setstate(python_state)
    state = generator.get_state()

    def restore() -> None:
        generator.set_state(state)

    return restore


def _global_generators() -> Restore:
    cpu, legacy, python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    restore_accelerator = _generators_of_accelerator()

    def restore() -> None:
        torch.set_rng_state(cpu)
        np.random.set_state(legacy)
        random.setstate(python)
        restore_accelerator()

    return restore


def _generators_of_accelerator() -> Restore:
    """The restoration of the global generators of the GPUs, if they are in use."""
    accelerator = _accelerator()
    holder = None if accelerator is None else generator_of_device(accelerator)
    # asking a device that is not in use would start it, which takes memory and forbids forks
    if holder is None or not getattr(holder, "is_initialized", lambda: True)():
        return lambda: None
    if hasattr(holder, "get_rng_state_all"):
        return functools.partial(holder.set_rng_state_all, holder.get_rng_state_all())
    return functools.partial(holder.set_rng_state, holder.get_rng_state())


def _accelerator() -> torch.device | None:
    try:
        return torch.accelerator.current_accelerator()
    except RuntimeError:  # so says torch 2.6 that there is none; asking first would start CUDA
        return None


def _process_settings() -> list[Restore]:
    """Restorations of the settings of torch, numpy and Python that are global to the process."""
    return [
        _environment(),
        _warning_filters(),
        _setting(torch.get_num_threads, torch.set_num_threads),
        _setting(torch.get_default_dtype, torch.set_default_dtype),
        _setting(torch.get_default_device, _set_default_device),
        _setting(torch.is_grad_enabled, torch.set_grad_enabled),
        _setting(torch.is_anomaly_enabled, torch.set_anomaly_enabled),
        *(_switch(torch.backends.cudnn, name) for name in CUDNN),
        *(_setting(*switch) for switch in ATTENTION),
        _setting(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        _setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        _setting(np.geterr, lambda modes: np.seterr(**modes)),
    ]


def _switch(module: Any, name: str) -> Restore:
    return _setting(lambda: getattr(module, name), lambda value: setattr(module, name, value))


def _setting(get: Callable[[], Any], set_: Callable[[Any], Any]) -> Restore:
    before = get()

    def restore() -> None:
        if get() != before:
            set_(before)

    return restore


def _set_default_device(device: torch.device) -> None:
    # None is the CPU without the mode that torch otherwise runs around every operation
    if device.type == "cpu":
        torch.set_default_device(None)
    else:
        torch.set_default_device(device)


def _environment() -> Restore:
    before = dict(os.environ)

    def restore() -> None:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value

    return restore


def _warning_filters() -> Restore:
    filters, before, show = warnings.filters, list(warnings.filters), warnings.showwarning

    def restore() -> None:
        warnings.showwarning = show
        if warnings.filters is filters and list(filters) == before:
            return
        warnings.filters = filters  # type: ignore[misc]
        warnings.resetwarnings()  # tells the warnings that have been shown of the change
        filters[:] = before  # type: ignore[index]

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


def _comparable(t: Tensor) -> Tensor | None:
    """A view of the bits of a tensor with plain memory; None of any other."""
    if type(t) is not Tensor or t.layout != torch.strided or t.is_complex() or t.is_meta:
        return None
    if t.is_quantized or t.is_neg() or not t.numel():
        return None
    return _bits(t)


def _bits(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t
    return t.view(_INTEGER_OF_SIZE[t.element_size()])

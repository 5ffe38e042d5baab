"""A hash of everything that decides a model's map: classes, weights, attributes, functions."""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "weights_hash"]

#: libraries whose own code is not hashed: what of it is read is read again by a check
TRUSTED = frozenset(("torch", "numpy", "inn_guard", "builtins", "collections", "abc", "typing"))
#: attributes of a module that do not decide its map, or that the rules look at
IGNORED = frozenset(("training", "_version"))
#: members of a class that only describe it
DESCRIBING = frozenset(("__doc__", "__module__", "__qualname__", "__firstlineno__"))
DONE = b"."


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and bytes of a state dict, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(array.shape)} {array.dtype}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model: weights, plain attributes of all modules, functions by their code.

    The mode (train or eval), and floating-point tensors that are neither parameters nor buffers,
    are left out: libraries keep results of the last call in such.

    >>> net = nn.LeakyReLU(0.1)
    >>> before = fingerprint(net)
    >>> net.negative_slope = 0.2
    >>> fingerprint(net) == before
    False
    """
    walk = _Walk()
    walk.add(model)
    return walk.digest.hexdigest()


class _Walk:
    """Feeds a digest with values, each object once."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.seen: dict[int, int] = {}
        #: objects that stay alive as long as their ids are in use
        self.alive: list[Any] = []

    def add(self, value: Any) -> None:
        """Any value, by its contents."""
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            self._write("plain", repr(value))
        elif isinstance(value, (torch.dtype, torch.device, torch.Size, enum.Enum, range, slice)):
            self._write("constant", repr(value))
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, (np.ndarray, np.generic)):
            self._write("array", f"{value.dtype} {value.shape}")
            self.digest.update(np.ascontiguousarray(value).tobytes())
        elif id(value) in self.seen:
            self._write("again", str(self.seen[id(value)]))
        else:
            self.seen[id(value)] = len(self.seen)
            self.alive.append(value)
            self._object(value)
        self.digest.update(DONE)

    def _write(self, kind: str, text: str) -> None:
        self.digest.update(f"{kind}:{len(text)}:{text};".encode())

    def _tensor(self, value: Tensor) -> None:
        plain = value.detach().cpu().contiguous()
        self._write("tensor", f"{tuple(plain.shape)} {plain.dtype}")
        if plain.numel():
            self.digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())

    def _object(self, value: Any) -> None:
        for kind, feed in self._kinds():
            if isinstance(value, kind):
                feed(value)
                return
        self._instance(value)

    def _kinds(self) -> list[tuple[Any, Callable[[Any], None]]]:
        return [
            (nn.Module, self._module),
            (Mapping, self._mapping),
            ((list, tuple), self._sequence),
            ((set, frozenset), self._set),
            (functools.partial, self._partial),
            (types.MethodType, self._method),
            (types.FunctionType, self._function),
            (type, self._type),
            (types.CodeType, self._code),
        ]

    def _mapping(self, mapping: Mapping[Any, Any]) -> None:
        self._write("mapping", str(len(mapping)))
        for key, item in mapping.items():
            self.add(key)
            self.add(item)

    def _sequence(self, items: Sequence[Any]) -> None:
        self._write("sequence", str(len(items)))
        for item in items:
            self.add(item)

    def _set(self, members: set[Any]) -> None:
        hashes = []
        for member in members:
            walk = _Walk()
            walk.add(member)
            hashes.append(walk.digest.hexdigest())
        self._write("set", repr(sorted(hashes)))

    def _partial(self, partial: functools.partial[Any]) -> None:
        self._write("partial", "")
        self.add([partial.func, partial.args, dict(partial.keywords)])

    def _method(self, method: types.MethodType) -> None:
        self._write("method", method.__name__)
        self.add(method.__self__)
        self.add(method.__func__)

    def _module(self, module: nn.Module) -> None:
        self.add(type(module))
        attributes = vars(module)
        for name in ("_parameters", "_buffers", "_modules"):
            # their order may decide the map
            for key, part in attributes[name].items():
                self._write(name, key)
                self.add(part)
        self._attributes(module)

    def _attributes(self, owner: Any) -> None:
        is_ours = type(owner).__module__.startswith("inn_guard.")
        for name, value in sorted(getattr(owner, "__dict__", {}).items()):
            if name in IGNORED or name in ("_parameters", "_buffers", "_modules"):
                continue
            if value is None or (is_ours and name.startswith("_")):
                # what is not there yet, or kept by our own layers, are results of a call
                continue
            if "hooks" in name and isinstance(value, Mapping):
                value = list(value.values())
            if isinstance(value, Tensor) and value.is_floating_point() and not is_ours:
                continue
            self._write("attribute", name)
            self.add(value)

    def _type(self, kind: type) -> None:
        self._write("type", f"{kind.__module__}.{kind.__qualname__}")
        for base in kind.__mro__:
            if base.__module__.partition(".")[0] in TRUSTED:
                continue
            for name, value in sorted(vars(base).items()):
                decides = isinstance(value, (types.FunctionType, int, float, str))
                if decides and name not in DESCRIBING:
                    self._write("member", name)
                    self.add(value)

    def _function(self, function: types.FunctionType) -> None:
        self._write("function", function.__qualname__)
        if (function.__module__ or "").partition(".")[0] in TRUSTED:
            return
        self.add(function.__code__)
        self.add([function.__defaults__, function.__kwdefaults__])
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:
                self._write("cell", "empty")
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, (int, float, str, Tensor)):
                # numbers of the function's module
                self._write("global", name)
                self.add(value)

    def _code(self, code: types.CodeType) -> None:
        self._write("code", code.co_code.hex())
        self.add([code.co_names, code.co_varnames, code.co_consts])

    def _instance(self, value: Any) -> None:
        self.add(type(value))
        if isinstance(value, types.BuiltinFunctionType):
            self._write("builtin", value.__qualname__)
            return
        self._attributes(value)
        for name in getattr(type(value), "__slots__", ()):
            if hasattr(value, name) and isinstance(name, str):
                self._write("slot", name)
                self.add(getattr(value, name))

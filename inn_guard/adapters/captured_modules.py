"""Closure: a callable whose modules can be found, and copied with it."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["Closure"]


class Closure:
    """A callable together with the modules it uses.

    Modules are found in: the callable itself, the object of a bound method, the function and
    arguments of a ``functools.partial``, the attributes of a callable object, and the variables of
    enclosing scopes and globals that a function or lambda names; also inside lists, tuples and
    dicts, and through other functions of the same file. A deep copy is bound to copies of those
    modules.

    Raises:
        TypeError: if ``function`` is not callable.
    """

    def __init__(self, function: Any) -> None:
        if not callable(function):
            raise TypeError(
                f"expected a callable, got {type(function).__name__}; "
                "pass two functions, encode=f and decode=g"
            )
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        """The function's own result."""
        return self.function(*arguments)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Closure:
        return Closure(_rebound(self.function, memo))

    def modules(self) -> list[nn.Module]:
        """The modules found, each once, in the order in which they were found."""
        found = {id(module): module for module in _modules(self.function, set())}
        return list(found.values())


def _modules(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """The modules that a value reaches; ``seen`` are ids, against cycles."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield value
        return
    for part in _parts(value):
        yield from _modules(part, seen)


def _parts(value: Any) -> list[Any]:
    """What a callable or a container can reach, one step down."""
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.FunctionType):
        return [part for part in _variables(value).values() if _same_file(part, value)]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if callable(value) and hasattr(value, "__dict__") and not isinstance(value, type):
        return list(vars(value).values())
    return []


def _variables(function: types.FunctionType) -> dict[str, Any]:
    """Existing variables of enclosing scopes and globals that the function names."""
    closure = inspect.getclosurevars(function)
    return {**closure.globals, **closure.nonlocals}


def _same_file(value: Any, function: types.FunctionType) -> bool:
    """Whether to look into what a function names: not into the functions of other libraries."""
    if not isinstance(value, types.FunctionType):
        return True
    return value.__code__.co_filename == function.__code__.co_filename


def _rebound(value: Any, memo: dict[Any, Any]) -> Any:
    """A deep copy in which functions, too, refer to the copies of their modules."""
    if not isinstance(value, types.FunctionType):
        return copy.deepcopy(value, memo)
    if id(value) in memo:
        return memo[id(value)]
    variables: dict[str, Any] = {}
    for name, part in _variables(value).items():
        if next(_modules(part, set()), None) is not None:
            variables[name] = part
    if not variables:
        return value
    # the copy needs cells and globals of its own: others use those of the original
    cells = tuple(types.CellType() for _ in value.__closure__ or ())
    copied = types.FunctionType(
        value.__code__, dict(value.__globals__), value.__name__, value.__defaults__, cells
    )
    copied.__kwdefaults__ = value.__kwdefaults__
    # before its cells are filled: a recursive function finds itself in them
    memo[id(value)] = copied
    free = value.__code__.co_freevars
    for name, cell, old in zip(free, cells, value.__closure__ or (), strict=True):
        content = old.cell_contents
        if name in variables:
            content = _rebound(content, memo)
        cell.cell_contents = content
    for name in variables.keys() & copied.__globals__.keys() - set(free):
        copied.__globals__[name] = _rebound(variables[name], memo)
    return copied

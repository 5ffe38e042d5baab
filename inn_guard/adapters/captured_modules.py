"""Closure: a callable whose modules can be found, and copied with it."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["Closure"]


_CALLABLES = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
DEPTH = 6  #: how far attributes of plain objects are followed


class Closure:
    """A callable together with the modules it uses.

    Modules are found in: the callable itself, the object of a bound method, the function and
    arguments of a ``functools.partial``, the attributes of a callable object, and what a function
    or lambda names: variables of enclosing scopes and globals, and the defaults of its arguments;
    also inside lists, tuples and dicts, in attributes of objects, in what a decorator wraps, and
    through other functions of the same file. A deep copy is bound to copies of those modules.

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

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The function's own result."""
        return self.function(*arguments, **keywords)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Closure:
        return Closure(_rebound(self.function, memo))

    def modules(self) -> list[nn.Module]:
        """The modules found, each once, in the order in which they were found."""
        found = {id(module): module for module in _modules(self.function, set())}
        return list(found.values())


def _modules(value: Any, seen: set[int], depth: int = 0) -> Iterator[nn.Module]:
    """The modules that a value reaches; ``seen`` are ids, against cycles."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield value
        return
    if _is_plain_object(value):
        depth += 1
        if depth > DEPTH:
            return
    for part in _parts(value):
        yield from _modules(part, seen, depth)


def _parts(value: Any) -> list[Any]:
    """What a callable, a container or an object can reach, one step down."""
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.FunctionType):
        named = [part for part in _variables(value).values() if _same_file(part, value)]
        wrapped = getattr(value, "__wrapped__", None)  # what a decorator of another file wraps
        return [
            *named,
            wrapped,
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
        ]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if _is_plain_object(value):
        return list(vars(value).values())
    return []


def _is_plain_object(value: Any) -> bool:
    """Whether attributes may hold modules: an object of a class, and no tensor, class or module."""
    if isinstance(value, (*_CALLABLES, type, types.ModuleType, Tensor, nn.Module)):
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


def _variables(function: types.FunctionType) -> dict[str, Any]:
    """Existing variables of enclosing scopes and globals that the function names."""
    closure = inspect.getclosurevars(function)
    return {**closure.globals, **closure.nonlocals}


def _same_file(value: Any, function: types.FunctionType) -> bool:
    """Whether to look into what a function names: not into the functions of other libraries."""
    if not isinstance(value, types.FunctionType):
        return True
    return value.__code__.co_filename == function.__code__.co_filename


def _holds_modules(value: Any) -> bool:
    return next(_modules(value, set()), None) is not None


def _rebound(value: Any, memo: dict[Any, Any]) -> Any:
    """A deep copy in which functions, too, refer to the copies of their modules."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.FunctionType):
        return _rebound_function(value, memo)
    if isinstance(value, functools.partial):
        arguments = [_rebound(part, memo) for part in value.args]
        keywords = {name: _rebound(part, memo) for name, part in value.keywords.items()}
        return functools.partial(_rebound(value.func, memo), *arguments, **keywords)
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _rebound(value.__self__, memo))
    if type(value) in (list, tuple):
        return type(value)([_rebound(part, memo) for part in value])
    if type(value) is dict:
        return {name: _rebound(part, memo) for name, part in value.items()}
    if _is_plain_object(value) and not hasattr(value, "__deepcopy__") and _holds_modules(value):
        copied = copy.copy(value)
        memo[id(value)] = copied
        for name, part in vars(value).items():
            vars(copied)[name] = _rebound(part, memo)
        return copied
    return copy.deepcopy(value, memo)


def _rebound_function(value: types.FunctionType, memo: dict[Any, Any]) -> Any:
    variables = {name: part for name, part in _variables(value).items() if _holds_modules(part)}
    if not variables and not _holds_modules([value.__defaults__, value.__kwdefaults__]):
        return value
    # the copy needs cells and globals of its own: others use those of the original
    cells = tuple(types.CellType() for _ in value.__closure__ or ())
    copied = types.FunctionType(
        value.__code__, dict(value.__globals__), value.__name__, None, cells
    )
    # before its cells are filled: a recursive function finds itself in them
    memo[id(value)] = copied
    copied.__defaults__ = _rebound(value.__defaults__, memo)
    copied.__kwdefaults__ = _rebound(value.__kwdefaults__, memo)
    free = value.__code__.co_freevars
    for name, cell, old in zip(free, cells, value.__closure__ or (), strict=True):
        content = old.cell_contents
        if name in variables:
            content = _rebound(content, memo)
        cell.cell_contents = content
    for name in variables.keys() & copied.__globals__.keys() - set(free):
        copied.__globals__[name] = _rebound(variables[name], memo)
    return copied

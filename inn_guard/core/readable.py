"""The one place that decides whether a module may be read: taken for what its class says.

Bound rules, structured Jacobians and memory saving evaluate a module from its class and parameters
instead of calling it. That is right only if a call would run the code of that class and nothing
else. A module of which this is not known is opaque: it is called, and nothing is claimed about it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from types import FunctionType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from inn_guard.core.missing import Missing

__all__ = [
    "RulesByClass",
    "class_of_call",
    "composes",
    "evaluate_weight_norms",
    "first_reason",
    "is_as_written",
    "is_of_library",
    "is_plain",
    "is_unchanged",
    "runs_code_of",
    "why_patched",
    "why_unreadable",
]

R = TypeVar("R")
OURS = "inn_guard."

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)
#: what a subclass may define without changing what a call computes from the same attributes
HARMLESS = frozenset(
    (
        *("__init__", "reset_parameters", "extra_repr", "__repr__", "__str__", "__doc__"),
        *("__module__", "__qualname__", "__annotations__", "__annotate__", "__annotate_func__"),
        *("__annotations_cache__", "__dict__", "__weakref__", "__firstlineno__", "__slots__"),
        *("__static_attributes__", "__parameters__", "__orig_bases__", "__abstractmethods__"),
        *("_abc_impl", "__constants__", "__type_params__"),
    )
)
#: methods of nn.Module that a call goes through before it comes to forward
CALLING = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")
#: library class -> names of its methods
_methods: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def why_patched(module: nn.Module) -> Missing | None:
    """Why a call of this one module may run more than the methods of its class; None if it cannot.

    That is so with hooks, its own or global ones, and with methods replaced in the instance. The
    modules inside it are not looked at.

    >>> why_patched(nn.Tanh()) is None
    True
    """
    for name in GLOBAL_HOOKS:
        if getattr(torch_module, name):
            return Missing("a global module hook is registered, which may change every module")
    own = vars(module)
    for name in HOOKS:
        if own.get(name):
            kind = name.strip("_").replace("_", " ").removesuffix("s")
            first = next(iter(own[name].values()))
            called = getattr(first, "__name__", type(first).__name__)
            return Missing(
                f"{_name(module)} has a {kind} ({called}), which may change what it computes"
            )
    if parametrize.is_parametrized(module):
        # the class that parametrize has put on top holds properties, and nothing of a user's
        for name, method in vars(type(module)).items():
            if isinstance(method, FunctionType) and not _is_from(method, ["torch"]):
                return Missing(f"{name} of {_name(module)} has been replaced")
    return _why_replaced(module)


def _why_replaced(part: Any) -> Missing | None:
    """Why a method of an object is not that of its class; None if all are."""
    replaced = getattr(part, "__dict__", {}).keys() & _methods_of(type(part))
    if replaced:
        return Missing(f"this {_name(part)} has a method {min(replaced)} of its own")
    return None


def why_unreadable(module: nn.Module) -> Missing | None:
    """Why the weights of this one module may not be read; None if the next call uses what is read.

    The reasons of ``why_patched``, a class that changes what calling a module means, and
    parametrizations that give another weight at every read, as spectral_norm does in training mode.
    """
    why = _why_called_otherwise(module) or why_patched(module)
    if why is not None or not parametrize.is_parametrized(module):
        return why
    parametrizations: Any = module.parametrizations
    for name, chain in parametrizations.items():
        for part in chain.modules():
            if isinstance(part, _SpectralNorm) and part.training:
                return Missing(
                    f"the parametrization _SpectralNorm of {_name(module)}.{name} makes another "
                    "step at every read in training mode; call model.eval()"
                )
            if part is not chain:
                why = why_patched(part)
                if why is not None:
                    return why
        try:
            same = _reads_the_same(module, name, chain)
        except (RuntimeError, ValueError, TypeError) as error:
            return Missing(f"the parametrization of {_name(module)}.{name} raises: {error}")
        if not same:
            return Missing(
                f"the parametrization of {_name(module)}.{name} gives another weight at every read"
            )
    return None


def _why_called_otherwise(module: nn.Module) -> Missing | None:
    """Why a call of the module may do more than its forward; None if it does not."""
    for name in CALLING:
        calling = getattr(type(module), name)
        if calling is not getattr(nn.Module, name) and not _is_from(calling, ["torch"]):
            return Missing(f"{_name(module)} defines {name}, which a call goes through")
    return None


def first_reason(
    modules: Iterable[nn.Module],
    why: Callable[[nn.Module], Missing | None] = why_unreadable,
) -> Missing | None:
    """The first reason among some modules; None if all may be read."""
    for module in modules:
        found = why(module)
        if found is not None:
            return found
    return None


def class_of_call(module: Any, kinds: Collection[type]) -> type | Missing:
    """Which of these classes' code a call of the module runs, hooks apart.

    A subclass counts as the class only if it overrides nothing of it but the constructor and the
    printed form.

    >>> class_of_call(nn.Tanh(), [nn.ReLU, nn.Tanh]).__name__
    'Tanh'
    """
    # parametrize puts a class of its own, with properties for the weights, on top
    own = type(module)
    if isinstance(module, nn.Module):
        own = parametrize.type_before_parametrizations(module)
    for base in own.__mro__:
        if base in kinds and base is not object:
            return _unchanged(own, base)
    return Missing(f"no rule is registered for {own.__module__}.{own.__qualname__}")


def is_plain(module: Any, *kinds: type) -> bool:
    """Whether a call of the module runs the code of one of these classes and nothing else."""
    if isinstance(class_of_call(module, kinds), Missing):
        return False
    if isinstance(module, nn.Module):
        return why_patched(module) is None
    return _why_replaced(module) is None


def is_unchanged(kind: type) -> bool:
    """Whether the methods of a class are those that its library wrote."""
    return not isinstance(_unchanged(kind, kind), Missing)


def runs_code_of(module: Any, kind: type, methods: Collection[str]) -> bool:
    """Whether these methods of the module are those of ``kind`` or of one of its bases.

    For containers, whose other methods may be overridden without changing the map.
    """
    own = type(module)
    for name in methods:
        if getattr(own, name, None) is not getattr(kind, name, None) or name in vars(module):
            return False
    return isinstance(module, kind)


def is_of_library(module: nn.Module, library: str) -> bool:
    """Whether the module's class is the library's own, and no subclass of a user's."""
    own = parametrize.type_before_parametrizations(module)
    return own.__module__.partition(".")[0] == library and why_patched(module) is None


def is_as_written(layer: nn.Module, name: str) -> bool:
    """Whether the method ``name`` still speaks of the layer's own map.

    It does not where a subclass below the class that defines the method overrides anything of that
    class, or where a method of the instance has been replaced. The classes of this package are
    trusted.
    """
    if why_patched(layer) is not None:
        return False
    own = parametrize.type_before_parametrizations(layer)
    for base in own.__mro__:
        if name in vars(base):
            both_ours = own.__module__.startswith(OURS) and base.__module__.startswith(OURS)
            return both_ours or not isinstance(_unchanged(own, base), Missing)
    return False


class RulesByClass(Generic[R]):
    """Functions of a module, each registered for the class whose code it knows.

    ``register`` is that of ``functools.singledispatch``. Unlike there, a rule is not used for a
    subclass that overrides anything, or for a module that is patched.

    Args:
        otherwise: called with the reason, the module and the other arguments where no rule applies.
        inside: whether all modules inside must be readable too.
    """

    def __init__(self, otherwise: Callable[..., R], *, inside: bool = False) -> None:
        functools.update_wrapper(self, otherwise)
        self._otherwise, self._inside = otherwise, inside
        self._table = functools.singledispatch(otherwise)
        self.register: Any = self._table.register

    @property
    def classes(self) -> Collection[type]:
        """Every class with a rule."""
        return self._table.registry.keys() - {object}

    def find(self, module: Any) -> Callable[..., R] | Missing:
        """The rule for this module, or why there is none."""
        kind = class_of_call(module, self.classes)
        if isinstance(kind, Missing):
            return kind
        why = None
        if isinstance(module, nn.Module) and self._inside:
            why = first_reason(module.modules())
        elif isinstance(module, nn.Module):
            why = why_patched(module)
        return why or self._table.registry[kind]

    def __call__(self, module: Any, *arguments: Any) -> R:
        """The rule's result for this module, or that of ``otherwise``."""
        rule = self.find(module)
        if isinstance(rule, Missing):
            return self._otherwise(rule, module, *arguments)
        return rule(module, *arguments)


def evaluate_weight_norms(model: nn.Module) -> None:
    """Replace torch.nn.utils.weight_norm and spectral_norm in a copy by the weights that they make.

    Between calls such a module keeps the weight of its last call, which need not be that of its
    next one. spectral_norm in training mode makes another step at every call: it stays as it is,
    a hook.

    Args:
        model: is changed.
    """
    for module in model.modules():
        hooks: list[tuple[int, Any]] = list(module._forward_pre_hooks.items())
        for key, hook in hooks:
            if type(hook) is SpectralNorm and module.training:
                continue
            if type(hook) in (WeightNorm, SpectralNorm):
                vars(module).pop(hook.name, None)
                setattr(module, hook.name, None)
                with torch.no_grad():
                    hook.remove(module)
                del module._forward_pre_hooks[key]


@torch.no_grad()
def composes(forward: Callable[[Tensor], Tensor], parts: Iterable[Any], x: Tensor) -> bool:
    """Whether some functions, one after the other, give the values of ``forward`` at x.

    Up to rounding: the root of the dtype's eps, relative to the largest entry.
    """
    # clones: some maps write into their input
    z = forward(x.clone())
    x = x.clone()
    for part in parts:
        x = part(x)
    if z.shape != x.shape or not torch.equal(z.isfinite(), x.isfinite()):
        return False
    z, x = z.nan_to_num(0, 0, 0), x.nan_to_num(0, 0, 0)
    tolerance = torch.finfo(z.dtype).eps ** 0.5
    return not z.numel() or bool(((z - x).abs() <= tolerance * z.abs().max()).all())


def _methods_of(kind: type) -> frozenset[str]:
    found = _methods.get(kind)
    if found is None:
        names = []
        for name in dir(kind):
            if isinstance(getattr(kind, name, None), FunctionType):
                names.append(name)
        found = _methods[kind] = frozenset(names)
    return found


def _unchanged(own: type, kind: type) -> type | Missing:
    """``kind`` if neither a subclass nor a later assignment changes a method of it."""
    inherited = set(kind.__mro__)
    for base in own.__mro__:
        if base in inherited:
            continue
        for name in vars(base):
            if name not in HARMLESS and hasattr(kind, name):
                return Missing(f"{own.__qualname__} overrides {name} of {kind.__qualname__}")
    for base in kind.__mro__:
        # zuko gives torch's Transform a method: of its own classes that is no replacement
        libraries = (_library(base.__module__), _library(kind.__module__))
        for name, method in vars(base).items():
            if isinstance(method, FunctionType) and not _is_from(method, libraries):
                return Missing(f"{name} of {base.__qualname__} has been replaced")
    return kind


def _is_from(method: Any, libraries: Sequence[str]) -> bool:
    """Whether a function was defined in one of these libraries, or does not say where."""
    module = getattr(method, "__module__", None)
    return not module or _library(module) in libraries


@functools.cache
def _library(module: str) -> str:
    return module.partition(".")[0]


def _reads_the_same(module: nn.Module, name: str, chain: nn.Module) -> bool:
    """Whether two reads of a weight agree, and change no buffer that it is computed from."""
    with torch.no_grad():
        before = _copied(chain.state_dict())
        first: Tensor = getattr(module, name).clone()
        second: Tensor = getattr(module, name)
        after = chain.state_dict()
        same = torch.equal(first.nan_to_num(), second.nan_to_num())
        for key, value in before.items():
            same = same and torch.equal(value.nan_to_num(), after[key].nan_to_num())
    return same


def _copied(state: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}


def _name(part: Any) -> str:
    if isinstance(part, nn.Module):
        return parametrize.type_before_parametrizations(part).__name__
    return type(part).__name__

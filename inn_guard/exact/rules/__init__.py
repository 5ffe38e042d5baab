"""Rules: the steps of a layer in exact mode, by the exact class of its block.

The rules of a library are loaded only where the library has been imported. A rule is a function of
the Invertible around the block and of a batch x of its inputs; it returns the layer's steps, or
raises NoExactRule with the reason. It is registered for classes, not for their subclasses, which
may be other maps.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from inn_guard.adapters.base import Adapted
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import Missing
from inn_guard.core.readable import class_of_call, first_reason, why_patched
from inn_guard.exact.fixed_point import NoExactRule
from inn_guard.exact.steps import Step
from inn_guard.layers.inverted import InverseLayer

__all__ = ["Kinds", "Rule", "library_is_loaded", "register", "rule_of", "steps_of"]

Steps = Callable[[Invertible, Tensor], list[Step]]

Kinds = dict[type, "type | Missing"]  #: class of a block -> the class whose rule holds, or why not

#: module of the library -> module of its rules here
LIBRARIES = {
    "nflows": "nflows",
    "FrEIA": "freia",
    "normflows": "normflows",
    "zuko": "zuko",
    "memcnn": "memcnn",
}
_RULES: dict[type, Rule] = {}


@dataclass(frozen=True)
class Rule:
    """How layers of one kind become steps.

    Attributes:
        name: what the plan calls it.
        steps: of a layer, at a batch of its inputs.
    """

    name: str
    steps: Steps


def register(name: str, *classes: type) -> Callable[[Steps], Steps]:
    """A decorator: the rule of these classes."""

    def add(steps: Steps) -> Steps:
        for cls in classes:
            _RULES[cls] = Rule(name, steps)
        return steps

    return add


def rule_of(layer: Invertible, kinds: Kinds | None = None) -> Rule:
    """The rule of a layer.

    Args:
        layer: the layer.
        kinds: what has been found for the classes of other layers just before; it is filled in.

    Raises:
        NoExactRule: if there is none for its exact class, or its methods have been replaced.
    """
    importlib.import_module("inn_guard.exact.rules.layers")
    for library, module in LIBRARIES.items():
        if library_is_loaded(library):
            importlib.import_module(f"inn_guard.exact.rules.{module}")
    if type(layer) is InverseLayer:
        inner = rule_of(layer.inner, kinds)
        return Rule(f"{inner.name}, inverted", _RULES[InverseLayer].steps)
    block = _defining(layer)
    kind = None if kinds is None else kinds.get(type(block))
    if kind is None:
        kind = class_of_call(block, _RULES)
    if kinds is not None:
        kinds[type(block)] = kind
    if isinstance(kind, Missing):
        raise NoExactRule(kind.reason)
    why = first_reason((layer, block), why_patched)
    if why is not None:
        raise NoExactRule(why.reason)
    return _RULES[kind]


def steps_of(layer: Invertible, x: Tensor) -> list[Step]:
    """The steps of a layer at a batch of its inputs.

    Raises:
        NoExactRule: if it has no rule, or its rule does not hold for it.
    """
    return rule_of(layer).steps(layer, x)


def library_is_loaded(library: str) -> bool:
    """Whether the library has been imported, so that models of it can exist."""
    return library in sys.modules


def _defining(layer: Invertible) -> nn.Module:
    """The module whose class says which map the layer is."""
    # an adapter adds nothing to the map of its module; any other wrapper may
    if isinstance(layer, Adapted) and type(layer).__module__.startswith("inn_guard.adapters."):
        return layer.block
    return layer

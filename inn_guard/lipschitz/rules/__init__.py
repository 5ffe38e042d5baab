"""Rules: which bounded map a layer is, by the class of its block.

The rules of a library are loaded only where the library has been imported.

A rule is a function of the block and of the Invertible around it, registered for the block's class,
its first annotation. Beneath a class of one's own it can stand anywhere:

    >>> import torch
    >>> import inn_guard as ig
    >>> from inn_guard.lipschitz.maps.base import BoundedMap, bounded_map
    >>> from inn_guard.lipschitz.maps.elementary import Diagonal
    >>> class Doubling(ig.Invertible):
    ...     def forward(self, x):
    ...         return 2 * x
    ...     def inverse(self, z):
    ...         return z / 2
    >>> @bounded_map.register
    ... def bound_doubling(block: Doubling, layer: ig.Invertible) -> BoundedMap:
    ...     return Diagonal(scale=torch.tensor(2.0), shift=torch.tensor(0.0))
    >>> bounds = ig.lipschitz_bounds(Doubling(), ig.Box(torch.zeros(3), torch.ones(3)), seconds=1.0)
    >>> round(bounds.forward, 6), round(bounds.inverse, 6)
    (2.0, 0.5)

Here every library has one module with all of its rules, named ``bound_<block>``: rules of this
package's layers are in ``layers``, of its models in ``models``. A new library needs a module here
and a line in ``LIBRARIES``. ``inn_guard.lipschitz.maps`` holds the kinds of maps to choose from;
for another kind subclass ``BoundedMap``. tests/lipschitz/soundness.py checks a rule against sampled
Jacobians.
"""

import importlib
import sys

__all__ = ["load"]

#: module of the library -> module of its rules here
LIBRARIES = {
    "nflows": "nflows",
    "FrEIA": "freia",
    "normflows": "normflows",
    "zuko": "zuko",
    "memcnn": "memcnn",
    "torchdiffeq": "ode",
}


def load() -> None:
    """Register the rules of inn_guard's layers and models and of every library imported so far."""
    names = ["layers", "models"]
    for library, rules in LIBRARIES.items():
        if library in sys.modules:
            names.append(rules)
    for name in names:
        importlib.import_module(f"inn_guard.lipschitz.rules.{name}")

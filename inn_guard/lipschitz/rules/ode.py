"""The bound rule of the neural ODE."""

# The name of a rule says what it is: bound_<block>.
# ruff: noqa: D103

from __future__ import annotations

from typing import Any

from inn_guard.layers.ode import NeuralODE
from inn_guard.lipschitz.maps.base import BoundedMap, bounded_map
from inn_guard.lipschitz.maps.residual import OdeFlow


@bounded_map.register
def bound_neural_ode(block: NeuralODE, layer: Any) -> BoundedMap:
    return OdeFlow(block.field, block.duration)

"""Bound rule of the neural ODE."""

from __future__ import annotations

from typing import Any

from inn_guard.layers.ode import NeuralODE
from inn_guard.lipschitz.maps import residual as flows
from inn_guard.lipschitz.maps.base import BoundedMap, bounded_map


@bounded_map.register
def _(block: NeuralODE, layer: Any) -> BoundedMap:
    return flows.Flow(block.field, block.duration)

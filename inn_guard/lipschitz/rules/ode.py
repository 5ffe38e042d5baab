"""The bound rule of the neural ODE."""

# The name of a rule says what it is: bound_<block>.
# ruff: noqa: D103

from __future__ import annotations

from typing import Any

from inn_guard.core.readable import is_plain
from inn_guard.layers.ode import FixedStep, NeuralODE, RungeKutta
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.residual import OdeFlow

#: per method, a bound of what a step of z = h L adds: coefficients of z, z^2, ... from the absolute
#: values of its tableau; torchdiffeq's RK4 is Kutta's 3/8 rule, some of whose weights are negative
POLYNOMIALS = {
    RungeKutta.EULER: (1.0,),
    RungeKutta.MIDPOINT: (1.0, 0.5),
    RungeKutta.RK4: (1.0, 1.0, 1 / 3, 1 / 24),
}


@bounded_map.register
def bound_neural_ode(block: NeuralODE, layer: Any) -> BoundedMap:
    if not is_plain(block.solver, FixedStep):
        return NoRule(
            "an adaptive solver, whose steps depend on the data: what it computes has no bound; "
            "pass solver=FixedStep(steps)"
        )
    if block.context is not None:
        return NoRule("a field with a context")
    solver: Any = block.solver
    return OdeFlow(block.field, block.duration, solver.steps, POLYNOMIALS[solver.method])

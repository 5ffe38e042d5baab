"""Flow matching, FFJORD and other continuous flows: a velocity, and how it is integrated."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.adapters.callables import TIMES, velocity_within
from inn_guard.adapters.captured_modules import Closure
from inn_guard.core.invertible import Context, Invertible, InvertibleWrapper
from inn_guard.layers.ode import (
    Adaptive,
    ExactTrace,
    HutchinsonTrace,
    NeuralODE,
    Solver,
    Trace,
)

__all__ = ["VelocityFlow", "adapt"]

EXACT_UP_TO = 64  #: dimensions up to which the trace is exact: one more product for each
ADVICE = "Pass velocity=lambda t, x: ... with a scalar t"
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


def adapt(
    velocity: Any,
    *,
    solver: Any = None,
    times: Any = (1.0, 0.0),
    trace: Trace | None = None,
    context: Context = None,
) -> Invertible:
    """The flow of a velocity field as an Invertible, from the time of the data to that of z.

    Args:
        velocity: v, called as v(t, x), v(x, t) or v([x, t]), as its arguments are named, or as v(x)
            if it does not depend on the time; with a context as a further argument.
        solver: an ``Adaptive`` or ``FixedStep`` of ``inn_guard.layers.ode``, or the name of an
            adaptive method. Default: dopri5 with tolerances of 1e-5.
        times: of the data and of the latents. Default: (1, 0), as in flow matching.
        trace: how div v is computed. Default: exact up to 64 dimensions, above that a random
            estimate.
        context: of every call, one row per sample.

    Raises:
        TypeError: if the velocity cannot be called, or the solver or the times are none.
    """
    if not callable(velocity):
        raise TypeError(
            f"expected velocity as a function (t, x) -> dx/dt, got {type(velocity).__name__}; "
            "pass wrap(velocity=net)"
        )
    start, end = _checked_times(times)
    chosen = trace or _ByDimension()
    field = _Field(velocity, start, end)
    flow = NeuralODE(field, solver=_checked_solver(solver), trace=chosen)
    return VelocityFlow(flow.with_context(context))


def _checked_times(times: Any) -> tuple[float, float]:
    try:
        start, end = map(float, times)
    except (TypeError, ValueError):
        start = end = 0.0
    if start == end:
        raise TypeError(
            f"expected times as two different numbers, of the data and of the latents; got "
            f"{times!r}: pass times=(1.0, 0.0) for flow matching, (0.0, 1.0) for FFJORD"
        )
    return start, end


def _checked_solver(solver: Any) -> Solver:
    if solver is None:
        return Adaptive(rtol=1e-5, atol=1e-5)
    if isinstance(solver, str) and solver in ADAPTIVE:
        return Adaptive(rtol=1e-5, atol=1e-5, method=solver)
    if isinstance(solver, Solver) and not isinstance(solver, type):
        return solver
    raise TypeError(
        f"expected solver as a method with its steps or tolerances, got {solver!r:.60}; pass "
        "solver=FixedStep(100, RungeKutta.EULER) or solver=Adaptive(rtol=1e-5, atol=1e-5) from "
        "inn_guard.layers.ode"
    )


class VelocityFlow(InvertibleWrapper):
    """The flow of a velocity field, with the velocity's name."""

    @property
    def convention(self) -> str:
        """How the flow is integrated, in words."""
        ode: Any = self.inner
        field: Any = ode.field
        return (
            f"the flow of velocity {field.name} from the data at t = {field.start:g} to z at "
            f"t = {field.end:g} by {ode.solver!r}, log_det by {_described(ode.trace)}"
        )

    @property
    def name(self) -> str:
        """The name of the velocity."""
        field: Any = self.inner.field
        return field.name


def _described(trace: Trace) -> str:
    if isinstance(trace, ExactTrace):
        return "the exact trace"
    if isinstance(trace, _ByDimension):
        return f"the exact trace up to {EXACT_UP_TO} dimensions, else a random estimate of it"
    return f"an estimate, {trace!r}"


@dataclass(frozen=True)
class _ByDimension:
    """The exact trace of few dimensions; of more an estimate that is drawn anew at every call."""

    def prepare(self, x: Tensor) -> Tensor:
        """The vectors v_k, (K, B, *data), of sum_k v_k^T J v_k."""
        few = x[0].numel() <= EXACT_UP_TO
        return (ExactTrace() if few else HutchinsonTrace(seed=None)).prepare(x)


class _Field(nn.Module):
    """dx/ds of s in [0, 1], which runs from the time of the data to that of the latents."""

    def __init__(self, velocity: Callable[..., Any], start: float, end: float) -> None:
        super().__init__()
        self.velocity = Closure(velocity)
        self.found = nn.ModuleList(self.velocity.modules())
        self.start, self.end = start, end
        self.form: _Form | None = None
        self.training = any(module.training for module in self.found)

    @property
    def name(self) -> str:
        function = self.velocity.function
        return getattr(function, "__name__", type(function).__name__)

    def forward(self, s: Tensor, x: Tensor, *context: Context) -> Tensor:
        """The velocity times the length of the interval, (B, *data)."""
        t = self.start + (self.end - self.start) * s
        if self.form is not None:
            return (self.end - self.start) * self.form(self.velocity, t, x, context)
        tried = []
        for form in _forms(self.velocity.function):
            try:
                value = form(self.velocity, t, x, context)
            except Exception as error:  # whatever it raises, it is not called so
                tried.append(f"{form}: {type(error).__name__}: {str(error)[:80]}")
                continue
            if isinstance(value, Tensor) and value.shape == x.shape:
                self.form = form
                return (self.end - self.start) * value
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            tried.append(f"{form} returns {got}")
        inside = velocity_within(self.velocity.function)
        advice = f"Pass velocity=model.{inside}" if inside else ADVICE
        raise TypeError(
            f"expected velocity {self.name} to return dx/dt of shape {tuple(x.shape)}; tried "
            f"{'; '.join(tried)}. {advice}"
        )


@dataclass(frozen=True)
class _Form:
    """How a velocity is called.

    Attributes:
        order: "t, x", "x, t" or "[x, t]", one tensor with the time as a last feature; or "x".
        shape: of the time for B samples: () or (B,) or (B, 1), as "", "B" or "B1".
    """

    order: str
    shape: str

    def __call__(
        self, velocity: Closure, t: Tensor, x: Tensor, context: tuple[Context, ...]
    ) -> Any:
        """The velocity at a scalar time t and x, (B, *data)."""
        t = t.to(x)
        if self.shape:
            t = t.expand(len(x))
        if self.shape == "B1":
            t = t.unsqueeze(1)
        if self.order == "x":
            return velocity(x, *context)
        if self.order == "[x, t]":
            return velocity(torch.cat([x, t], 1), *context)
        return velocity(*((t, x) if self.order == "t, x" else (x, t)), *context)

    def __str__(self) -> str:
        if self.order == "x":
            return "velocity(x)"
        shape = {"": "scalar", "B": "t of shape (B,)", "B1": "t of shape (B, 1)"}[self.shape]
        return f"velocity({self.order}), {shape}"


def _forms(velocity: Any) -> Iterator[_Form]:
    """The ways to call a velocity, those first that the names of its arguments suggest."""
    function = velocity.forward if isinstance(velocity, nn.Module) else velocity
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name.lower() for p in positional]
    orders = ["t, x", "x, t"]
    if len(needed) > 1 and needed[1] in TIMES:
        orders = ["x, t"]
    elif needed and needed[0] in TIMES:
        orders = ["t, x"]
    for order in orders if len(needed) != 1 else []:
        for shape in ("", "B", "B1"):
            yield _Form(order, shape)
    yield _Form("[x, t]", "B1")
    if len(needed) == 1 or not parameters:
        yield _Form("x", "")

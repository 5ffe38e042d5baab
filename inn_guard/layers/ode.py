"""Neural ODE block: the flow of a vector field from time 0 to T. Needs torchdiffeq."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from inn_guard.core.invertible import Invertible
from inn_guard.core.tensors import finite_rows

__all__ = [
    "Adaptive",
    "ExactTrace",
    "FixedStep",
    "HutchinsonTrace",
    "NeuralODE",
    "RungeKutta",
    "Solver",
    "Trace",
]

Velocity = Callable[[Tensor, Any], Any]


class RungeKutta(enum.Enum):
    """Explicit methods of a fixed step."""

    EULER = "euler"
    MIDPOINT = "midpoint"
    RK4 = "rk4"

    def __repr__(self) -> str:
        return str(self)  # as it is written in code


@runtime_checkable
class Solver(Protocol):
    """How the equation is integrated."""

    def options(self, duration: float) -> dict[str, Any]:
        """Keyword arguments of ``torchdiffeq.odeint``."""
        ...


@dataclass(frozen=True)
class Adaptive:
    """An adaptive method of torchdiffeq, Dormand-Prince of order 5 by default.

    The forward and the backward integration choose different steps, so the inverse is one up to the
    tolerance only.
    """

    rtol: float = 1e-7
    atol: float = 1e-9
    method: str = "dopri5"

    def options(self, duration: float) -> dict[str, Any]:
        """Keyword arguments of ``torchdiffeq.odeint``: method and tolerances."""
        return {"method": self.method, "rtol": self.rtol, "atol": self.atol}


@dataclass(frozen=True)
class FixedStep:
    """A fixed number of equal steps of an explicit method.

    A step backward is not the exact inverse of a step forward: the inverse is one up to the
    discretisation error.
    """

    steps: int
    method: RungeKutta = RungeKutta.RK4

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"expected at least one step, got {self.steps}")

    def options(self, duration: float) -> dict[str, Any]:
        """Keyword arguments of ``torchdiffeq.odeint``: method and step size."""
        return {"method": self.method.value, "options": {"step_size": duration / self.steps}}


@runtime_checkable
class Trace(Protocol):
    """How tr(df/dx) is computed."""

    def prepare(self, x: Tensor) -> Tensor:
        """The vectors v_k, (K, B, *data), of sum_k v_k^T J v_k during one integration."""
        ...


@dataclass(frozen=True)
class ExactTrace:
    """One vector-Jacobian product per dimension. For small D."""

    def prepare(self, x: Tensor) -> Tensor:
        """The standard basis as D vectors per sample, (D, B, *data)."""
        size = x[0].numel()
        eye = torch.eye(size, dtype=x.dtype, device=x.device)
        return eye.reshape(size, 1, *x.shape[1:]).expand(size, *x.shape)


@dataclass(frozen=True)
class HutchinsonTrace:
    """tr(J) = E[v^T J v] with v = +-1, the same along one integration.

    Args:
        probes: random vectors per sample.
        seed: of their generator, which gives the same vectors at every call. None: they are drawn
            anew at every call, by torch's global generator.

    References:
        FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models
        (Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, 2019).
    """

    probes: int = 1
    seed: int | None = 0

    def prepare(self, x: Tensor) -> Tensor:
        """Random signs, (K, B, *data), divided by sqrt(K) so that the sum is a mean of K."""
        generator = None
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
        shape = (self.probes, *x.shape)
        bits = torch.randint(0, 2, shape, generator=generator, device="cpu")
        return (2 * bits - 1).to(x) / self.probes**0.5


class NeuralODE(Invertible):
    """z = x(T) of dx/dt = f(t, x), x(0) = x; log|det J| = integral of tr(df/dx) from 0 to T.

    The inverse integrates from T to 0. A sample that is not finite comes out as NaN and is kept
    from the solver, which would not return; a batch on which the solver's step vanishes comes out
    as NaN altogether. Gradients flow through the solver's operations. A layer with a context calls
    ``field(t, x, context)``.

    Args:
        field: f, from a scalar tensor t and x (B, *data) to dx/dt of the shape of x.
        duration: T.
        solver: of the equation. Default: ``Adaptive()``.
        trace: how the trace is computed. Default: ``ExactTrace()``.

    References:
        Neural Ordinary Differential Equations (Chen, Rubanova, Bettencourt, Duvenaud, 2018).
    """

    def __init__(
        self,
        field: nn.Module,
        *,
        duration: float = 1.0,
        solver: Solver | None = None,
        trace: Trace | None = None,
    ) -> None:
        super().__init__()
        if duration <= 0:
            raise ValueError(f"expected a positive duration, got {duration}")
        self.field, self.duration = field, duration
        self.solver: Solver = Adaptive() if solver is None else solver
        self.trace: Trace = ExactTrace() if trace is None else trace

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """The velocity f(t, x), (B, *data), at the context if there is one."""
        if self.context is None:
            return self.field(t, x)
        return self.field(t, x, self.context)

    def forward(self, x: Tensor) -> Tensor:
        """The state at time T from x at time 0, (B, *data)."""
        return self._integrate(x, start=0.0, end=self.duration)

    def inverse(self, z: Tensor) -> Tensor:
        """The state at time 0 from z at time T, (B, *data)."""
        return self._integrate(z, start=self.duration, end=0.0)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x(T), and the integral of the trace along the way."""
        return self._integrate_with_trace(x, start=0.0, end=self.duration)

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x(0), and minus the integral of the trace along the way."""
        return self._integrate_with_trace(z, start=self.duration, end=0.0)

    def _integrate(self, x: Tensor, *, start: float, end: float) -> Tensor:
        """The state at ``end`` from x at ``start``; NaN for samples that are not finite."""
        finite = finite_rows(x)
        if not bool(finite.all()):
            rows = finite.nonzero().squeeze(1)
            solved = self.select(rows)._integrate(x[rows], start=start, end=end)
            return torch.full_like(x, torch.nan).index_copy(0, rows, solved)

        def velocity(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (self.velocity(t, state[0]),)

        return self._solve(velocity, (x,), start=start, end=end)[0]

    def _integrate_with_trace(
        self, x: Tensor, *, start: float, end: float
    ) -> tuple[Tensor, Tensor]:
        """As ``_integrate``, with the integral of the trace, (B,)."""
        finite = finite_rows(x)
        if not bool(finite.all()):
            rows = finite.nonzero().squeeze(1)
            solved, log_det = self.select(rows)._integrate_with_trace(x[rows], start=start, end=end)
            nan = torch.full_like(x, torch.nan)
            no_log_det = nan.flatten(1)[:, 0]
            return nan.index_copy(0, rows, solved), no_log_det.index_copy(0, rows, log_det)
        # drawn once: the integrand must be the same function at every step of the solver
        vectors = self.trace.prepare(x)
        graph = torch.is_grad_enabled()

        def velocity(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                point = state[0]
                if not (graph and point.requires_grad):
                    point = point.detach().requires_grad_()
                value = self.velocity(t, point)
                trace = _trace(value, point, vectors, create_graph=graph)
            if graph:
                return value, trace
            return value.detach(), trace.detach()

        z, log_det = self._solve(velocity, (x, x.new_zeros(len(x))), start=start, end=end)
        return z, log_det

    def _solve(
        self, velocity: Velocity, state: tuple[Tensor, ...], *, start: float, end: float
    ) -> tuple[Tensor, ...]:
        """The state at ``end``; NaN if the solver gave up because its step vanished."""
        if not len(state[0]):
            return state  # an empty batch: there is nothing to integrate
        times = torch.tensor([start, end], dtype=state[0].dtype, device=state[0].device)
        try:
            path = odeint(velocity, state, times, **self.solver.options(self.duration))
        except AssertionError:
            # torchdiffeq asserts that the adaptive step has not underflown
            return tuple(torch.full_like(part, torch.nan) for part in state)
        return tuple(part[-1] for part in path)


def _trace(value: Tensor, point: Tensor, vectors: Tensor, *, create_graph: bool) -> Tensor:
    """sum_k v_k^T J v_k per sample, (B,), with J the Jacobian of ``value`` at ``point``."""
    total = value.new_zeros(len(value))
    for v in vectors:
        (row,) = torch.autograd.grad(value, point, v, create_graph=create_graph, retain_graph=True)
        total = total + (row * v).flatten(1).sum(1)
    return total

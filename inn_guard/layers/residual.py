"""Residual layers z = x + g(x) with Lip(g) < 1, inverted by a fixed-point iteration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.jacobian.network import AutogradNetwork, NetworkJacobian, linearize_network
from inn_guard.layers.fixed_point import Convergence, FixedPoint, implicit_gradient
from inn_guard.layers.residual_log_det import ExactLogDet, ResidualLogDet

__all__ = ["Residual"]


class Residual(Invertible):
    """z = x + g(x) with Lip(g) < 1; the inverse is the fixed point of x = z - g(x).

    ``convergence`` tells how the last inverse ended: iterations, residual, and which samples
    converged. The gradient of the inverse is exact by the implicit function theorem: (I + G)^-T
    applied to the incoming gradient, solved by the same iteration. A layer with a context calls
    ``network(x, context)``.

    Args:
        network: g, from (B, *data) to the same shape. ``contractive_mlp`` and
            ``contractive_conv_net`` make networks whose Lipschitz constant is certified.
        log_det: how log|det(I + G)| is computed. Default: exactly.
        solver: of the fixed point.

    References:
        Invertible Residual Networks (Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, 2019).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        log_det: ResidualLogDet | None = None,
        solver: FixedPoint | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.log_det: ResidualLogDet = ExactLogDet() if log_det is None else log_det
        self.solver = FixedPoint() if solver is None else solver
        # in a list, so that copies made by ``with_context`` share it
        self._convergence = [Convergence()]

    @property
    def convergence(self) -> Convergence:
        """How the last iteration of the inverse ended; shared by ``with_context`` copies."""
        return self._convergence[0]

    def residual(self, x: Tensor) -> Tensor:
        """The residual g(x), (B, *data), at the context if there is one."""
        if self.context is None:
            return self.network(x)
        return self.network(x, self.context)

    def forward(self, x: Tensor) -> Tensor:
        """z = x + g(x)."""
        return x + self.residual(x)

    def inverse(self, z: Tensor) -> Tensor:
        """The x with x + g(x) = z; ``convergence`` tells whether the tolerance was reached."""
        x, self._convergence[0] = self.solver.solve(lambda x: z - self.residual(x), z.detach())
        if not torch.is_grad_enabled():
            return x
        # one more evaluation ties the solution to z and to the parameters of g
        return implicit_gradient(
            z - self.residual(x), lambda gradient: self._pull_through(x, gradient)
        )

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and log|det(I + G)|, or its estimate."""
        residual, log_det = self.log_det(self.residual, x)
        return x + residual, log_det

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and -log|det(I + G)| at x."""
        x = self.inverse(z)
        return x, -self.log_det(self.residual, x)[1]

    def linearize(self, x: Tensor) -> LayerJacobian:
        """I + G and its transpose by products with G; their inverses by iteration."""
        if self.context is None:
            network = linearize_network(self.network, x)
        else:
            network = AutogradNetwork(self.residual, x)
        return _ResidualJacobian(x.detach() + network.output, network, self.solver)

    def _pull_through(self, x: Tensor, gradient: Tensor) -> Tensor:
        """(I + G)^-T gradient at x."""
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            value = self.residual(leaf)

        def step(w: Tensor) -> Tensor:
            return gradient - torch.autograd.grad(value, leaf, w, retain_graph=True)[0]

        return self.solver.solve(step, gradient)[0]


class _ResidualJacobian:
    """I + G from products with G; its inverse solves w = u - G w by the layer's own iteration."""

    def __init__(self, output: Tensor, network: NetworkJacobian, solver: FixedPoint) -> None:
        self.output = output
        self._network, self._solver = network, solver

    def jvp(self, v: Tensor) -> Tensor:
        return v + self._network.jvp(v)

    def vjp(self, u: Tensor) -> Tensor:
        return u + self._network.vjp(u)

    def inverse_jvp(self, u: Tensor) -> Tensor:
        return self._solver.solve(lambda w: u - self._network.jvp(w), u)[0]

    def inverse_vjp(self, v: Tensor) -> Tensor:
        return self._solver.solve(lambda w: v - self._network.vjp(w), v)[0]

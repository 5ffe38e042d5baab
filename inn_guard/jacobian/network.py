"""J v and J^T u of a feed-forward network, from the slopes of one forward pass.

A Sequential of linear maps, convolutions and elementwise activations needs no autograd graph: its
Jacobian is the same chain with every activation replaced by its slope. Other networks are
differentiated by autograd. Vectors may have more leading dimensions than the input: one call then
computes several products.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from inn_guard.core.layer_jacobian import Castable, Map, Selectable
from inn_guard.core.missing import Missing
from inn_guard.core.readable import RulesByClass
from inn_guard.jacobian.network_products import (
    AutogradNetwork,
    Convolution,
    NetworkJacobian,
    with_output,
)
from inn_guard.jacobian.recorded import linearize_function

__all__ = [
    "AutogradNetwork",
    "Convolution",
    "DiagonalJacobian",
    "IdentityJacobian",
    "InputSliceJacobian",
    "LinearJacobian",
    "NetworkJacobian",
    "PointwiseConvolution",
    "SequentialJacobian",
    "linearize_elementwise",
    "linearize_module",
    "linearize_network",
    "select_rows_of",
]

T = TypeVar("T")

#: elementwise modules, whose slopes come from autograd
ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
)


def linearize_network(network: nn.Module, x: Tensor) -> NetworkJacobian:
    """The Jacobian of ``network`` at x, (B, *in)."""
    with torch.no_grad():
        return linearize_module(network, x.detach())


@RulesByClass
def linearize_module(why: Missing, module: nn.Module, x: Tensor) -> NetworkJacobian:
    """The Jacobian of one module, by its class; ``linearize_module.register`` adds a class."""
    # it builds on the classes of this file

    return linearize_function(module, x, module=module)


class InputSliceJacobian:
    """The Jacobian of a network with respect to the first channels of its input.

    Args:
        whole: the Jacobian with respect to all channels.
        channels: number of the first channels.
        held: number of the other channels, which are held fixed.
    """

    def __init__(self, whole: NetworkJacobian, *, channels: int, held: int) -> None:
        self._whole, self._channels, self._held = whole, channels, held
        self.output = whole.output
        # counted from the end: v may have more leading dimensions than the output
        self._dim = 1 - whole.output.dim()

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (..., B, *out)."""
        shape = list(v.shape)
        shape[self._dim] = self._held
        return self._whole.jvp(torch.cat([v, v.new_zeros(shape)], dim=self._dim))

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u, (..., B, *in)."""
        return self._whole.vjp(u).narrow(self._dim, 0, self._channels)


class SequentialJacobian:
    """The Jacobian of a Sequential: the chain of those of its modules."""

    def __init__(self, modules: nn.Sequential, x: Tensor) -> None:
        self.steps: list[NetworkJacobian] = []
        for module in modules:
            step = linearize_module(module, x)
            x = step.output
            self.steps.append(_without_output(step))
        self.output = x

    def select(self, rows: Tensor) -> SequentialJacobian | None:
        """The Jacobian at these rows; None where a step cannot select them."""
        chosen = []
        for step in self.steps:
            part = select_rows_of(step, rows)
            if part is None:
                return None
            chosen.append(_without_output(part))
        clone = copy.copy(self)
        clone.steps, clone.output = chosen, self.output[rows]
        return clone

    def in_dtype(self, dtype: torch.dtype) -> SequentialJacobian | None:
        """The chain whose products are computed in ``dtype``; None where a step has no such."""
        cast = []
        for step in self.steps:
            if not isinstance(step, Castable):
                return None
            part = step.in_dtype(dtype)
            if part is None:
                return None
            cast.append(part)
        clone = copy.copy(self)
        clone.steps = cast
        return clone

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (..., B, *out)."""
        return _chained(v, [(step, step.jvp) for step in self.steps])

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u, (..., B, *in)."""
        return _chained(u, [(step, step.vjp) for step in reversed(self.steps)])


def _chained(v: Tensor, products: Sequence[tuple[NetworkJacobian, Map]]) -> Tensor:
    """The products one after the other; slopes are multiplied in place where that is safe."""
    owned = False  # whether v is a new tensor, which may be overwritten
    for step, product in products:
        if owned and isinstance(step, DiagonalJacobian):
            v = step.scale_(v)
        else:
            v = product(v)
        owned = owned or isinstance(step, _RETURNS_NEW)
    return v


class LinearJacobian:
    """The Jacobian of a linear map: its ``weight``, (out, in). Its module also has a ``bias``."""

    def __init__(self, module: Any, x: Tensor) -> None:
        self.weight = module.weight.detach()
        self.output = functional.linear(x, self.weight, module.bias)

    def select(self, rows: Tensor) -> LinearJacobian:
        """The Jacobian at these rows."""
        return with_output(self, self.output[rows])

    def in_dtype(self, dtype: torch.dtype) -> LinearJacobian:
        """The Jacobian with its weight in ``dtype``."""
        return _with_weight(self, self.weight.to(dtype))

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (..., B, *out)."""
        return functional.linear(v, self.weight)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u, (..., B, *in)."""
        return u @ self.weight


class PointwiseConvolution:
    """The Jacobian of a 1x1 convolution: the ``weight``, (out, in), times the channels.

    As a matrix product it is faster than as a convolution.
    """

    def __init__(self, module: nn.Conv2d, x: Tensor) -> None:
        self.weight = module.weight.detach().flatten(1)
        output = functional.linear(x.movedim(-3, -1), self.weight, module.bias)
        self.output = output.movedim(-1, -3)

    def select(self, rows: Tensor) -> PointwiseConvolution:
        """The Jacobian at these rows."""
        return with_output(self, self.output[rows])

    def in_dtype(self, dtype: torch.dtype) -> PointwiseConvolution:
        """The Jacobian with its weight in ``dtype``."""
        return _with_weight(self, self.weight.to(dtype))

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (..., B, *out)."""
        return functional.linear(v.movedim(-3, -1), self.weight).movedim(-1, -3)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u, (..., B, *in)."""
        return (u.movedim(-3, -1) @ self.weight).movedim(-1, -3)


class DiagonalJacobian:
    """The Jacobian of an elementwise map: its ``slope``, of the shape of x."""

    def __init__(self, output: Tensor, slope: Tensor) -> None:
        self.output, self.slope = output, slope

    def select(self, rows: Tensor) -> DiagonalJacobian:
        """The Jacobian at these rows."""
        return DiagonalJacobian(self.output[rows], self.slope[rows])

    def in_dtype(self, dtype: torch.dtype) -> DiagonalJacobian:
        """The Jacobian with its slope in ``dtype``."""
        return DiagonalJacobian(self.output, self.slope.to(dtype))

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (..., B, *out)."""
        return v * self.slope

    vjp = jvp

    def scale_(self, v: Tensor) -> Tensor:
        """J v in place of v, which must be the caller's own: saves a pass over new memory."""
        return v.mul_(self.slope)


class IdentityJacobian:
    """The Jacobian of a module that returns its input."""

    def __init__(self, x: Tensor) -> None:
        self.output = x

    def select(self, rows: Tensor) -> IdentityJacobian:
        """The Jacobian at these rows."""
        return with_output(self, self.output[rows])

    def in_dtype(self, dtype: torch.dtype) -> IdentityJacobian:
        """Itself: it multiplies nothing."""
        return self

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (..., B, *out)."""
        return v

    vjp = jvp


def select_rows_of(jacobian: NetworkJacobian, rows: Tensor) -> Any:
    """``jacobian`` at these rows of the batch; None where it cannot select them."""
    if not isinstance(jacobian, Selectable):
        return None
    return jacobian.select(rows)


def _without_output(step: NetworkJacobian) -> NetworkJacobian:
    """The step with an output of the same shape that needs no memory: the values are not needed."""
    return with_output(step, step.output.new_empty(()).expand(step.output.shape))


def _with_weight(jacobian: T, weight: Tensor) -> T:
    """A shallow copy of the Jacobian with another weight."""
    clone = copy.copy(jacobian)
    vars(clone)["weight"] = weight
    return clone


#: their products are tensors of their own; IdentityJacobian returns its argument
_RETURNS_NEW = (LinearJacobian, PointwiseConvolution, Convolution, DiagonalJacobian)


@linearize_module.register
def linearize_sequential(module: nn.Sequential, x: Tensor) -> NetworkJacobian:
    """The Jacobian of a Sequential: the chain of its modules' Jacobians."""
    return SequentialJacobian(module, x)


@linearize_module.register
def linearize_linear(module: nn.Linear, x: Tensor) -> NetworkJacobian:
    """The Jacobian of a linear layer: its weight."""
    return LinearJacobian(module, x)


@linearize_module.register
def linearize_convolution(module: nn.Conv2d, x: Tensor) -> NetworkJacobian:
    """The Jacobian of a convolution: by its weight if it pads with zeros, else by autograd."""
    zero_padded = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if not zero_padded or x.dim() != 4:
        return AutogradNetwork(module, x)
    ones = {*module.kernel_size, *module.stride, module.groups} == {1}
    if ones and not any(module.padding):
        return PointwiseConvolution(module, x)
    return Convolution(module, x)


@linearize_module.register
def linearize_relu(module: nn.ReLU, x: Tensor) -> NetworkJacobian:
    """The Jacobian of a ReLU: its slope, 0 or 1."""
    # ``out`` makes the comparison write numbers of the dtype of x, in one pass
    slope = torch.gt(x, 0, out=torch.empty_like(x))
    return DiagonalJacobian(x.relu(), slope)


@linearize_module.register
def linearize_identity(module: nn.Identity, x: Tensor) -> NetworkJacobian:
    """The Jacobian of the identity."""
    return IdentityJacobian(x)


@linearize_module.register
def linearize_dropout(module: nn.Dropout, x: Tensor) -> NetworkJacobian:
    """The Jacobian of a dropout: the identity where it drops nothing, else by autograd."""
    if module.training and module.p > 0:
        return AutogradNetwork(module, x)
    return IdentityJacobian(x)


def linearize_elementwise(module: nn.Module, x: Tensor) -> NetworkJacobian:
    """The Jacobian of an elementwise module, its slope by autograd."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        # a copy: an activation that works in place must not write into a leaf
        output = module(leaf.clone())
    (slope,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
    return DiagonalJacobian(output.detach(), slope)


for _kind in ACTIVATIONS:
    linearize_module.register(_kind, linearize_elementwise)

"""J v and J^T u of a feed-forward network at one input, from one forward pass whose slopes are kept.

A network that is a Sequential of linear maps, convolutions and elementwise activations needs no autograd graph: its
tangent is the same chain with every activation replaced by its slope. Anything else is differentiated by autograd.
Vectors may carry leading dimensions more than the input: so many products in one call.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from inn_guard.core.layer_jacobian import AutogradJacobian, Map, NotApplicable, Selectable

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
    "is_unpatched",
    "linearize_network",
    "select_rows_of",
    "linearize_module",
]

T = TypeVar("T")

ACTIVATIONS = (
    *(
        nn.LeakyReLU,
        nn.ELU,
        nn.SELU,
        nn.CELU,
        nn.SiLU,
        nn.GELU,
        nn.Mish,
        nn.Tanh,
        nn.Sigmoid,
        nn.LogSigmoid,
    ),
    *(nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.ReLU6, nn.Tanhshrink),
)  #: elementwise modules, differentiated by autograd


@runtime_checkable
class NetworkJacobian(Protocol):
    """The two products with the Jacobian J of a network at a batch.

    Attributes:
        output: the network's value, detached.
    """

    output: Tensor

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (..., B, *in) -> (..., B, *out), a new tensor."""
        ...

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u: (..., B, *out) -> (..., B, *in), a new tensor."""
        ...


def linearize_network(network: nn.Module, x: Tensor) -> NetworkJacobian:
    """The tangent of ``network`` at x, (B, *in)."""
    with torch.no_grad():
        return linearize_module(network, x.detach())


@functools.singledispatch
def linearize_module(module: nn.Module, x: Tensor) -> NetworkJacobian:
    """The tangent of one module, by its class: a class is taught with ``linearize_module.register``."""
    return AutogradNetwork(module, x)


class AutogradNetwork:
    """The products of any differentiable map, by autograd."""

    def __init__(self, function: Map, x: Tensor) -> None:
        self._tangent = AutogradJacobian(function, _no_inverse, x.detach())
        self.output = self._tangent.output
        self._dims = x.dim()

    def jvp(self, v: Tensor) -> Tensor:
        """J v by forward mode, one pass per leading entry."""
        if v.dim() == self._dims:
            return self._tangent.jvp(v)
        return torch.stack([self.jvp(row) for row in v])

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u by reverse mode."""
        if u.dim() <= self.output.dim() + 1:
            return self._tangent.vjp(u)
        return torch.stack([self.vjp(row) for row in u])


class InputSliceJacobian:
    """The products of a network with respect to the first channels of its input alone.

    Args:
        whole: the tangent with respect to all channels.
        channels: how many come first; the others are held fixed.
        held: how many are held.
    """

    def __init__(self, whole: NetworkJacobian, *, channels: int, held: int) -> None:
        self._whole, self._channels, self._held = whole, channels, held
        self.output = whole.output
        self._dim = 1 - whole.output.dim()

    def jvp(self, v: Tensor) -> Tensor:
        """J v."""
        shape = list(v.shape)
        shape[self._dim] = self._held
        return self._whole.jvp(torch.cat([v, v.new_zeros(shape)], dim=self._dim))

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u."""
        return self._whole.vjp(u).narrow(self._dim, 0, self._channels)


class SequentialJacobian:
    """The chain of several tangents."""

    def __init__(self, modules: nn.Sequential, x: Tensor) -> None:
        self.steps: list[NetworkJacobian] = []
        for module in modules:
            step = linearize_module(module, x)
            x = step.output
            self.steps.append(_hollow(step))
        self.output = x

    def select(self, rows: Tensor) -> SequentialJacobian | None:
        """The chain of these rows."""
        steps = [select_rows_of(step, rows) for step in self.steps]
        chosen = [step for step in steps if step is not None]
        if len(chosen) < len(steps):
            return None
        twin = copy.copy(self)
        twin.steps, twin.output = [_hollow(step) for step in chosen], self.output[rows]
        return twin

    def jvp(self, v: Tensor) -> Tensor:
        """J v."""
        ours = False
        for step in self.steps:
            v = step.scale_(v) if ours and isinstance(step, DiagonalJacobian) else step.jvp(v)
            ours = ours or isinstance(step, _MAKES_NEW)
        return v

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u."""
        ours = False
        for step in reversed(self.steps):
            u = step.scale_(u) if ours and isinstance(step, DiagonalJacobian) else step.vjp(u)
            ours = ours or isinstance(step, _MAKES_NEW)
        return u


class LinearJacobian:
    """Multiplication with ``weight``, (out, in), of a module that has one and a ``bias``."""

    def __init__(self, module: Any, x: Tensor) -> None:
        self.weight = module.weight.detach()
        self.output = functional.linear(x, self.weight, module.bias)

    def select(self, rows: Tensor) -> LinearJacobian:
        """The same products; the output of these rows."""
        return _with_output(self, self.output[rows])

    def jvp(self, v: Tensor) -> Tensor:
        """J v."""
        return functional.linear(v, self.weight)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u."""
        return u @ self.weight


class PointwiseConvolution:
    """A 1x1 convolution: ``weight`` (out, in) applied to the channels at the speed of a matrix product."""

    def __init__(self, module: nn.Conv2d, x: Tensor) -> None:
        self.weight = module.weight.detach().flatten(1)
        output = functional.linear(x.movedim(-3, -1), self.weight, module.bias)
        self.output = output.movedim(-1, -3)

    def select(self, rows: Tensor) -> PointwiseConvolution:
        """The same products; the output of these rows."""
        return _with_output(self, self.output[rows])

    def jvp(self, v: Tensor) -> Tensor:
        """J v."""
        return functional.linear(v.movedim(-3, -1), self.weight).movedim(-1, -3)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u."""
        return (u.movedim(-3, -1) @ self.weight).movedim(-1, -3)


class Convolution:
    """A zero-padded convolution with ``weight`` (out, in, k, k); ``geometry``: stride, padding, dilation, groups."""

    def __init__(self, module: nn.Conv2d, x: Tensor) -> None:
        self.weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
        geometry: Any = (module.stride, module.padding, module.dilation, module.groups)
        self.geometry, self._shape = geometry, x.shape[1:]
        self.output = functional.conv2d(_channels_last(x), self.weight, module.bias, *self.geometry)

    def select(self, rows: Tensor) -> Convolution:
        """The same products; the output of these rows."""
        return _with_output(self, self.output[rows])

    def jvp(self, v: Tensor) -> Tensor:
        """J v."""
        if v.dim() > 4:
            v, leading = _merged(v)
            return self.jvp(v).unflatten(0, leading)
        return functional.conv2d(_channels_last(v), self.weight, None, *self.geometry)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u."""
        if u.dim() > 4:
            u, leading = _merged(u)
            return self.vjp(u).unflatten(0, leading)
        u = _channels_last(u)
        if self._flipped is None:
            return conv2d_input([len(u), *self._shape], self.weight, u, *self.geometry)
        kernel, padding = self._flipped
        return functional.conv2d(u, kernel, None, 1, padding)

    @functools.cached_property
    def _flipped(self) -> tuple[Tensor, list[int]] | None:
        """Kernel and padding of the convolution that is the transpose, where it is one of stride 1."""
        stride, before, dilation, groups = self.geometry
        padding = [k - 1 - p for k, p in zip(self.weight.shape[2:], before, strict=True)]
        if {*stride, *dilation, groups} != {1} or min(padding) < 0:
            return None
        return _channels_last(self.weight.flip(2, 3).transpose(0, 1)), padding


class DiagonalJacobian:
    """Multiplication with ``slope``, of the shape of x."""

    def __init__(self, output: Tensor, slope: Tensor) -> None:
        self.output, self.slope = output, slope

    def select(self, rows: Tensor) -> DiagonalJacobian:
        """The slopes of these rows."""
        return DiagonalJacobian(self.output[rows], self.slope[rows])

    def jvp(self, v: Tensor) -> Tensor:
        """J v."""
        return v * self.slope

    vjp = jvp

    def scale_(self, v: Tensor) -> Tensor:
        """The product in place of v, which is the caller's own: it saves a pass over fresh memory."""
        return v.mul_(self.slope)


class IdentityJacobian:
    """The identity."""

    def __init__(self, x: Tensor) -> None:
        self.output = x

    def select(self, rows: Tensor) -> IdentityJacobian:
        """The same products; the output of these rows."""
        return _with_output(self, self.output[rows])

    def jvp(self, v: Tensor) -> Tensor:
        """J v."""
        return v

    vjp = jvp


def select_rows_of(tangent: NetworkJacobian, rows: Tensor) -> Any:
    """The tangent of these rows of the batch; None where it cannot be taken apart."""
    return tangent.select(rows) if isinstance(tangent, Selectable) else None


def _hollow(step: NetworkJacobian) -> NetworkJacobian:
    """The step with an output of its shape and dtype that holds no memory: only the next step needed the values."""
    return _with_output(step, step.output.new_empty(()).expand(step.output.shape))


def _with_output(tangent: T, output: Tensor) -> T:
    twin = copy.copy(tangent)
    vars(twin)["output"] = output
    return twin


_MAKES_NEW = (LinearJacobian, PointwiseConvolution, Convolution, DiagonalJacobian)


def is_unpatched(module: nn.Module) -> bool:
    """Whether calling the module runs its class's methods and nothing else: no hooks, no methods of its own."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and not {"forward", "inverse", "linearize"} & vars(module).keys()


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class says: no forward of its own, no hooks."""
    return type(module).forward is kind.forward and is_unpatched(module)


@linearize_module.register
def _(module: nn.Sequential, x: Tensor) -> NetworkJacobian:
    return (
        SequentialJacobian(module, x)
        if _is_plain(module, nn.Sequential)
        else AutogradNetwork(module, x)
    )


@linearize_module.register
def _(module: nn.Linear, x: Tensor) -> NetworkJacobian:
    return LinearJacobian(module, x) if _is_plain(module, nn.Linear) else AutogradNetwork(module, x)


@linearize_module.register
def _(module: nn.Conv2d, x: Tensor) -> NetworkJacobian:
    zero_padded = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if not zero_padded or x.dim() != 4 or not _is_plain(module, nn.Conv2d):
        return AutogradNetwork(module, x)
    ones = {*module.kernel_size, *module.stride, module.groups} == {1} and not any(module.padding)
    return PointwiseConvolution(module, x) if ones else Convolution(module, x)


@linearize_module.register
def _(module: nn.ReLU, x: Tensor) -> NetworkJacobian:
    if not _is_plain(module, nn.ReLU):
        return AutogradNetwork(module, x)
    return DiagonalJacobian(x.relu(), torch.gt(x, 0, out=torch.empty_like(x)))


@linearize_module.register
def _(module: nn.Identity, x: Tensor) -> NetworkJacobian:
    return IdentityJacobian(x) if _is_plain(module, nn.Identity) else AutogradNetwork(module, x)


@linearize_module.register
def _(module: nn.Dropout, x: Tensor) -> NetworkJacobian:
    idle = _is_plain(module, nn.Dropout) and (not module.training or module.p == 0)
    return IdentityJacobian(x) if idle else AutogradNetwork(module, x)


def linearize_elementwise(module: nn.Module, x: Tensor) -> NetworkJacobian:
    """The tangent of an elementwise module, its slope by autograd."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        # a copy: an activation that works in place must not do so on a leaf
        output = module(leaf.clone())
    (slope,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
    return DiagonalJacobian(output.detach(), slope)


for _kind in ACTIVATIONS:
    linearize_module.register(_kind, linearize_elementwise)


def _merged(v: Tensor) -> tuple[Tensor, list[int]]:
    """All leading dimensions of (..., C, H, W) as one, and their sizes."""
    return v.flatten(0, -4), list(v.shape[:-3])


def _channels_last(v: Tensor) -> Tensor:
    return v.contiguous(memory_format=torch.channels_last)


def _no_inverse(_: Tensor) -> Tensor:
    raise NotApplicable("a network has no inverse")

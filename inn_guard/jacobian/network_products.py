"""Products with the Jacobian of a network: what they are, by autograd, and of a convolution."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from inn_guard.core.layer_jacobian import (
    AutogradJacobian,
    Castable,
    Map,
    NotApplicable,
    Selectable,
)

__all__ = [
    "MANY_ROWS",
    "AutogradNetwork",
    "Convolution",
    "NetworkInDtype",
    "NetworkJacobian",
    "network_in_dtype",
    "with_output",
]

T = TypeVar("T")

#: rows (positions times samples) from which on a product of matrices in a shorter dtype is faster
MANY_ROWS = 512


@runtime_checkable
class NetworkJacobian(Protocol):
    """The products with the Jacobian J of a network at a batch.

    Attributes:
        output: the output of the network, detached.
    """

    output: Tensor

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (..., B, *in) -> (..., B, *out), a new tensor."""
        ...

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u: (..., B, *out) -> (..., B, *in), a new tensor."""
        ...


class AutogradNetwork:
    """The Jacobian of any differentiable map, by autograd."""

    def __init__(self, function: Map, x: Tensor) -> None:
        self._jacobian = AutogradJacobian(function, _no_inverse, x.detach())
        self.output = self._jacobian.output
        self._dims = x.dim()

    @property
    def is_zero(self) -> bool:
        """Whether autograd knows of no dependence of the output on the input."""
        return not self._jacobian.depends_on_input

    def jvp(self, v: Tensor) -> Tensor:
        """J v by forward mode, one pass per leading entry."""
        if v.dim() == self._dims:
            return self._jacobian.jvp(v)
        return torch.stack([self.jvp(row) for row in v])

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u by reverse mode."""
        if u.dim() <= self.output.dim() + 1:
            return self._jacobian.vjp(u)
        return torch.stack([self.vjp(row) for row in u])


class Convolution:
    """The Jacobian of a zero-padded convolution with ``weight`` (out, in, k, k).

    ``geometry`` is (stride, padding, dilation, groups).
    """

    def __init__(self, module: nn.Conv2d, x: Tensor) -> None:
        # channels last, in which convolutions on CPUs are faster
        self.weight = _channels_last(module.weight.detach())
        geometry: Any = (module.stride, module.padding, module.dilation, module.groups)
        self.geometry, self._shape = geometry, x.shape[1:]
        self.output = functional.conv2d(_channels_last(x), self.weight, module.bias, *self.geometry)

    @classmethod
    def of_weight(
        cls, weight: Tensor, geometry: Any, output: Tensor, shape: Sequence[int]
    ) -> Convolution:
        """The same for a convolution that has been evaluated: on inputs of this shape (B, ...)."""
        made = cls.__new__(cls)
        made.weight = _channels_last(weight)
        made.geometry, made._shape = geometry, torch.Size(shape)[1:]
        made.output = output.new_empty(()).expand(output.shape)
        return made

    def select(self, rows: Tensor) -> Convolution:
        """The Jacobian at these rows."""
        return with_output(self, self.output[rows])

    @property
    def has_many_rows(self) -> bool:
        """Whether there are enough positions and samples for a shorter dtype to be faster."""
        return len(self.output) * self.output.shape[2:].numel() >= MANY_ROWS

    def in_dtype(self, dtype: torch.dtype) -> Convolution:
        """The Jacobian whose products are computed, and returned, in ``dtype``."""
        clone = with_output(self, self.output)
        vars(clone).pop("_flipped", None)
        clone.weight = self.weight.to(dtype)
        return clone

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (..., B, *out)."""
        if v.dim() > 4:
            v, leading = _merged(v)
            return self.jvp(v).unflatten(0, leading)
        v = _channels_last(v.to(self.weight.dtype))
        return functional.conv2d(v, self.weight, None, *self.geometry)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u, (..., B, *in)."""
        if u.dim() > 4:
            u, leading = _merged(u)
            return self.vjp(u).unflatten(0, leading)
        u = _channels_last(u.to(self.weight.dtype))
        if self._flipped is None:
            return conv2d_input([len(u), *self._shape], self.weight, u, *self.geometry)
        kernel, padding = self._flipped
        return functional.conv2d(u, kernel, None, 1, padding)

    @functools.cached_property
    def _flipped(self) -> tuple[Tensor, list[int]] | None:
        """Kernel and padding of the transpose, where it is a convolution of stride 1; else None.

        A plain convolution with the flipped kernel is faster than ``conv2d_input``.
        """
        stride, before, dilation, groups = self.geometry
        padding = [k - 1 - p for k, p in zip(self.weight.shape[2:], before, strict=True)]
        if {*stride, *dilation, groups} != {1} or min(padding) < 0:
            return None
        return _channels_last(self.weight.flip(2, 3).transpose(0, 1)), padding


class NetworkInDtype:
    """The products of a network whose steps are computed in a shorter dtype.

    Args:
        inner: the Jacobian with all of its weights and slopes in ``dtype``.
        dtype: of what ``inner`` multiplies. Vectors are converted to it and back.
    """

    def __init__(self, inner: NetworkJacobian, dtype: torch.dtype) -> None:
        self.output = inner.output
        self._inner, self._dtype = inner, dtype

    def select(self, rows: Tensor) -> NetworkInDtype | None:
        """The Jacobian at these rows; None where the network cannot select them."""
        if not isinstance(self._inner, Selectable):
            return None
        part = self._inner.select(rows)
        return None if part is None else NetworkInDtype(part, self._dtype)

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (..., B, *out), in the dtype of v."""
        return self._inner.jvp(v.to(self._dtype)).to(v.dtype)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u, (..., B, *in), in the dtype of u."""
        return self._inner.vjp(u.to(self._dtype)).to(u.dtype)


def network_in_dtype(network: NetworkJacobian, dtype: torch.dtype) -> NetworkInDtype | None:
    """The network's products computed in ``dtype``.

    None for a network that is not known step by step, and where there are too few positions and
    samples for the shorter dtype to be faster.
    """
    output = network.output
    if output.dim() != 4 or len(output) * output.shape[2:].numel() < MANY_ROWS:
        return None
    if not isinstance(network, Castable):
        return None
    inner = network.in_dtype(dtype)
    return None if inner is None else NetworkInDtype(inner, dtype)


def with_output(jacobian: T, output: Tensor) -> T:
    """A shallow copy of the Jacobian with another output."""
    clone = copy.copy(jacobian)
    vars(clone)["output"] = output
    return clone


def _merged(v: Tensor) -> tuple[Tensor, list[int]]:
    """(..., C, H, W) with its leading dimensions merged into one, and their sizes."""
    return v.flatten(0, -4), list(v.shape[:-3])


def _channels_last(v: Tensor) -> Tensor:
    return v.contiguous(memory_format=torch.channels_last)


def _no_inverse(output: Tensor) -> Tensor:
    raise NotApplicable("a network has no inverse")

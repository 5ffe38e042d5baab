"""Linearization: Jacobian products of a chain of layers at the states of one forward pass.

J = J_n ... J_1 and J^-1 = J_1^-1 ... J_n^-1, with every factor at the state of the *forward* pass.
The numerical inverse of the whole chain never runs, so J^-1 v is right even where F^-1(F(x)) is
NaN. Products of many layers exceed the range of floats. A product is therefore stored as a unit
vector and the logarithm of its length.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import (
    AutogradJacobian,
    LayerJacobian,
    Map,
    Selectable,
    cast_where_large,
    random_vectors,
    select_from_all,
)
from inn_guard.core.readable import is_as_written, why_patched
from inn_guard.core.tensors import finite_rows, nonzero_or_one, peak, per_sample
from inn_guard.jacobian.allocator import retain_freed_memory
from inn_guard.jacobian.checks import check_inverse, check_inverse_jvp, check_jvp
from inn_guard.jacobian.recorded import recorded_jacobian

__all__ = ["Linearization", "LogScaledVector", "ScaledLinearization", "log_scaled"]

#: (jacobian, x, name, *, draw) -> the Jacobian itself, or one that is right
Check = Callable[..., LayerJacobian]

FEW = 4  #: samples with which the products of a layer are checked


@dataclass(frozen=True)
class LogScaledVector:
    """vector * exp(log_scale) for each sample.

    Attributes:
        vector: (B, *), of length one or zero.
        log_scale: natural logarithm of the length, (B,) float64.
    """

    vector: Tensor
    log_scale: Tensor

    @classmethod
    def from_vector(cls, vector: Tensor) -> LogScaledVector:
        """Split ``vector`` (B, *) into directions and logarithms of lengths."""
        zero = torch.zeros(len(vector), dtype=torch.float64, device=vector.device)
        return cls(vector, zero).normalized()

    def renormalized(self) -> LogScaledVector:
        """The same vectors with a largest entry of one where an entry nears the limits of floats.

        Where no sample does, this costs one pass and changes nothing. Zero and non-finite vectors
        stay as they are.
        """
        largest = peak(self.vector)
        if bool(_far_from_limits(largest).all()):
            return self
        return self._divided(nonzero_or_one(largest))

    def normalized(self) -> LogScaledVector:
        """The same vectors with directions of length one; zero and non-finite ones stay."""
        # first in units of the largest entry: the square of a float32 above 1e19 is infinite
        scaled = self.renormalized()
        return scaled._divided(nonzero_or_one(scaled.vector.flatten(1).norm(dim=1)))

    def log_norm(self) -> Tensor:
        """Natural logarithm of the length, (B,) float64: -inf for zero, NaN for non-finite ones."""
        return self.log_scale + self.vector.flatten(1).double().norm(dim=1).log()

    def log_largest(self, unit: Tensor) -> Tensor:
        """Natural logarithm of the largest entry in these units, (B,) float64; NaN stays NaN."""
        return self.log_scale + peak(self.vector.double() / unit).log()

    def value(self) -> Tensor:
        """The vectors themselves, in float64; entries beyond its range are 0 or infinite."""
        return self.vector.double() * per_sample(self.log_scale.exp(), self.vector)

    def _divided(self, size: Tensor) -> LogScaledVector:
        vector = self.vector / per_sample(size, self.vector)
        return LogScaledVector(vector, self.log_scale + size.double().log())


def log_scaled(product: Map) -> Callable[[Tensor], LogScaledVector]:
    """The same product with its result as a LogScaledVector."""
    return lambda v: LogScaledVector.from_vector(product(v))


class Linearization:
    """The layers of a model, linearised at the states of one forward pass over x.

    Args:
        model: the map; a model without layers() counts as one layer.
        x: data, (B, *data).

    Attributes:
        layers: the layers, first layer first.
        states: the layers' inputs and then the output, n + 1 tensors, detached.
        jacobians: the layers' Jacobians at ``states``.
    """

    def __init__(self, model: Invertible, x: Tensor) -> None:
        retain_freed_memory()
        self.layers = model.layers() or (model,)
        self.states = [x.detach()]
        self.jacobians: list[LayerJacobian] = []
        self._needs_renormalizing = False
        self._drawn: dict[Any, list[Tensor]] = {}
        self._forward_checked: set[int] = set()
        self._inverse_jvp_checked: set[int] = set()
        self._inverse_checked: set[int] = set()
        for layer in self.layers:
            jacobian = _linearize(layer, self.states[-1])
            self.jacobians.append(jacobian)
            self.states.append(jacobian.output)

    @property
    def output(self) -> Tensor:
        """z = F(x), (B, *latent)."""
        return self.states[-1]

    def jvp(self, v: Tensor | LogScaledVector) -> LogScaledVector:
        """J v for one v (B, *data) per sample.

        Raises:
            NotApplicable: if a layer has no correct forward-mode derivative and is too large for a
                dense Jacobian.
        """
        return self._chain(v, [self.forward_checked(k).jvp for k in self._numbers()])

    def vjp(self, u: Tensor | LogScaledVector) -> LogScaledVector:
        """J^T u for one u (B, *latent) per sample."""
        return self._chain(u, [jacobian.vjp for jacobian in reversed(self.jacobians)])

    def inverse_jvp(self, u: Tensor | LogScaledVector) -> LogScaledVector:
        """J^-1 u for one u (B, *latent) per sample.

        Raises:
            NotApplicable: if the inverse of a layer has no correct derivative: J^-1 J v is not v.
        """
        backwards = reversed(self._numbers())
        return self._chain(u, [self.inverse_checked(k).inverse_jvp for k in backwards])

    def inverse_vjp(self, v: Tensor | LogScaledVector) -> LogScaledVector:
        """J^-T v for one v (B, *data) per sample.

        Raises:
            NotApplicable: if the inverse of a layer has no correct derivative: J^-1 J v is not v.
        """
        return self._chain(v, [self.inverse_checked(k).inverse_vjp for k in self._numbers()])

    def forward_checked(self, k: int) -> LayerJacobian:
        """The Jacobian of layer k; its J v has been checked once against its J^T u."""
        if k not in self._forward_checked:
            self.jacobians[k] = self._checked(k, check_jvp)
            self._forward_checked.add(k)
        return self.jacobians[k]

    def inverse_jvp_checked(self, k: int) -> LayerJacobian:
        """The Jacobian of layer k; its J^-1 u has been checked once against its J v."""
        if k not in self._inverse_jvp_checked:
            self.forward_checked(k)
            self.jacobians[k] = self._checked(k, check_inverse_jvp)
            self._inverse_jvp_checked.add(k)
        return self.jacobians[k]

    def inverse_product(self, k: int) -> Map:
        """The function u -> J^-1 u of layer k; it has been checked once against J v."""
        return self.inverse_jvp_checked(k).inverse_jvp

    def inverse_checked(self, k: int) -> LayerJacobian:
        """The Jacobian of layer k; both inverse products have been checked once."""
        if k not in self._inverse_checked:
            self.forward_checked(k)
            self.jacobians[k] = self._checked(k, check_inverse)
            self._inverse_checked.add(k)
            self._inverse_jvp_checked.add(k)
        return self.jacobians[k]

    def select(self, rows: Tensor) -> Linearization | None:
        """The linearization of these samples only; None where a layer cannot select them."""
        chosen = select_from_all(self.jacobians, rows)
        if chosen is None:
            return None
        clone = copy.copy(self)
        clone.jacobians = chosen
        clone.states = [state[rows] for state in self.states]
        # what has been checked for all samples has been checked for these
        clone._forward_checked = set(self._forward_checked)
        clone._inverse_jvp_checked = set(self._inverse_jvp_checked)
        clone._inverse_checked = set(self._inverse_checked)
        return clone

    def in_dtype(self, dtype: torch.dtype) -> Linearization | None:
        """The linearization with its large products in ``dtype``; None where it has none.

        The products with all layers are checked first, in their own dtype.
        """
        jacobians = cast_where_large([self.inverse_checked(k) for k in self._numbers()], dtype)
        if jacobians is None:
            return None
        clone = copy.copy(self)
        clone.jacobians = jacobians
        clone._forward_checked = clone._inverse_jvp_checked = clone._inverse_checked = set(
            self._numbers()
        )
        return clone

    def _numbers(self) -> range:
        return range(len(self.jacobians))

    def _checked(self, k: int, check: Check) -> LayerJacobian:
        """What ``check`` returns for layer k. If a few samples pass, the others are not checked."""
        jacobian = self.jacobians[k]
        x = self.states[k]
        name = f"layer {k} ({self.layers[k].name})"
        few = None
        if isinstance(jacobian, Selectable) and len(x) > FEW:
            few = jacobian.select(self._few)
        if few is not None:
            checked = check(few, x[self._few], name, draw=self._random_vectors)
            if checked is few:
                return jacobian
        return check(jacobian, x, name, draw=self._random_vectors)

    @functools.cached_property
    def _few(self) -> Tensor:
        """Evenly spaced samples, of those that are finite if there are any."""
        finite = finite_rows(self.output)
        if not bool(finite.any()):
            finite = torch.ones_like(finite)
        rows = finite.nonzero()[:, 0]
        return rows[torch.linspace(0, len(rows) - 1, FEW, device=rows.device).round().long()]

    def _chain(self, v: Tensor | LogScaledVector, products: Sequence[Map]) -> LogScaledVector:
        """The products one after the other, applied to v; the length is kept as a logarithm."""
        scaled = v if isinstance(v, LogScaledVector) else LogScaledVector.from_vector(v)
        if not self._needs_renormalizing:
            # Optimistic: no rescaling between layers, and one test of all lengths at the end, since
            # every test waits for the device. Most chains stay in range.
            vector, lengths = scaled.vector, []
            for product in products:
                vector = product(vector)
                lengths.append(torch.linalg.vector_norm(vector, dim=tuple(range(1, vector.dim()))))
            if bool(_far_from_limits(torch.stack(lengths)).all()):
                return LogScaledVector(vector, scaled.log_scale).normalized()
            self._needs_renormalizing = True  # later products of this chain would fail as well
        for product in products:
            scaled = LogScaledVector(product(scaled.vector), scaled.log_scale).renormalized()
        return scaled.normalized()

    def _random_vectors(self, *like: Tensor) -> list[Tensor]:
        """`random_vectors`, drawn once for all layers of the same shapes."""
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in like)
        if key not in self._drawn:
            self._drawn[key] = random_vectors(*like)
        return self._drawn[key]


class ScaledLinearization:
    """The products of J S and its inverse, with S a diagonal matrix: x in other units.

    Args:
        linearization: of J.
        scale: the diagonal of S, in a shape that broadcasts against x.
    """

    def __init__(self, linearization: Linearization, scale: Tensor) -> None:
        self._inner = linearization
        self._scale = scale.to(linearization.states[0])
        self.states = linearization.states
        self.output = linearization.output

    def jvp(self, v: Tensor | LogScaledVector) -> LogScaledVector:
        """The product J S v, for one v (B, *data) per sample."""
        return self._inner.jvp(self._times(v, self._scale))

    def vjp(self, u: Tensor | LogScaledVector) -> LogScaledVector:
        """The product S J^T u, for one u (B, *latent) per sample."""
        return self._times(self._inner.vjp(u), self._scale)

    def inverse_jvp(self, u: Tensor | LogScaledVector) -> LogScaledVector:
        """The product S^-1 J^-1 u, for one u (B, *latent) per sample."""
        return self._times(self._inner.inverse_jvp(u), 1 / self._scale)

    def inverse_vjp(self, v: Tensor | LogScaledVector) -> LogScaledVector:
        """The product J^-T S^-1 v, for one v (B, *data) per sample."""
        return self._inner.inverse_vjp(self._times(v, 1 / self._scale))

    def select(self, rows: Tensor) -> ScaledLinearization | None:
        """The same for these samples; None where a layer cannot select them."""
        part = self._inner.select(rows)
        if part is None:
            return None
        scale = self._scale
        if scale.dim() == self.states[0].dim() and len(scale) > 1:
            scale = scale[rows]  # it differs between samples
        return ScaledLinearization(part, scale)

    def in_dtype(self, dtype: torch.dtype) -> ScaledLinearization | None:
        """The same with large products in ``dtype``; None where there are none."""
        cast = self._inner.in_dtype(dtype)
        return None if cast is None else ScaledLinearization(cast, self._scale)

    @staticmethod
    def _times(v: Tensor | LogScaledVector, scale: Tensor) -> LogScaledVector:
        if not isinstance(v, LogScaledVector):
            v = LogScaledVector.from_vector(v)
        return LogScaledVector(v.vector * scale, v.log_scale).normalized()


def _linearize(layer: Invertible, x: Tensor) -> LayerJacobian:
    """The layer's own Jacobian if the layer computes what its class says, else by autograd."""
    if why_patched(layer.block) is None and is_as_written(layer, "linearize"):
        jacobian = layer.linearize(x)
    else:
        # hooks, methods of this instance and overridden ones change the map, which only autograd
        # through it can tell
        jacobian = AutogradJacobian(layer, layer.inverse, x)
    if isinstance(jacobian, AutogradJacobian):
        return recorded_jacobian(layer, x, jacobian)
    return jacobian


def _far_from_limits(size: Tensor) -> Tensor:
    """Whether lengths or largest entries are far from the limits of the range of their dtype."""
    # squares are summed for norms: with the fourth root they have half of the range to spare
    limit = torch.finfo(size.dtype).max ** 0.25
    return (size > 1 / limit) & (size < limit)

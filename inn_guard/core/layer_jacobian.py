"""The four linear maps of one differentiable layer at one batch, by autograd.

Every sample b of a batch x (B, *data) has its own Jacobian J_b. A LayerJacobian multiplies it, its
transpose, its inverse and its inverse transpose with one vector per sample, and forms no matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from inn_guard.core.missing import NotApplicable
from inn_guard.core.tensors import finite_rows

__all__ = [
    "INEXACT",
    "ROUNDING",
    "AutogradJacobian",
    "Castable",
    "LayerJacobian",
    "Map",
    "NotApplicable",
    "Selectable",
    "SelfChecking",
    "cast_where_large",
    "is_adjoint_pair",
    "random_vectors",
    "select_from_all",
]

#: a function of one tensor: a map of a batch, or a product with its Jacobian
Map = Callable[[Tensor], Tensor]

ROUNDING = 100.0  #: accepted error of a product, in units of eps
INEXACT = 1e-3  #: always accepted: derivatives of maps that iterate with a loose stopping rule


@runtime_checkable
class LayerJacobian(Protocol):
    """The linear maps of z = F(x) at a batch x, one vector per sample each.

    Attributes:
        output: F(x), shape (B, *latent), detached.
    """

    output: Tensor

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (B, *data) -> (B, *latent)."""
        ...

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u: (B, *latent) -> (B, *data)."""
        ...

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """J^-1 u: (B, *latent) -> (B, *data)."""
        ...

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """J^-T v: (B, *data) -> (B, *latent)."""
        ...


@runtime_checkable
class Selectable(Protocol):
    """A LayerJacobian that can be restricted to some samples of its batch."""

    def select(self, rows: Tensor) -> Any:
        """The Jacobian of these rows (indices or a mask); None where a part cannot be selected."""
        ...


@runtime_checkable
class Castable(Protocol):
    """A Jacobian whose large matrix products can be computed in a shorter dtype."""

    def in_dtype(self, dtype: torch.dtype) -> Any:
        """The same Jacobian with its large products in ``dtype``; None where it has none."""
        ...


@runtime_checkable
class SelfChecking(Protocol):
    """A LayerJacobian that checks its own products when it first uses them."""

    def forward_transposes(self) -> bool:
        """Whether J v and J^T u, as far as they have been used, are transposes of each other."""
        ...


class _Recorded:
    """A map at one point with its graph kept, so that J^T u and J v cost one backward pass each."""

    def __init__(self, function: Map, point: Tensor) -> None:
        self.function = function
        self.leaf = point.detach().clone().requires_grad_()
        with torch.enable_grad():
            # a copy: a map that writes into its input may not write into a leaf
            self.value = function(self.leaf.clone())
        self._jvp: Map | None = None
        self.is_adjoint_pair = False  #: whether J v was measured to be the transpose of J^T u

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u. A leading dimension that the value does not have holds several u per sample."""
        if not self.value.requires_grad:
            raise NotApplicable(
                "the map has no derivative: "
                "its output does not depend on its input through autograd"
            )
        batched = u.dim() > self.value.dim()
        try:
            (gradient,) = torch.autograd.grad(
                self.value,
                self.leaf,
                u,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
        except torch.OutOfMemoryError:
            raise
        # an autograd function of the model's own may raise anything
        except Exception as error:
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise NotApplicable(
                f"the map has no derivative: its backward pass raises {said}"
            ) from error
        if gradient is None:
            raise NotApplicable(
                "the map has no derivative: autograd found no path from its output to its input"
            )
        return gradient

    def jvp(self, v: Tensor) -> Tensor:
        """J v: by transposing u -> J^T u, a linear map, if that is right; else by forward mode."""
        if self._jvp is None:
            self._jvp = self._transposed() or self._forward_mode
        return self._jvp(v)

    def _transposed(self) -> Map | None:
        """The derivative of u -> J^T u; None if a second derivative is missing or wrong."""
        # J^T u is linear in u: its derivative, J, is the same at every u, so also at zero
        u = torch.zeros_like(self.value).requires_grad_()
        try:
            with torch.enable_grad():
                (image,) = torch.autograd.grad(self.value, self.leaf, u, create_graph=True)

            def jvp(v: Tensor) -> Tensor:
                return torch.autograd.grad(image, u, v, retain_graph=True)[0]

            v, w = random_vectors(self.leaf, self.value)
            self.is_adjoint_pair = is_adjoint_pair(jvp(v), w, v, self.vjp(w))
        except RuntimeError:  # also NotApplicable: forward mode then says what is missing
            return None
        if not self.is_adjoint_pair:
            return None
        return jvp

    def _forward_mode(self, v: Tensor) -> Tensor:
        """J v by one more pass of the map, in forward mode."""
        with forward_ad.dual_level(), torch.enable_grad():
            # both are copies: a map that writes into its input would write into v, too
            dual = forward_ad.make_dual(self.leaf.detach().clone(), v.detach().clone())
            tangent = forward_ad.unpack_dual(self.function(dual)).tangent
        if tangent is None:
            raise NotApplicable("the map has no forward-mode derivative")
        return tangent.detach()


def select_from_all(jacobians: Sequence[LayerJacobian], rows: Tensor) -> list[LayerJacobian] | None:
    """Each Jacobian at these rows (indices or a mask); None where one cannot select them."""
    chosen = []
    for jacobian in jacobians:
        part = jacobian.select(rows) if isinstance(jacobian, Selectable) else None
        if part is None:
            return None
        chosen.append(part)
    return chosen


def cast_where_large(
    jacobians: Sequence[LayerJacobian], dtype: torch.dtype
) -> list[LayerJacobian] | None:
    """Each Jacobian with its large products in ``dtype``, if it has any; None if none has."""
    cast = [part.in_dtype(dtype) if isinstance(part, Castable) else None for part in jacobians]
    if all(part is None for part in cast):
        return None
    return [new or old for new, old in zip(cast, jacobians, strict=True)]


def random_vectors(*like: Tensor) -> list[Tensor]:
    """Standard normal vectors of these shapes, dtypes and devices, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(t.shape, generator=generator, device="cpu", dtype=torch.float64).to(t)
        for t in like
    ]


def is_adjoint_pair(u: Tensor, w: Tensor, v: Tensor, back: Tensor) -> bool:
    """Whether u = A v and back = A^T w belong to the same A: <u, w> = <v, back> for every sample.

    v and w are standard normal. Samples with entries that are not finite are left out. Both sides
    are sums with random signs, of the size of |u| rather than |u| |w|: deviations are compared with
    |u|, in units of rounding errors and of loosely iterated derivatives.
    """
    eps = torch.finfo(u.dtype).eps
    if _agrees(u, w, v, back, eps=eps):
        return True
    # float64 only now: the conversion is rarely needed, and squares of float32 may overflow
    finite = finite_rows(u) & finite_rows(back)
    return _agrees(*(t[finite].double() for t in (u, w, v, back)), eps=eps)


def _agrees(u: Tensor, w: Tensor, v: Tensor, back: Tensor, *, eps: float) -> bool:
    """Whether <u, w> = <v, back> up to rounding, in the dtype of the vectors."""
    size = max(v[:1].numel(), w[:1].numel())
    # sums in half precision would lose more digits than the products that they judge
    u, w, v, back = (
        t.reshape(len(t), -1).to(torch.promote_types(t.dtype, torch.float32))
        for t in (u, w, v, back)
    )
    gap = ((u * w).sum(1) - (v * back).sum(1)).abs()
    tolerance = max(ROUNDING * eps * math.sqrt(size), INEXACT)
    allowed = tolerance * torch.maximum(u.norm(dim=1), back.norm(dim=1))
    return bool(((gap <= allowed) & allowed.isfinite()).all())


class AutogradJacobian:
    """The four maps of a layer that is given as two callables: its forward map and its inverse.

    The inverse is evaluated at most once, at F(x) of this layer: never at a state that the
    numerical inverse of later layers has computed.
    """

    def __init__(self, forward: Map, inverse: Map, x: Tensor) -> None:
        self._forward = _Recorded(forward, x)
        self._inverse_map = inverse
        self._inverse: _Recorded | None = None
        self.output = self._forward.value.detach()

    @property
    def depends_on_input(self) -> bool:
        """Whether autograd knows of a dependence of F(x) on x."""
        return self._forward.value.requires_grad

    def forward_transposes(self) -> bool:
        """Whether J v was measured to belong to J^T u: <J v, w> = <v, J^T w> on random vectors."""
        return self._forward.is_adjoint_pair

    @property
    def _backward(self) -> _Recorded:
        """The inverse at F(x). Many audits need the forward products only: recorded on demand."""
        if self._inverse is None:
            self._inverse = _Recorded(self._inverse_map, self.output)
        return self._inverse

    def jvp(self, v: Tensor) -> Tensor:
        """J v by transposing J^T u, or by forward mode."""
        return self._forward.jvp(v)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u by reverse mode; u may carry one leading dimension of rows."""
        return self._forward.vjp(u)

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """J^-1 u through the inverse, by transposing its reverse mode or by forward mode."""
        return self._backward.jvp(u)

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """J^-T v by reverse mode through the inverse."""
        return self._backward.vjp(v)

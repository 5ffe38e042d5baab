"""Checks of a layer's products. A wrong product is replaced by one with the dense Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.core.layer_jacobian import (
    INEXACT,
    ROUNDING,
    LayerJacobian,
    NotApplicable,
    SelfChecking,
    is_adjoint_pair,
    random_vectors,
)
from inn_guard.core.tensors import finite_rows

__all__ = [
    "FromLU",
    "FromRows",
    "check_inverse",
    "check_inverse_jvp",
    "check_jvp",
    "dense_jacobian",
]

#: tensors -> random vectors of their shapes, the same at every call: `random_vectors`
Draw = Callable[..., list[Tensor]]

MAX_ENTRIES = 2**27  #: of the float64 Jacobians of all samples together: 1 GiB


class FromLU:
    """A layer's Jacobian whose J^-1 and J^-T solve with an LU factorisation of its dense J.

    The factorisation is in float64, one for each sample.
    """

    def __init__(self, jacobian: LayerJacobian, x: Tensor) -> None:
        self._data_shape = x.shape
        self.output = jacobian.output
        self.jvp, self.vjp = jacobian.jvp, jacobian.vjp
        self._factors = torch.linalg.lu_factor_ex(dense_jacobian(jacobian, x).double())[:2]

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """J^-1 u: (B, *latent) -> (B, *data)."""
        return self._solve(u, adjoint=False).reshape(self._data_shape)

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """J^-T v: (B, *data) -> (B, *latent)."""
        return self._solve(v, adjoint=True).reshape(self.output.shape)

    def _solve(self, right: Tensor, *, adjoint: bool) -> Tensor:
        columns = right.flatten(1).double().unsqueeze(2)
        solution = torch.linalg.lu_solve(*self._factors, columns, adjoint=adjoint)
        return solution.squeeze(2).to(right.dtype)


class FromRows:
    """A layer's Jacobian whose J v multiplies with the dense J, whose rows are J^T e_k."""

    def __init__(self, jacobian: LayerJacobian, x: Tensor) -> None:
        self.output, self.vjp = jacobian.output, jacobian.vjp
        self.inverse_jvp, self.inverse_vjp = jacobian.inverse_jvp, jacobian.inverse_vjp
        self._rows = dense_jacobian(jacobian, x)

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (B, *data) -> (B, *latent)."""
        return torch.einsum("bmn,bn->bm", self._rows, v.flatten(1)).reshape(self.output.shape)


def dense_jacobian(jacobian: LayerJacobian, x: Tensor) -> Tensor:
    """The Jacobians of one layer, (B, dim z, dim x), with one J^T u of the whole batch per row."""
    size = jacobian.output[0].numel()
    basis = torch.zeros_like(jacobian.output).reshape(len(x), size)
    rows = []
    for k in range(size):
        basis.zero_()[:, k] = 1
        # cloned: the identity's J^T u is u itself, which the next row overwrites
        rows.append(jacobian.vjp(basis.reshape(jacobian.output.shape)).flatten(1).clone())
    return torch.stack(rows, dim=1)


def check_jvp(
    jacobian: LayerJacobian, x: Tensor, name: str, *, draw: Draw = random_vectors
) -> LayerJacobian:
    """``jacobian`` if its J v and its J^T u are transposes; else one that forms J row by row.

    Measured on random vectors: <J v, w> = <v, J^T w> for every sample, up to rounding. This also
    finds operations without a forward-mode derivative.

    Args:
        jacobian: of the layer at x.
        x: input of the layer.
        name: of the layer, for messages.
        draw: draws the random vectors.

    Raises:
        NotApplicable: if J v is wrong or missing and the layer is too large for a dense Jacobian.
    """
    try:
        reason = _asymmetry(jacobian, x, draw)
    except (NotApplicable, NotImplementedError, RuntimeError) as error:
        reason = f"its forward-mode derivative fails ({type(error).__name__}: {error})"
    if reason is None:
        return jacobian
    if x.numel() * jacobian.output[0].numel() > MAX_ENTRIES:
        raise NotApplicable(
            f"{name}: {reason}; the layer is too large to form its Jacobian row by row instead"
        )
    return FromRows(jacobian, x)


def check_inverse(
    jacobian: LayerJacobian, x: Tensor, name: str, *, draw: Draw = random_vectors
) -> LayerJacobian:
    """``jacobian`` if its inverse products are right; else one that solves with the forward J.

    Measured on random vectors: J^-1 J v = v and <J^-1 u, w> = <u, J^-T w> for every sample, up to
    rounding. A layer whose inverse is not differentiable, or has a wrong derivative, gets its J^-1
    from an LU factorisation of J.

    Args:
        jacobian: of the layer at x.
        x: input of the layer.
        name: of the layer, for messages.
        draw: draws the random vectors.

    Raises:
        NotApplicable: if an inverse product is wrong or missing and the layer is too large to be
            solved, or not square.
    """
    return _else_lu(jacobian, x, name, lambda: _disagreement(jacobian, x, draw))


def check_inverse_jvp(
    jacobian: LayerJacobian, x: Tensor, name: str, *, draw: Draw = random_vectors
) -> LayerJacobian:
    """``jacobian`` if J^-1 J v = v, up to rounding; else one that solves with the forward J.

    J^-T is checked only if J^-1 seems wrong.

    Args:
        jacobian: of the layer at x.
        x: input of the layer.
        name: of the layer, for messages.
        draw: draws the random vectors.

    Raises:
        NotApplicable: as in `check_inverse`.
    """

    def reason() -> str | None:
        """What is wrong with J^-1 u; None if nothing is."""
        (v,) = draw(x)
        difference = jacobian.inverse_jvp(jacobian.jvp(v)) - v
        gap = difference.flatten(1).norm(dim=1)
        if bool((gap <= INEXACT * v.flatten(1).norm(dim=1)).all()):
            return None
        # rounding may explain it in an ill-conditioned layer, which only its transpose can tell
        return _disagreement(jacobian, x, draw)

    return _else_lu(jacobian, x, name, reason)


def _else_lu(
    jacobian: LayerJacobian, x: Tensor, name: str, measure: Callable[[], str | None]
) -> LayerJacobian:
    """``jacobian`` if ``measure`` finds nothing wrong with it; else one that solves by LU."""
    try:
        reason = measure()
    except (NotApplicable, NotImplementedError, RuntimeError, ValueError) as error:
        reason = f"its inverse cannot be differentiated ({type(error).__name__}: {error})"
    if reason is None:
        return jacobian
    size, out_size = x[0].numel(), jacobian.output[0].numel()
    if size != out_size:
        raise NotApplicable(
            f"{name}: {reason}; its Jacobian is {out_size} x {size}, which has no inverse"
        )
    if len(x) * size * size > MAX_ENTRIES:
        raise NotApplicable(
            f"{name}: {reason}; D = {size} is too large to solve with the forward Jacobian instead"
        )
    return FromLU(jacobian, x)


def _asymmetry(jacobian: LayerJacobian, x: Tensor, draw: Draw) -> str | None:
    """What is wrong with J v; None if nothing is."""
    v, w = draw(x, jacobian.output)
    # before the question whether it has checked itself: it does so at the first product
    u = jacobian.jvp(v)
    if isinstance(jacobian, SelfChecking) and jacobian.forward_transposes():
        return None
    if is_adjoint_pair(u, w, v, jacobian.vjp(w)):
        return None
    return "forward- and reverse-mode derivatives disagree"


def _disagreement(jacobian: LayerJacobian, x: Tensor, draw: Draw) -> str | None:
    """What is wrong with the inverse products; None if nothing is."""
    v, w = draw(x, x)
    u = jacobian.jvp(v)
    back = jacobian.inverse_jvp(u)
    adjoint = jacobian.inverse_vjp(w)
    eps = torch.finfo(x.dtype).eps
    gaps = _gaps(v, w, u, back, adjoint, eps=eps)
    if gaps.agree():
        return None
    # samples that are not finite do not count; the squares of large numbers need float64
    finite = finite_rows(u) & finite_rows(x) & finite_rows(jacobian.output)
    if not bool(finite.any()):
        return None
    gaps = _gaps(*(t[finite].double() for t in (v, w, u, back, adjoint)), eps=eps)
    if not bool((gaps.round_trip <= gaps.tolerance).all()):
        worst = gaps.round_trip.nan_to_num(math.inf, posinf=math.inf).max().item()
        return (
            "the derivative of its inverse is wrong "
            f"(J^-1 J v differs from v by {worst:.1e} of |v|)"
        )
    if gaps.agree():
        return None
    return "forward- and reverse-mode derivatives of its inverse disagree"


@dataclass(frozen=True)
class _Gaps:
    """How far the inverse products are from right, relative to |v|, (B,) each.

    Attributes:
        round_trip: of J^-1 J v from v.
        pairing: of <J^-1 u, w> from <u, J^-T w>.
        tolerance: what rounding explains.
    """

    round_trip: Tensor
    pairing: Tensor
    tolerance: Tensor

    def agree(self) -> bool:
        """Whether rounding explains both deviations of every sample; it does not explain NaN."""
        small = torch.maximum(self.round_trip, self.pairing) <= self.tolerance
        return bool((small & self.tolerance.isfinite()).all())


def _gaps(v: Tensor, w: Tensor, u: Tensor, back: Tensor, adjoint: Tensor, *, eps: float) -> _Gaps:
    """The deviations, from u = J v, back = J^-1 u and adjoint = J^-T w."""
    v, w, u, back, adjoint = (
        t.flatten(1).to(torch.promote_types(t.dtype, torch.float32))
        for t in (v, w, u, back, adjoint)
    )
    length = v.norm(dim=1)
    # estimates |J| |J^-1|, by which J^-1 J v amplifies a rounding error
    growth = (u.norm(dim=1) / length) * (adjoint.norm(dim=1) / w.norm(dim=1))
    return _Gaps(
        round_trip=(back - v).norm(dim=1) / length,
        pairing=((back * w).sum(1) - (u * adjoint).sum(1)).abs() / length,
        tolerance=torch.clamp(ROUNDING * eps * math.sqrt(v.shape[1]) * growth, min=INEXACT),
    )

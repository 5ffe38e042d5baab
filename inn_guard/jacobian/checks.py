"""Checking a layer's inverse derivative, and solving with its forward Jacobian where the library's inverse is wrong."""

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
    probes,
)

__all__ = [
    "FromLU",
    "FromRows",
    "check_inverse",
    "check_inverse_jvp",
    "check_jvp",
    "dense_jacobian",
]

Draw = Callable[
    ..., list[Tensor]
]  #: tensors -> random vectors of their shapes, always the same: `probes`

MAX_ENTRIES = 2**27  #: of all samples' float64 Jacobians together: 1 GiB


class FromLU:
    """A layer's maps with J^-1 and J^-T solved by LU in float64 from its dense forward Jacobian, sample by sample."""

    def __init__(self, tangent: LayerJacobian, x: Tensor) -> None:
        self._tangent, self._data_shape = tangent, x.shape
        self.output, self.jvp, self.vjp = tangent.output, tangent.jvp, tangent.vjp
        self._factors = torch.linalg.lu_factor_ex(dense_jacobian(tangent, x).double())[:2]

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """J^-1 u: (B, *latent) -> (B, *data)."""
        return self._solve(u, adjoint=False).reshape(self._data_shape)

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """J^-T v: (B, *data) -> (B, *latent)."""
        return self._solve(v, adjoint=True).reshape(self.output.shape)

    def _solve(self, right: Tensor, *, adjoint: bool) -> Tensor:
        columns = right.flatten(1).double().unsqueeze(2)
        return (
            torch.linalg.lu_solve(*self._factors, columns, adjoint=adjoint)
            .squeeze(2)
            .to(right.dtype)
        )


class FromRows:
    """A layer's maps with J v taken from its dense Jacobian, whose rows are J^T e_k."""

    def __init__(self, tangent: LayerJacobian, x: Tensor) -> None:
        self.output, self.vjp = tangent.output, tangent.vjp
        self.inverse_jvp, self.inverse_vjp = tangent.inverse_jvp, tangent.inverse_vjp
        self._rows = dense_jacobian(tangent, x)

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (B, *data) -> (B, *latent)."""
        return torch.einsum("bmn,bn->bm", self._rows, v.flatten(1)).reshape(self.output.shape)


def dense_jacobian(tangent: LayerJacobian, x: Tensor) -> Tensor:
    """The Jacobians of one layer row by row: (B, dim z, dim x), one J^T u over the whole batch per row."""
    size = tangent.output[0].numel()
    basis = torch.zeros_like(tangent.output).reshape(len(x), size)
    rows = []
    for k in range(size):
        basis.zero_()[:, k] = 1
        # cloned: the identity's J^T u is u itself, which the next row overwrites
        rows.append(tangent.vjp(basis.reshape(tangent.output.shape)).flatten(1).clone())
    return torch.stack(rows, dim=1)


def check_jvp(
    tangent: LayerJacobian, x: Tensor, name: str, *, draw: Draw = probes
) -> LayerJacobian:
    """``tangent`` if its J v is the transpose of its J^T u; else one that forms J from its rows J^T e_k.

    Measured on random vectors: <J v, w> = <v, J^T w> per sample, up to rounding. Operations without a forward-mode
    derivative are found this way too.

    Raises:
        NotApplicable: if forward mode is wrong or missing and the layer is too large for a dense Jacobian.
    """
    try:
        reason = _asymmetry(tangent, x, draw)
    except (NotApplicable, NotImplementedError, RuntimeError) as error:
        reason = f"its forward-mode derivative fails ({type(error).__name__}: {error})"
    if reason is None:
        return tangent
    if x.numel() * tangent.output[0].numel() > MAX_ENTRIES:
        raise NotApplicable(
            f"{name}: {reason}; it is too large to form its Jacobian from reverse mode instead"
        )
    return FromRows(tangent, x)


def check_inverse(
    tangent: LayerJacobian, x: Tensor, name: str, *, draw: Draw = probes
) -> LayerJacobian:
    """``tangent`` if its inverse maps are the inverse of its forward maps; else one that solves with the forward J.

    Measured on random vectors: J^-1 J v = v and <J^-1 u, w> = <u, J^-T w> per sample, up to rounding. A layer without
    a differentiable inverse, or with a wrong derivative of it, gets its J^-1 from an LU factorisation of J.

    Raises:
        NotApplicable: if the inverse is wrong or missing and the layer is too large, or not square, to be solved.
    """
    return _or_solving(tangent, x, name, lambda: _disagreement(tangent, x, draw))


def check_inverse_jvp(
    tangent: LayerJacobian, x: Tensor, name: str, *, draw: Draw = probes
) -> LayerJacobian:
    """``tangent`` if J^-1 J v = v for random v, up to rounding; else one that solves with the forward J.

    For who applies J^-1 only: J^-T is not looked at.

    Raises:
        NotApplicable: as `check_inverse`.
    """

    def reason() -> str | None:
        (v,) = draw(x)
        back = tangent.inverse_jvp(tangent.jvp(v))
        exact = bool(
            ((back - v).flatten(1).norm(dim=1) <= INEXACT * v.flatten(1).norm(dim=1)).all()
        )
        # an ill-conditioned layer may be right to no more than rounding allows, which its transpose tells
        return None if exact else _disagreement(tangent, x, draw)

    return _or_solving(tangent, x, name, reason)


def _or_solving(
    tangent: LayerJacobian, x: Tensor, name: str, measure: Callable[[], str | None]
) -> LayerJacobian:
    try:
        reason = measure()
    except (NotApplicable, NotImplementedError, RuntimeError, ValueError) as error:
        reason = f"its inverse cannot be differentiated ({type(error).__name__}: {error})"
    if reason is None:
        return tangent
    size, out_size = x[0].numel(), tangent.output[0].numel()
    if size != out_size:
        raise NotApplicable(
            f"{name}: {reason}; its Jacobian is {out_size} x {size}, which has no inverse"
        )
    if len(x) * size * size > MAX_ENTRIES:
        raise NotApplicable(
            f"{name}: {reason}; D = {size} is too large to solve with its forward Jacobian instead"
        )
    return FromLU(tangent, x)


def _asymmetry(tangent: LayerJacobian, x: Tensor, draw: Draw) -> str | None:
    v, w = draw(x, tangent.output)
    u = tangent.jvp(v)
    if isinstance(tangent, SelfChecking) and tangent.forward_transposes():
        return None
    if is_adjoint_pair(u, w, v, tangent.vjp(w)):
        return None
    return "forward- and reverse-mode derivatives disagree"


def _disagreement(tangent: LayerJacobian, x: Tensor, draw: Draw) -> str | None:
    """What is wrong with the inverse maps, measured; None if nothing is."""
    v, w = draw(x, x)
    u = tangent.jvp(v)
    back, adjoint = tangent.inverse_jvp(u), tangent.inverse_vjp(w)
    gaps = _gaps(v, w, u, back, adjoint, eps=torch.finfo(x.dtype).eps)
    if gaps.agree():
        return None
    # samples that are not finite say nothing about the others; float64 has room for the squares of what is large
    finite = _finite(u) & _finite(x) & _finite(tangent.output)
    if not bool(finite.any()):
        return None
    gaps = _gaps(
        *(t[finite].double() for t in (v, w, u, back, adjoint)), eps=torch.finfo(x.dtype).eps
    )
    if not bool((gaps.roundtrip <= gaps.tolerance).all()):
        worst = gaps.roundtrip.nan_to_num(math.inf).max().item()
        return f"the derivative of its inverse is wrong (J^-1 J v differs from v by {worst:.1e} of |v|)"
    return None if gaps.agree() else "forward- and reverse-mode derivatives of its inverse disagree"


@dataclass(frozen=True)
class _Gaps:
    """How far J^-1 J v is from v, and <J^-1 u, w> from <u, J^-T w>, and what rounding explains; (B,) each."""

    roundtrip: Tensor
    pairing: Tensor
    tolerance: Tensor

    def agree(self) -> bool:
        """Whether rounding explains both for every sample; not a number is not explained."""
        small = torch.maximum(self.roundtrip, self.pairing) <= self.tolerance
        return bool((small & self.tolerance.isfinite()).all())


def _gaps(v: Tensor, w: Tensor, u: Tensor, back: Tensor, adjoint: Tensor, *, eps: float) -> _Gaps:
    v, w, u, back, adjoint = (
        t.flatten(1).to(torch.promote_types(t.dtype, torch.float32))
        for t in (v, w, u, back, adjoint)
    )
    length = v.norm(dim=1)
    growth = (u.norm(dim=1) / length) * (adjoint.norm(dim=1) / w.norm(dim=1))
    return _Gaps(
        roundtrip=(back - v).norm(dim=1) / length,
        pairing=((back * w).sum(1) - (u * adjoint).sum(1)).abs() / length,
        tolerance=torch.clamp(ROUNDING * eps * math.sqrt(v.shape[1]) * growth, min=INEXACT),
    )


def _finite(t: Tensor) -> Tensor:
    return t.flatten(1).isfinite().all(1)

"""log|det J| of a layer: exact from its structure or a dense Jacobian, or bounded from products."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import AutogradJacobian
from inn_guard.core.missing import Missing, NotApplicable
from inn_guard.core.tensors import finite_rows
from inn_guard.jacobian.chain import Linearization, log_scaled
from inn_guard.jacobian.elimination import (
    eliminate_columns,
    eliminate_halves,
    eliminate_positions,
    nothing_eliminated,
)
from inn_guard.jacobian.lanczos import Bidiagonalization
from inn_guard.jacobian.singular_values import (
    extreme_singular_values,
    jacobian_rows,
    resolution,
)

__all__ = [
    "LayerLogDet",
    "StochasticLogDet",
    "layer_log_det",
    "stochastic_log_det",
]

#: Up to this dimension a dense Jacobian costs no more than a search for structure.
SMALL = 16


@dataclass(frozen=True)
class LayerLogDet:
    """The determinant of one layer's Jacobian at a batch.

    Attributes:
        log_abs: log|det J| in nats, (B,) float64; -inf where J is singular.
        sign: of det J, 1 or -1, (B,), up to one sign that all samples share; 0 where J is singular,
            NaN where it is not known.
        dense: the size of the dense matrices that were decomposed, 0 if there were none.
    """

    log_abs: Tensor
    sign: Tensor
    dense: int


def layer_log_det(
    layer: Invertible, x: Float[Tensor, "batch *data"], *, max_dense: int
) -> LayerLogDet | Missing:
    """log|det J| of one layer, without a random error.

    For a chain, the sum over its layers is accurate where the determinant of the product is not:
    the condition number of a layer is far below that of the chain.

    In float64 the simple columns of J are found and expanded along (`jacobian.elimination`); for
    couplings and elementwise maps of any dimension this takes a dozen products J^T u of the whole
    batch. What is left is formed row by row and decomposed. In other dtypes all of J is.

    Args:
        layer: with as many outputs as inputs.
        x: its input, (B, *data).
        max_dense: the largest matrix that is formed for each sample.

    Returns:
        Missing if a larger one would be needed.

    Raises:
        NotApplicable: if the output does not depend on the input through autograd, or has another
            number of entries.
    """
    jacobian = AutogradJacobian(layer.forward, layer.forward, x)
    outputs, inputs = jacobian.output[0].numel(), x[0].numel()
    if outputs != inputs:
        raise NotApplicable(
            f"{layer.name} has {outputs} outputs for {inputs} inputs: its Jacobian has no "
            "determinant"
        )
    left = nothing_eliminated(jacobian, x)
    if x.dtype == torch.float64 and x[0].numel() > SMALL:
        left = eliminate_columns(jacobian, x)
        if len(left.rows):
            left = eliminate_halves(jacobian, x) or eliminate_positions(jacobian, x) or left
    size = len(left.rows)
    if size > max_dense:
        return Missing(f"the Jacobian of {layer.name} has no structure in {size} dimensions")
    if size == 0:
        return LayerLogDet(left.log_abs, left.sign, 0)
    J = jacobian_rows(jacobian, x, left.rows.tolist())[:, :, left.columns].double()
    # a NaN in one sample's matrix must not decide what the others get
    finite = finite_rows(J)
    sign, log_abs = torch.linalg.slogdet(torch.where(finite[:, None, None], J, 0.0))
    log_abs = torch.where(finite, log_abs, math.nan)
    sign = torch.where(finite & _sign_is_known(J, sign), sign, math.nan)
    return LayerLogDet(left.log_abs + log_abs, left.sign * sign, size)


def _sign_is_known(J: Tensor, sign: Tensor) -> Tensor:
    """Whether rounding cannot have turned the sign of det J, (B,); looked at where signs differ."""
    known = torch.ones_like(sign, dtype=torch.bool)
    if not (bool((sign > 0).any()) and bool((sign < 0).any())):
        return known
    sigma = torch.linalg.svdvals(J.nan_to_num(0.0))
    return sigma[:, -1] > resolution(torch.float64) * sigma[:, 0]


@dataclass(frozen=True)
class StochasticLogDet:
    """An estimate of log|det J| in nats, (B,) float64 each.

    Attributes:
        value: the middle of both quadrature rules' means over the probes.
        standard_error: of the means, from the scatter of the probes.
        bias: half the distance of both rules: the mean over all probes lies no further from
            ``value``; infinite where the smallest singular value is not known.
    """

    value: Tensor
    standard_error: Tensor
    bias: Tensor


def stochastic_log_det(
    linearization: Linearization,
    k: int,
    *,
    probes: int = 8,
    steps: int = 32,
    generator: torch.Generator,
) -> StochasticLogDet:
    """log|det J| = 1/2 tr log J^T J of layer k from products alone.

    Stochastic Lanczos quadrature. Let v be a vector of random signs, of unit length, and B the
    bidiagonal projection of the layer's Jacobian started from v. Then v^T log(J^T J) v is
    sum_i q_i^2 log theta_i^2, with theta_i the singular values of B and q_i the first entries of
    its right singular vectors. Two rules of different order bound it: Gauss's from above, and from
    below Gauss-Radau's with one more node, at or below the smallest eigenvalue of J^T J, since the
    even derivatives of the logarithm are negative and the odd ones positive.

    Args:
        linearization: of the model at x.
        k: number of the layer.
        probes: number of independent estimates, whose scatter gives the standard error.
        steps: Lanczos steps per probe.
        generator: of the probes, on the CPU.

    References:
        Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature (Ubaru, Chen, Saad, 2017),
        Algorithm 1. Matrices, Moments and Quadrature (Golub, Meurant, 1994), sections 3 and 4.
    """
    jacobian = linearization.forward_checked(k)
    like = linearization.states[k]
    smallest = _log_smallest(linearization, k, generator)
    product, adjoint = log_scaled(jacobian.jvp), log_scaled(jacobian.vjp)
    upper, lower = [], []
    for _ in range(probes):
        space = Bidiagonalization(product, adjoint, _probe(like, generator), steps)
        while space.size < space.capacity and not bool(space.finished.all()):
            space.extend()
        gauss = _gauss(space)
        upper.append(gauss)
        lower.append(torch.where(space.converged_exactly, gauss, _radau(space, smallest)))
    above, below = torch.stack(upper), torch.stack(lower)
    scatter = torch.maximum(above.std(0), below.nan_to_num(nan=0.0, neginf=0.0).std(0))
    high, low = above.mean(0), torch.minimum(below.mean(0), above.mean(0))
    bias = (0.5 * (high - low)).nan_to_num(nan=math.inf)
    value = torch.where(low.isfinite(), 0.5 * (high + low), high)
    return StochasticLogDet(value, scatter / math.sqrt(probes), bias)


def _probe(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs in the shape and dtype of ``like``."""
    signs = 2.0 * torch.randint(0, 2, like.shape, generator=generator, device="cpu") - 1.0
    return signs.to(like)


def _log_smallest(linearization: Linearization, k: int, generator: torch.Generator) -> Tensor:
    """ln of a number below the layer's smallest singular value, (B,); -inf where unknown."""
    layer, x = linearization.layers[k], linearization.states[k]
    unknown = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    try:
        found = extreme_singular_values(Linearization(layer, x), generator=generator).backward
    except (NotApplicable, RuntimeError):
        return unknown
    below = -found.log_value - found.gap_free_error.log1p()
    return torch.where(below.isfinite(), below, unknown)


def _gauss(space: Bidiagonalization) -> Tensor:
    """D v^T log(J^T J) v / 2 from above, (B,), with v the direction that the space began with."""
    _, theta, right = space.projection_svd()
    weights = right[:, :, 0].square()
    # without a weight, theta may be 0: B is padded where a sample's space was complete earlier
    used = weights > torch.finfo(weights.dtype).eps ** 2
    logs = torch.where(used, theta.log() + space.reference.unsqueeze(1), 0.0)
    estimate = space.dimension * (weights * logs).sum(1)
    return torch.where(space.non_finite, math.nan, estimate)


def _radau(space: Bidiagonalization, log_smallest: Tensor) -> Tensor:
    """The same from below: a rule with a node at the square of the smallest singular value."""
    known = log_smallest.isfinite()
    floor = torch.where(known, log_smallest - space.reference, 0.0)
    node = (2 * floor).exp()
    tridiagonal, last = space.gram()
    size = tridiagonal.shape[1]
    eye = torch.eye(size, dtype=torch.float64, device=node.device)
    unit = last[:, None] ** 2 * eye[:, -1]
    shifted = tridiagonal - node[:, None, None] * eye
    correction = torch.linalg.solve_ex(shifted, unit.unsqueeze(2)).result[:, -1, 0]
    bordered = tridiagonal.new_zeros(len(node), size + 1, size + 1)
    bordered[:, :size, :size] = tridiagonal
    bordered[:, size, size] = node + correction
    bordered[:, size, size - 1] = bordered[:, size - 1, size] = last
    finite = finite_rows(bordered) & known
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], bordered, 0.0))
    # the node is the smallest eigenvalue, which the decomposition knows to eps of the largest only
    values = torch.maximum(values, node[:, None])
    logs = 0.5 * values.log() + space.reference.unsqueeze(1)
    estimate = space.dimension * (vectors[:, 0].square() * logs).sum(1)
    return torch.where(finite, estimate, -math.inf)

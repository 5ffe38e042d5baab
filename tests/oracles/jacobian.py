"""Slow twins of the Jacobian products: multi-precision chains, and norms of dense products."""

from __future__ import annotations

import mpmath
import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from tests.oracles.transforms import jacobian

DIGITS = 400


def layer_jacobians(model: Invertible, x: Tensor) -> list[Tensor]:
    """Every layer's dense Jacobian at its forward state, row by row: a list of (B, D, D)."""
    found = []
    for layer in model.layers() or (model,):
        found.append(jacobian(layer.forward, x))
        x = layer.forward(x).detach()
    return found


def log_extreme_singular_values(factors: list[Tensor]) -> tuple[list[float], list[float]]:
    """ln sigma_max and ln sigma_min of a product of float64 factors with 400 digits, per sample.

    The smallest one is the reciprocal of the largest one of the inverse, which is multiplied with
    400 digits as well.
    """
    with mpmath.workdps(DIGITS):
        tops, bottoms = [], []
        for b in range(len(factors[0])):
            product = mpmath.eye(factors[0].shape[1])
            for factor in factors:
                product = mpmath.matrix(factor[b].double().tolist()) * product
            tops.append(float(_log_norm(product)))
            bottoms.append(-float(_log_norm(product**-1)))
        return tops, bottoms


def _log_norm(matrix: mpmath.matrix) -> mpmath.mpf:
    """ln of the largest singular value, by power iteration to 12 digits in multi-precision."""
    gram = matrix.T * matrix
    # squaring the Gram matrix squares its spectral ratios: forty squarings are 2^40 power steps
    for _ in range(40):
        gram = gram / max(abs(entry) for entry in gram)
        gram = gram * gram
    vector = gram * mpmath.matrix([1 + mpmath.mpf(k) / 7 for k in range(matrix.cols)])
    return mpmath.log(mpmath.norm(matrix * vector) / mpmath.norm(vector))


def sizes_of_errors(model, x: Tensor, errors: list[Tensor], *, unit: Tensor) -> Tensor:
    """sqrt(|S^-1 J_1^-1 ... J_k^-1 diag(e_k)|_F^2 / D), S: units of x, for k = 0 ... n, (n + 1, B).

    That is the root mean square over x of what errors e_k with independent signs do.
    """
    product = torch.diag(1 / unit.double()).expand(len(x), -1, -1)
    products = [product]
    for factor in layer_jacobians(model, x):
        products.append(products[-1] @ torch.linalg.inv(factor.double()))
    sizes = []
    for p, error in zip(products, errors, strict=True):
        sizes.append((p * error[:, None].double()).flatten(1).norm(dim=1) / x.shape[1] ** 0.5)
    return torch.stack(sizes)

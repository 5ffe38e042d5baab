"""The largest singular value of one linear map per sample, from products alone: batched Golub-Kahan-Lanczos."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.linearization import Scaled

__all__ = ["Bidiagonalization", "LargestSingularValue", "gap_free_error", "largest_singular_value"]

Product = Callable[[Tensor], Scaled]

HISTORY = 3  #: consecutive small changes that end a sample's iteration
SAFETY = 4.0  #: remaining error in units of what the geometric decay of the last changes leaves over
NEGLIGIBLE = 8.0  #: a new direction shorter than this many eps of the largest value is rounding noise


@dataclass(frozen=True)
class LargestSingularValue:
    """sigma_1 of every sample's map.

    Attributes:
        log_value: natural logarithm of sigma_1, (B,) float64; nan where a product was not finite.
        relative_error: estimated relative error from residual and history, (B,) float64. An estimate, not a bound.
        gap_free_error: relative error that is exceeded with probability at most 1 % whatever the spectrum
            (`gap_free_error`), (B,) float64; inf while it says nothing.
        steps: products with the map and with its transpose, each, until the sample's estimate was good, (B,).
        right: the right singular vector, (B, *shape), unit length.
    """

    log_value: Tensor
    relative_error: Tensor
    gap_free_error: Tensor
    steps: Tensor
    right: Tensor


def largest_singular_value(
    product: Product, adjoint: Product, start: Tensor, *, tolerance: float = 1e-3, max_steps: int = 60
) -> LargestSingularValue:
    """sigma_1 of A_b for every sample b, from the products A v and A^T u of one vector per sample.

    A Krylov space of A^T A is built from ``start``, every new vector orthogonalised twice against all before it.
    sigma_1 is the largest singular value of the bidiagonal projection; it never exceeds the true one. A sample is
    done when its estimated error is below ``tolerance`` and stays there; the iteration ends when all are. Coefficients
    are float64 numbers relative to the first product's length, so maps beyond the range of floats are no matter.

    Args:
        product: v (B, *shape) -> A v as Scaled (B, *other).
        adjoint: u (B, *other) -> A^T u as Scaled (B, *shape).
        start: random vectors, (B, *shape); their dtype and device are those of the products.
        tolerance: relative error to reach.
        max_steps: bound of the number of steps.

    Returns:
        a LargestSingularValue.

    References:
        Calculating the singular values and pseudo-inverse of a matrix (Golub, Kahan, 1965).
        Estimating the largest eigenvalue by the power and Lanczos algorithms with a random start (Kuczynski,
        Wozniakowski, 1992), Theorem 4.2.

    >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    >>> times = lambda v: Scaled.of(v @ A)
    >>> value = largest_singular_value(times, times, torch.ones(1, 3, dtype=torch.float64))
    >>> round(value.log_value.exp().item(), 9)
    3.0
    """
    space = Bidiagonalization(product, adjoint, start, max_steps)
    batch = len(start)
    steps = torch.zeros(batch, dtype=torch.long, device=start.device)
    calm = torch.zeros_like(steps)
    thetas: list[Tensor] = []
    while space.size < space.capacity:
        space.extend()
        left, theta, _ = space.projection_svd()
        thetas.append(theta[:, 0])
        error = _error(space, left, theta, thetas)
        calm = torch.where(error <= tolerance, calm + 1, torch.zeros_like(calm))
        done = (calm >= HISTORY) | space.exhausted | space.broken
        steps = torch.where((steps == 0) & done, torch.full_like(steps, space.size), steps)
        if bool(done.all()):
            break
    steps = torch.where(steps == 0, torch.full_like(steps, space.size), steps)
    return _result(space, error, steps)


def gap_free_error(steps: int, dimension: int, *, failure: float = 0.01) -> float:
    """Relative error of sigma_1 after ``steps`` steps from a random start, exceeded with probability ``failure``.

    Whatever the spectrum: P(theta^2 < (1 - e) sigma_1^2) <= 1.648 sqrt(D) exp(-sqrt(e) (2 steps - 1)). Solved for e;
    the relative error of sigma_1 is then 1 / sqrt(1 - e) - 1, and inf where e >= 1.

    References:
        Estimating the largest eigenvalue by the power and Lanczos algorithms with a random start (Kuczynski,
        Wozniakowski, 1992), Theorem 4.2.

    >>> round(gap_free_error(33, 3072), 3), gap_free_error(3, 3072)
    (0.01, inf)
    """
    if steps >= dimension:
        return 0.0
    e = (math.log(1.648 * math.sqrt(dimension) / failure) / (2 * steps - 1)) ** 2
    return math.inf if e >= 1 else 1 / math.sqrt(1 - e) - 1


class Bidiagonalization:
    """A V = U B with V, U orthonormal and B upper bidiagonal, one per sample, grown step by step.

    Attributes:
        size: steps done: B is size x size.
        capacity: steps that are possible.
        reference: natural logarithm of the unit of B's entries, (B,).
        exhausted: samples whose Krylov space is complete: B has exact singular values of A, (B,) bool.
        broken: samples for which a product was not finite, (B,) bool.
    """

    def __init__(self, product: Product, adjoint: Product, start: Tensor, max_steps: int) -> None:
        self._product, self._adjoint, self._like = product, adjoint, start
        flat = start.flatten(1).double()
        batch, dimension = flat.shape
        self.size, self.capacity = 0, min(max_steps, dimension)
        self._right = flat.new_zeros(batch, self.capacity + 1, dimension)
        self._right[:, 0] = flat / flat.norm(dim=1, keepdim=True)
        self._left = flat.new_zeros(batch, self.capacity, 0)
        self.alpha = flat.new_zeros(batch, self.capacity)
        self.beta = flat.new_zeros(batch, self.capacity)
        self.reference = flat.new_zeros(batch)
        self.broken = torch.zeros(batch, dtype=torch.bool, device=start.device)
        self.exhausted = self.broken.clone()
        self._other_shape = start.shape

    def extend(self) -> None:
        """One step: one product with A and one with its transpose."""
        k, right = self.size, self._right
        image = self._product(right[:, k].to(self._like.dtype).reshape(self._like.shape))
        if k == 0:
            self._begin(image)
        u = self._relative(image)
        if k > 0:
            u = u - self.beta[:, k - 1, None] * self._left[:, k - 1]
        self.alpha[:, k], self._left[:, k] = self._normalized(u, self._left[:, :k])
        back = self._adjoint(self._left[:, k].to(self._like.dtype).reshape(self._other_shape))
        v = self._relative(back) - self.alpha[:, k, None] * right[:, k]
        self.beta[:, k], right[:, k + 1] = self._normalized(v, right[:, : k + 1])
        self.exhausted |= self.beta[:, k] == 0
        self.size += 1

    def projection_svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular value decomposition of B: left vectors, values in descending order, right vectors transposed."""
        k = self.size
        matrix = torch.diag_embed(self.alpha[:, :k])
        if k > 1:
            matrix = matrix + torch.diag_embed(self.beta[:, : k - 1], offset=1)
        return torch.linalg.svd(matrix)

    def combined(self, weights: Tensor) -> Tensor:
        """sum_k weights[:, k] v_k, in the shape and dtype of the start vectors."""
        vector = torch.einsum("bk,bkn->bn", weights, self._right[:, : self.size])
        return vector.to(self._like.dtype).reshape(self._like.shape)

    def _begin(self, image: Scaled) -> None:
        self._other_shape = image.vector.shape
        self._left = self.alpha.new_zeros(*self.alpha.shape, image.vector[0].numel())
        length = image.log_norm()
        self.reference = torch.where(length.isfinite(), length, torch.zeros_like(length))

    def _relative(self, scaled: Scaled) -> Tensor:
        vector = scaled.vector.flatten(1).double() * (scaled.log_scale - self.reference).exp().unsqueeze(1)
        good = vector.isfinite().all(1)
        self.broken |= ~good
        return torch.where(good.unsqueeze(1), vector, torch.zeros_like(vector))

    def _normalized(self, vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Length and direction of what is left of ``vector`` outside the basis; both 0 if that is rounding noise."""
        for _ in range(2):  # once is not enough: Kahan, Parlett
            vector = vector - torch.einsum("bkn,bk->bn", basis, torch.einsum("bkn,bn->bk", basis, vector))
        length = vector.norm(dim=1)
        unit = NEGLIGIBLE * torch.finfo(self._like.dtype).eps
        largest = torch.maximum(self.alpha.amax(1), self.beta.amax(1))
        length = torch.where(length > unit * largest, length, torch.zeros_like(length))
        return length, vector / torch.where(length > 0, length, torch.ones_like(length)).unsqueeze(1) * (
            length > 0
        ).unsqueeze(1)


def _error(space: Bidiagonalization, left: Tensor, theta: Tensor, thetas: list[Tensor]) -> Tensor:
    """Estimated relative error of the largest value: the smaller one of what residual and history say."""
    top = theta[:, 0].clamp(min=torch.finfo(theta.dtype).tiny)
    k = space.size
    residual = space.beta[:, k - 1] * left[:, k - 1, 0].abs()
    gap = theta[:, 0] - theta[:, 1] if k > 1 else torch.zeros_like(top)
    quadratic = residual.square() / torch.where(gap > 0, gap, torch.full_like(gap, math.nan))
    error = torch.fmin(residual, quadratic) / top
    if len(thetas) >= HISTORY:
        last, before = thetas[-1] - thetas[-2], thetas[-2] - thetas[-3]
        decay = torch.where(before > 0, (last / before).clamp(max=1.0), torch.zeros_like(last))
        rest = last * decay / (1 - decay).clamp(min=1e-9)
        error = torch.minimum(error, SAFETY * torch.maximum(rest, last) / top)
    return torch.where(space.exhausted, torch.zeros_like(error), error)


def _result(space: Bidiagonalization, error: Tensor, steps: Tensor) -> LargestSingularValue:
    _, theta, right = space.projection_svd()
    nan = torch.full_like(error, math.nan)
    bars = [gap_free_error(space.size, space._right.shape[2])] * len(error)
    bar = torch.where(space.exhausted, torch.zeros_like(error), error.new_tensor(bars))
    return LargestSingularValue(
        log_value=torch.where(space.broken, nan, theta[:, 0].log() + space.reference),
        relative_error=torch.where(space.broken, nan, error),
        gap_free_error=torch.where(space.broken, nan, bar),
        steps=steps,
        right=space.combined(right[:, 0]),
    )

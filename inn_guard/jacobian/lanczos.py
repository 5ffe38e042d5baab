"""sigma_max of one linear map per sample from products alone: batched Golub-Kahan-Lanczos."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from inn_guard.core.tensors import finite_rows, per_sample
from inn_guard.jacobian.chain import LogScaledVector

__all__ = [
    "Bidiagonalization",
    "LargestSingularValue",
    "gap_free_error",
    "joined",
    "largest_singular_value",
    "probable_error",
]

Self = TypeVar("Self", bound="Bidiagonalization")
#: v (B, *) -> A v, or u -> A^T u, with lengths as logarithms
ScaledProduct = Callable[[Tensor], LogScaledVector]
#: rows of the batch -> both products of these samples only; None where that is not possible
Restrict = Callable[[Tensor], tuple[ScaledProduct, ScaledProduct] | None]

LIKELY = 0.1  #: probability with which the error bar may be exceeded
ALMOST_NEVER = 0.01  #: probability with which the wide error bar may be exceeded
#: Probability with which the error that ends the iteration may be exceeded, for each value: the
#: 64 values of 32 samples are all right in 97 % of runs at least.
NEVER_OF_MANY = 5e-4
HISTORY = 3  #: steps before the last one from whose growth the rest is extrapolated
RATIOS = (0.3, 0.95)  #: range of the ratio of successive growths that is extrapolated
ROUNDS, POINTS = 3, 32  #: refinements of the error's bracket, and the points that each one compares
NEGLIGIBLE = 8.0  #: in eps of the largest value: a shorter new direction is rounding noise
MIXED = 0.1  #: length of the random vector that is added to a guess of unit length
#: A guess is kept if a value this many times as large is unlikely, and what is left to grow is
#: taken for as much as the last step added.
OVERLOOKED = 3.0
TRACKED = 3  #: steps within which a guess must be found right; else it counts as none
DROPPING = 0.7  #: finished samples are dropped when no more than this share is unfinished


@dataclass(frozen=True)
class LargestSingularValue:
    """The largest singular value sigma_1 of every sample's linear map, with error bars.

    Attributes:
        log_value: natural logarithm of sigma_1, (B,) float64; NaN where a product was not finite.
        relative_error: error bar, exceeded with a probability of at most 10 % over the random
            start, for any spectrum (`probable_error`), (B,) float64.
        gap_free_error: error bar that is exceeded with a probability of at most 1 %, (B,) float64;
            infinite where there is no bound yet.
        steps: products with the map, and as many with its transpose, until the error was small,
            (B,).
        right: the right singular vector, (B, *shape), unit length.
        left: the left singular vector, (B, *other), unit length. In exact arithmetic
            A^T left = sigma_1 right for these three.
    """

    log_value: Tensor
    relative_error: Tensor
    gap_free_error: Tensor
    steps: Tensor
    right: Tensor
    left: Tensor

    def select(self, rows: Tensor) -> LargestSingularValue:
        """The result for these rows of the batch."""
        return LargestSingularValue(*[getattr(self, part.name)[rows] for part in fields(self)])


def largest_singular_value(  # noqa: PLR0913
    product: ScaledProduct,
    adjoint: ScaledProduct,
    start: Tensor,
    *,
    tolerance: float = 1e-3,
    max_steps: int = 60,
    restrict: Restrict | None = None,
    guess: Tensor | None = None,
) -> LargestSingularValue:
    """sigma_1 of A_b for every sample b, from products A v and A^T u with one vector per sample.

    A Krylov space of A^T A is built from ``start``; every new vector is orthogonalised twice
    against all before it. The estimate is the largest singular value of the bidiagonal projection,
    which never exceeds the true one. A sample is finished when two conditions hold: the growth of
    the last steps, extrapolated as a geometric series, would add less than ``tolerance``; and the
    error that is exceeded with a probability of 0.05 % at most, for any spectrum, is below
    ``tolerance``. How often a value is off by more is counted by
    ``benchmarks.performance.spectra_promise``. With 1 % in place of 0.05 % a quarter of the steps
    is saved, but in 2 of 10 runs of a Glow with 768 dimensions one of 64 values was off by more.
    Coefficients are float64 numbers relative to the length of the first product, so that maps
    beyond the range of floats are possible.

    Args:
        product: v (B, *shape) -> A v as LogScaledVector (B, *other).
        adjoint: u (B, *other) -> A^T u as LogScaledVector (B, *shape).
        start: vectors from a rotation-invariant distribution, (B, *shape), in the dtype and on the
            device of the products.
        tolerance: relative error to reach.
        max_steps: largest number of steps.
        guess: right singular vectors of similar maps, (B, *shape), as those of the last look at a
            net in training. The iteration starts from these with a tenth of ``start`` mixed in, and
            may end after two steps, when a step adds less than ``tolerance``. A direction that
            stretches three times as much is overlooked with a probability of at most 10 %:
            ``relative_error`` says so. One that stretches less grows from look to look until it
            is the guess. A guess that is not found right in three steps counts as none.
        restrict: rows of the batch -> both products of these samples only, or None where that is
            not possible; it lets finished samples drop out.

    Returns:
        the value of every sample, with error bars.

    References:
        Calculating the singular values and pseudo-inverse of a matrix (Golub, Kahan, 1965).
        Computing probabilistic bounds for extreme eigenvalues of symmetric matrices with the
        Lanczos method (Van Dorsselaer, Hochstenbach, Van der Vorst, 2000).

    >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    >>> times = lambda v: LogScaledVector.from_vector(v @ A)
    >>> value = largest_singular_value(times, times, torch.ones(1, 3, dtype=torch.float64))
    >>> round(value.log_value.exp().item(), 9)
    3.0
    """
    if guess is not None:
        start = _unit(guess) + MIXED * _unit(start)
    space = Bidiagonalization(product, adjoint, start, max_steps)
    if guess is not None:
        # of the sum's length the random part is this share at least; a guess that has nothing of
        # the largest direction does not make it more likely that the random part has little of it
        space.random_share = MIXED / (1 + MIXED)
    rows = torch.arange(len(start), device=start.device)
    steps = torch.zeros_like(rows)
    values: list[Tensor] = []
    parts: list[tuple[Tensor, LargestSingularValue]] = []
    while space.size < space.capacity:
        space.extend()
        values.append(space.largest())
        done = _is_done(space, values, tolerance)
        if guess is not None:
            done |= _is_tracked(space, values, tolerance)
        steps = torch.where((steps == 0) & done, space.size, steps)
        left = steps == 0
        if not bool(left.any()):
            break
        if restrict is None or int(left.sum()) > DROPPING * len(rows):
            continue
        products = restrict(rows[left])
        if products is not None:
            parts.append((rows[~left], _result(space.select(~left), steps[~left])))
            space = space.select(left, *products)
            rows = rows[left]
            steps = steps[left]
            values = [value[left] for value in values]
    steps = torch.where(steps == 0, space.size, steps)
    return joined([*parts, (rows, _result(space, steps))])


def gap_free_error(steps: int, dimension: int, *, failure: float = 0.01) -> float:
    """Relative error of sigma_1 after ``steps`` steps, exceeded with probability ``failure``.

    For a random start and any spectrum, P(theta^2 < (1 - e) sigma_1^2) <= 1.648 sqrt(D)
    exp(-sqrt(e) (2 steps - 1)). This is solved for e. The relative error of sigma_1 is then
    1 / sqrt(1 - e) - 1; it is infinite where e >= 1.

    References:
        Estimating the largest eigenvalue by the power and Lanczos algorithms with a random start
        (Kuczynski, Wozniakowski, 1992), Theorem 4.2.

    >>> round(gap_free_error(33, 3072), 3), gap_free_error(3, 3072)
    (0.01, inf)
    """
    if steps >= dimension:
        return 0.0  # the Krylov space is the whole space
    e = (math.log(1.648 * math.sqrt(dimension) / failure) / (2 * steps - 1)) ** 2
    if e >= 1:
        return math.inf
    return 1 / math.sqrt(1 - e) - 1


class Bidiagonalization:
    """A V = U B with orthonormal V, U and upper bidiagonal B, for every sample, step by step.

    Basis vectors are in the dtype of the start vectors (float32 at least), B is in float64.

    Attributes:
        size: number of steps taken: B is size x size.
        capacity: largest possible number of steps.
        dimension: dimension of the space of v.
        alpha: diagonal of B, (B, capacity).
        beta: what the next vector of V had left, (B, capacity): the entries above the diagonal.
        reference: natural logarithm of the unit of alpha and beta, (B,).
        converged_exactly: samples whose Krylov space is complete, so that B has singular values of
            A, (B,) bool.
        non_finite: samples for which a product was not finite, (B,) bool.
        random_share: length of the part of the start that is rotation-invariant.
    """

    def __init__(
        self, product: ScaledProduct, adjoint: ScaledProduct, start: Tensor, max_steps: int
    ) -> None:
        self._product = product
        self._adjoint = adjoint
        self.random_share = 1.0
        self._dtype = start.dtype
        self._shape = start.shape[1:]
        # half precision could not keep the basis orthogonal
        flat = start.flatten(1).to(torch.promote_types(start.dtype, torch.float32))
        self.dimension = flat.shape[1]
        self.size = 0
        self.capacity = min(max_steps, self.dimension)
        self._right = flat.new_zeros(len(flat), self.capacity + 1, self.dimension)
        self._right[:, 0] = flat / flat.norm(dim=1, keepdim=True)
        # the first product tells the shape of A v
        self._other_shape = self._shape
        self._left = flat.new_zeros(len(flat), self.capacity, 0)
        self.alpha = torch.zeros(len(flat), self.capacity, dtype=torch.float64, device=flat.device)
        self.beta = torch.zeros_like(self.alpha)
        self.reference = torch.zeros_like(self.alpha[:, 0])
        self.non_finite = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        self.converged_exactly = self.non_finite.clone()

    @property
    def finished(self) -> Tensor:
        """Samples that further steps do not change, (B,) bool."""
        return self.converged_exactly | self.non_finite

    def extend(self) -> None:
        """One step: one product with A and one with its transpose."""
        k, right = self.size, self._right
        v = right[:, k].to(self._dtype).unflatten(1, self._shape)
        image = self._product(v)
        if k == 0:
            self._begin(image)
        left = self._left
        self.alpha[:, k], left[:, k] = self._orthogonalized(self._relative(image), left[:, :k])
        u = left[:, k].to(self._dtype).unflatten(1, self._other_shape)
        back = self._relative(self._adjoint(u))
        self.beta[:, k], right[:, k + 1] = self._orthogonalized(back, right[:, : k + 1])
        # nothing new: A^T A maps the space built so far into itself
        self.converged_exactly |= self.beta[:, k] == 0
        self.size += 1

    def select(
        self: Self,
        chosen: Tensor,
        product: ScaledProduct | None = None,
        adjoint: ScaledProduct | None = None,
    ) -> Self:
        """The space of these samples only.

        Args:
            chosen: rows of the batch, as a mask.
            product: with A, of these samples. Without it the space cannot be extended.
            adjoint: with A^T, of these samples.
        """
        clone = copy.copy(self)
        clone._product = product or self._product
        clone._adjoint = adjoint or self._adjoint
        clone.converged_exactly = self.converged_exactly[chosen]
        for name in ("_right", "_left", "alpha", "beta", "reference", "non_finite"):
            setattr(clone, name, getattr(self, name)[chosen])
        return clone

    def projection_svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """SVD of B: left vectors, values in descending order, right vectors transposed."""
        return torch.linalg.svd(self._matrix())

    def gram(self) -> tuple[Tensor, Tensor]:
        """B^T B, which is tridiagonal, and what would couple it to the next vector, (B,).

        Both in the square of the unit of alpha and beta.
        """
        matrix = self._matrix()
        last = self.alpha[:, self.size - 1] * self.beta[:, self.size - 1]
        return matrix.mT @ matrix, last

    def largest(self) -> Tensor:
        """The largest singular value of U^T A, (B,): of B with its last beta as one more column."""
        return torch.linalg.svdvals(self._extended())[:, 0]

    def largest_vectors(self) -> tuple[Tensor, Tensor]:
        """The left and the right singular vector of that value, in the space of A."""
        weights, _, across = torch.linalg.svd(self._extended(), full_matrices=False)
        left = _combined(weights[:, :, 0], self._left[:, : self.size])
        right = _combined(across[:, 0], self._right[:, : self.size + 1])
        return (
            left.to(self._dtype).unflatten(1, self._other_shape),
            right.to(self._dtype).unflatten(1, self._shape),
        )

    def log_polynomial(self, sigma: Tensor) -> Tensor:
        """log p_k(sigma^2), (B, P), of the Lanczos polynomial p_k of A^T A, k = size.

        Args:
            sigma: above the singular values of B, (B, P), so that all factors are positive.
        """
        t = sigma.square()
        total = torch.zeros_like(sigma)
        alpha, beta = self.alpha.unsqueeze(2), self.beta.unsqueeze(2)
        # the ratio of two successive polynomials stays in range where they themselves do not
        ratio = torch.ones_like(sigma)
        subdiagonal = torch.zeros_like(sigma[:, :1])
        previous_beta = torch.zeros_like(beta[:, 0])
        for k in range(self.size):
            diagonal = alpha[:, k].square() + previous_beta.square()
            superdiagonal = alpha[:, k] * beta[:, k]
            ratio = (t - diagonal - subdiagonal / ratio) / superdiagonal
            total = total + ratio.log()
            subdiagonal, previous_beta = superdiagonal, beta[:, k]
        return total

    def _matrix(self) -> Tensor:
        """The bidiagonal projection, (B, size, size)."""
        k = self.size
        matrix = torch.diag_embed(self.alpha[:, :k])
        if k == 1:
            return matrix
        return matrix + torch.diag_embed(self.beta[:, : k - 1], offset=1)

    def _extended(self) -> Tensor:
        """The projection with the last beta as one more column, (B, size, size + 1)."""
        last = torch.zeros_like(self.alpha[:, : self.size])
        last[:, -1] = self.beta[:, self.size - 1]
        return torch.cat([self._matrix(), last.unsqueeze(2)], dim=2)

    def _begin(self, image: LogScaledVector) -> None:
        """Take the shape of A v and the unit of all coefficients from the first product."""
        self._other_shape = image.vector.shape[1:]
        self._left = self._right.new_zeros(len(self._right), self.capacity, image.vector[0].numel())
        length = image.log_norm()
        self.reference = torch.where(length.isfinite(), length, 0.0)

    def _relative(self, scaled: LogScaledVector) -> Tensor:
        """The vector in units of the reference; 0 where it is not finite."""
        scale = (scaled.log_scale - self.reference).exp().to(self._right.dtype)
        vector = scaled.vector.flatten(1).to(self._right.dtype) * scale.unsqueeze(1)
        good = finite_rows(vector)
        self.non_finite |= ~good
        return torch.where(good.unsqueeze(1), vector, 0.0)

    def _orthogonalized(self, vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Length and direction of ``vector`` outside the basis; both 0 for rounding noise."""
        rest = vector.unsqueeze(2)
        if basis.shape[1]:
            # what the first subtraction leaves by rounding, the second one removes: "twice is
            # enough" (Kahan, Parlett)
            for _ in range(2):
                rest = torch.baddbmm(rest, basis.mT, torch.bmm(basis, rest), alpha=-1)
        rest = rest.squeeze(2)
        length = rest.norm(dim=1).double()
        unit = NEGLIGIBLE * torch.finfo(self._dtype).eps
        largest = torch.maximum(self.alpha.amax(1), self.beta.amax(1))
        length = torch.where(length > unit * largest, length, 0.0)
        inverse = torch.where(length > 0, 1 / length, 0.0)
        return length, rest * inverse.to(rest.dtype).unsqueeze(1)


def probable_error(space: Bidiagonalization, value: Tensor, *, failure: float) -> Tensor:
    """Relative error of ``value`` as sigma_1, exceeded with probability ``failure`` at most, (B,).

    Let p_k be the Lanczos polynomial of A^T A, and c the component of the start along the first
    right singular vector. Then |c p_k(sigma_1^2)| <= 1, because p_k(A^T A) v_1 has unit length, and
    |c| is below d = sqrt(2/D) erfinv(failure) with that probability at most. So sigma_1^2 is below
    the point beyond all roots where p_k = 1 / d. Infinite beyond e^4.

    References:
        Computing probabilistic bounds for extreme eigenvalues of symmetric matrices with the
        Lanczos method (Van Dorsselaer, Hochstenbach, Van der Vorst, 2000), theorem 3.
    """
    # the logarithm of the error is bracketed: e^-40 is below the rounding of float64
    low, high = torch.full_like(value, -40.0), torch.full_like(value, 4.0)
    beyond = ~_exceeds(space, value, high.exp().unsqueeze(1), failure).squeeze(1)
    share = torch.linspace(0, 1, POINTS, dtype=value.dtype, device=value.device)
    for _ in range(ROUNDS):
        points = low.unsqueeze(1) + (high - low).unsqueeze(1) * share
        # beyond its roots the polynomial increases, so the points that fall short come first
        short = (~_exceeds(space, value, points.exp(), failure)).sum(1, keepdim=True)
        first = short.clamp(1, POINTS - 1)
        low = points.gather(1, first - 1).squeeze(1)
        high = points.gather(1, first).squeeze(1)
    error = torch.where(beyond, torch.inf, high.exp())
    return torch.where(space.converged_exactly, 0.0, error)


def _exceeds(space: Bidiagonalization, value: Tensor, errors: Tensor, failure: float) -> Tensor:
    """Whether sigma_1 > (1 + error) value has probability ``failure`` at most; errors (B, P)."""
    quantile = torch.special.erfinv(torch.tensor(failure)).item()
    weight = math.log(space.random_share * math.sqrt(2 / space.dimension) * quantile)
    return space.log_polynomial(value.unsqueeze(1) * (1 + errors)) >= -weight


def _is_done(space: Bidiagonalization, values: list[Tensor], tolerance: float) -> Tensor:
    """The samples whose values are almost certainly right, or will not change any more."""
    if len(values) <= HISTORY:
        return space.finished
    allowed = torch.full_like(values[-1], tolerance).unsqueeze(1)
    certain = _exceeds(space, values[-1], allowed, NEVER_OF_MANY).squeeze(1)
    settled = _still_to_come(values) <= tolerance * values[-1]
    return space.finished | (settled & certain)


def _is_tracked(space: Bidiagonalization, values: list[Tensor], tolerance: float) -> Tensor:
    """The samples whose guess was near the largest direction, and is so still."""
    if not 1 < len(values) <= TRACKED:
        # slow growth later on says that the guess was far from it, not that it has been reached
        return space.finished
    settled = values[-1] - values[-2] <= tolerance * values[-1]
    overlooked = torch.full_like(values[-1], OVERLOOKED - 1).unsqueeze(1)
    return settled & _exceeds(space, values[-1], overlooked, LIKELY).squeeze(1)


def _unit(t: Tensor) -> Tensor:
    """Each sample at unit length; zeros where it is not finite."""
    length = t.flatten(1).norm(dim=1)
    kept = (length > 0) & length.isfinite()
    inverse = torch.where(kept, 1 / length, 0.0)
    return per_sample(inverse, t) * torch.where(per_sample(kept, t), t, 0.0)


def _still_to_come(values: list[Tensor]) -> Tensor:
    """What all further steps would add if their growths were a geometric series, (B,)."""
    last = values[-1] - values[-2]
    before = values[-3] - values[-4]
    # two steps lie between the two growths, hence the root; 0 / 0 counts as fast convergence
    ratio = (last.clamp(min=0) / before).sqrt().nan_to_num(RATIOS[0]).clamp(*RATIOS)
    return last * ratio / (1 - ratio)


def _result(space: Bidiagonalization, steps: Tensor) -> LargestSingularValue:
    """What the space tells about sigma_1; ``steps`` are those after which a sample was finished."""
    value = space.largest()
    left, right = space.largest_vectors()
    error = probable_error(space, value, failure=LIKELY)
    # the tighter of two bounds
    for_any_spectrum = gap_free_error(space.size, space.dimension, failure=ALMOST_NEVER)
    wide = probable_error(space, value, failure=ALMOST_NEVER).clamp(max=for_any_spectrum)
    return LargestSingularValue(
        log_value=(value.log() + space.reference).masked_fill(space.non_finite, math.nan),
        relative_error=error.masked_fill(space.non_finite, math.nan),
        gap_free_error=wide.masked_fill(space.non_finite, math.nan),
        steps=steps,
        right=right,
        left=left,
    )


def joined(parts: list[tuple[Tensor, LargestSingularValue]]) -> LargestSingularValue:
    """Results of several subsets of the batch, in the order of the batch."""
    rows, results = zip(*parts, strict=True)
    order = torch.cat(rows).argsort()

    def of_all(name: str) -> Tensor:
        return torch.cat([getattr(result, name) for result in results])[order]

    return LargestSingularValue(*[of_all(part.name) for part in fields(LargestSingularValue)])


def _combined(weights: Tensor, basis: Tensor) -> Tensor:
    """sum_k weights[:, k] basis[:, k], of (B, k) and (B, k, D)."""
    return torch.bmm(weights.to(basis.dtype).unsqueeze(1), basis).squeeze(1)

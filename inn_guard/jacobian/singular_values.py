"""Singular values of Jacobians: the extreme ones from products alone, or all of a dense one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from inn_guard.core.layer_jacobian import AutogradJacobian
from inn_guard.core.random import Noise, as_noise
from inn_guard.core.tensors import finite_rows, norms
from inn_guard.jacobian.chain import Linearization, ScaledLinearization
from inn_guard.jacobian.lanczos import (
    LargestSingularValue,
    Restrict,
    ScaledProduct,
    joined,
    largest_singular_value,
)
from inn_guard.jacobian.short_dtype import faster_dtype

__all__ = [
    "ExtremeSingularValues",
    "Spectrum",
    "extreme_singular_values",
    "full_jacobian",
    "jacobian_rows",
    "resolution",
    "spectrum",
]

#: a linearization -> products with a map and with its transpose
AnyLinearization = Linearization | ScaledLinearization
Products = Callable[[AnyLinearization], tuple[ScaledProduct, ScaledProduct]]

COARSE = 5e-3  #: tolerance from which on the search may compute in a shorter dtype
#: What a shorter dtype may change, in units of the tolerance. It turns vectors by 0.03 to 0.3 %
#: and changes values by a tenth of that.
ROUNDED = 0.5
CHUNKS = (64, 32, 128)  #: rows per backward pass that are tried; the fastest does the rest


@dataclass(frozen=True)
class ExtremeSingularValues:
    """Extreme singular values of J and its condition number per sample, as natural logarithms.

    Attributes:
        forward: sigma_max(J), with error bars.
        backward: sigma_max(J^-1) = 1 / sigma_min(J), with error bars.
    """

    forward: LargestSingularValue
    backward: LargestSingularValue

    @property
    def log_max(self) -> Tensor:
        """The natural logarithm of sigma_max(J), (B,)."""
        return self.forward.log_value

    @property
    def log_min(self) -> Tensor:
        """The natural logarithm of sigma_min(J), (B,)."""
        return -self.backward.log_value

    @property
    def log_condition(self) -> Tensor:
        """The natural logarithm of sigma_max(J) / sigma_min(J), (B,)."""
        return self.forward.log_value + self.backward.log_value


def extreme_singular_values(
    linearization: AnyLinearization,
    *,
    generator: torch.Generator | Noise,
    tolerance: float = 1e-3,
    max_steps: int = 60,
    guess: tuple[Tensor, Tensor] | None = None,
) -> ExtremeSingularValues:
    """sigma_max and sigma_min of every sample's Jacobian, by Lanczos iterations on J and J^-1.

    Products are chained at the states of the forward pass: the numerical inverse of the chain never
    runs, and no Jacobian is formed. So sigma_min is right even where a dense singular value
    decomposition has lost it, and where F^-1(F(x)) is not finite.

    Where the device multiplies bfloat16 faster than float32 and the tolerance is 5e-3 or more, the
    iteration runs there. One float32 product with the vector found then gives the value, and tells
    whether the iteration was good enough; samples for which it was not are done in float32.

    Args:
        linearization: of the model at x.
        generator: of the random start vectors, on the CPU, or a function that draws them.
        tolerance: relative error to reach.
        max_steps: largest number of steps; each is one product with J or J^-1 and one with its
            transpose.
        guess: right singular vectors of J and of J^-1 at an earlier look, (B, *data) and
            (B, *latent); see `largest_singular_value`.

    Raises:
        NotApplicable: if the inverse of a layer has no correct derivative, or the map is not
            square.
    """
    x, z = linearization.states[0], linearization.output
    noise = as_noise(generator)

    near_x, near_z = (None, None) if guess is None else guess

    short = None
    if tolerance >= COARSE:
        dtype = faster_dtype(x.dtype, x.device)
        short = None if dtype is None else linearization.in_dtype(dtype)

    def extreme(products: Products, like: Tensor, near: Tensor | None) -> LargestSingularValue:
        """sigma_max of the map with these products, from a random start shaped as ``like``."""
        start = noise(like.shape).to(like)

        def search(line: AnyLinearization, rows: Tensor | None = None) -> LargestSingularValue:
            """sigma_max of these products of ``line``, which has these rows of the batch."""
            return largest_singular_value(
                *products(line),
                start if rows is None else start[rows],
                tolerance=tolerance,
                max_steps=max_steps,
                restrict=_restricting(line, products),
                guess=near if near is None or rows is None else near[rows],
            )

        if short is None:
            return search(linearization)
        found, right = witnessed(search(short), products(linearization)[1], tolerance)
        wrong = (~right).nonzero()[:, 0]
        if not len(wrong):
            return found
        part = linearization.select(wrong)
        if part is None:
            return search(linearization)
        kept = right.nonzero()[:, 0]
        return joined([(kept, found.select(kept)), (wrong, search(part, wrong))])

    forward = extreme(_of_jacobian, x, near_x)
    return ExtremeSingularValues(forward, extreme(_of_inverse, z, near_z))


def witnessed(
    found: LargestSingularValue, adjoint: ScaledProduct, tolerance: float
) -> tuple[LargestSingularValue, Tensor]:
    """The result of a search with rounded products, measured with one exact product.

    |A^T u| with the left vector u that was found is a lower bound of sigma_1(A), whatever the
    search has computed. How far A^T u is from sigma v, with the sigma and v of the search, says
    how wrong its products are.

    Args:
        found: of the search.
        adjoint: u -> A^T u, exact.
        tolerance: of the search.

    Returns:
        the result with that lower bound as its value; and the samples, (B,) bool, for which the
        search was good enough: its products are wrong by at most a share of the tolerance.
    """
    image = adjoint(found.left)
    log_value = image.log_norm() - norms(found.left).log()
    # both are unit vectors: the chord between them, and what the lengths differ by
    turned = norms(image.vector - found.right)
    grown = (log_value - found.log_value).exp()
    good = (turned <= ROUNDED * tolerance) & ((grown - 1).abs() <= ROUNDED * tolerance)
    # sigma_1 of the rounded map is at most (1 + error) sigma, that of A larger by what was turned
    larger = (1 + turned) / grown
    measured = replace(
        found,
        log_value=log_value,
        right=image.vector,
        relative_error=(1 + found.relative_error) * larger - 1,
        gap_free_error=(1 + found.gap_free_error) * larger - 1,
    )
    return measured, good


def _restricting(line: AnyLinearization, products: Products) -> Restrict:
    """Rows of the batch -> the products of these samples; None where they cannot be selected."""

    def restrict(rows: Tensor) -> tuple[ScaledProduct, ScaledProduct] | None:
        part = line.select(rows)
        return None if part is None else products(part)

    return restrict


def _of_jacobian(linearization: AnyLinearization) -> tuple[ScaledProduct, ScaledProduct]:
    return linearization.jvp, linearization.vjp


def _of_inverse(linearization: AnyLinearization) -> tuple[ScaledProduct, ScaledProduct]:
    return linearization.inverse_jvp, linearization.inverse_vjp


def full_jacobian(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "batch *data"],
    *,
    rows: range | None = None,
) -> Tensor:
    """The Jacobian of ``function`` at every sample, (B, len(rows), dim x), by reverse mode.

    Rows are computed in chunks, each with one backward pass. Several sizes are timed, and the
    fastest is used from then on. Where an operation has no batching rule, rows are computed one by
    one. The dtype is that of x.

    Args:
        function: (B, *data) -> (B, *latent), samples independent of one another.
        x: where, (B, *data).
        rows: the rows to be computed. Default: all dim z.

    Raises:
        NotApplicable: if the output does not depend on x through autograd.
    """
    jacobian = AutogradJacobian(function, function, x)
    if rows is None:
        rows = range(jacobian.output[0].numel())
    return jacobian_rows(jacobian, x, rows)


def jacobian_rows(jacobian: AutogradJacobian, x: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows of the Jacobian at every sample, (B, len(rows), dim x), as in `full_jacobian`."""
    J = x.new_empty(len(x), len(rows), x[0].numel())
    for part in _chunks(len(rows)):
        J[:, part.start : part.stop] = _rows_of(jacobian, rows[part.start : part.stop])
    return J


@dataclass(frozen=True)
class Spectrum:
    """All singular values per sample, in descending order.

    Attributes:
        values: (B, min(dim z, dim x)), float64.
        resolved: whether a value is above the rounding noise of the dense J, same shape, bool.
    """

    values: Tensor
    resolved: Tensor


def spectrum(jacobian: Float[Tensor, "batch latent data"]) -> Spectrum:
    """Singular values of dense Jacobians by a decomposition in float64; NaN for non-finite ones.

    >>> spectrum(torch.diag(torch.tensor([2.0, 1e-12])).unsqueeze(0)).resolved.tolist()
    [[True, False]]
    """
    values = torch.full((len(jacobian), min(jacobian.shape[1:])), math.nan, dtype=torch.float64)
    finite = finite_rows(jacobian).cpu()
    values[finite] = torch.linalg.svdvals(jacobian.cpu()[finite].double())
    return Spectrum(values, values >= resolution(jacobian.dtype) * values[:, :1])


def resolution(dtype: torch.dtype) -> float:
    """sigma / sigma_max below which singular values of a J in ``dtype`` are rounding noise.

    In half precisions it is their eps.
    """
    return {torch.float64: 1e-14, torch.float32: 1e-7}.get(dtype, torch.finfo(dtype).eps)


def _chunks(size: int) -> Iterator[range]:
    """Ranges of rows; the first ones differ in length to find the fastest.

    The caller's work between two ranges is what is timed.
    """
    untried = []
    if size > 4 * max(CHUNKS):  # else trying slow sizes costs more than the fastest saves
        untried = list(CHUNKS)
    speeds: dict[int, float] = {}  # rows per second
    begin = 0
    while begin < size:
        if untried:
            chunk = untried.pop(0)
        else:
            chunk = max(speeds, key=speeds.__getitem__, default=CHUNKS[0])
        rows = range(begin, min(begin + chunk, size))
        start = time.perf_counter()
        yield rows
        speeds.setdefault(chunk, len(rows) / (time.perf_counter() - start))
        begin = rows.stop


def _rows_of(jacobian: AutogradJacobian, rows: Sequence[int]) -> Tensor:
    """These rows of the Jacobian, (B, len(rows), dim x)."""
    output = jacobian.output
    basis = output.new_zeros(len(rows), len(output), output[0].numel())
    basis[range(len(rows)), :, list(rows)] = 1
    basis = basis.reshape(len(rows), *output.shape)
    try:
        products = jacobian.vjp(basis)
    except RuntimeError:
        # some operation has no batching rule
        products = torch.stack([jacobian.vjp(row) for row in basis])
    return products.reshape(len(rows), len(output), -1).transpose(0, 1)

"""Jacobians per sample: their extreme singular values from products alone, and dense with the whole spectrum."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from inn_guard.core.layer_jacobian import AutogradJacobian
from inn_guard.core.random import Noise, as_noise
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.lanczos import LargestSingularValue, Narrow, Product, largest_singular_value

__all__ = [
    "ExtremeSingularValues",
    "Spectrum",
    "extreme_singular_values",
    "full_jacobian",
    "resolution",
    "spectrum",
]

CHUNKS = (64, 32, 128)  #: rows per backward pass that are tried; the fastest one does the rest


@dataclass(frozen=True)
class ExtremeSingularValues:
    """Largest and smallest singular value of J and the condition number, per sample, as natural logarithms.

    Attributes:
        forward: sigma_max(J), with its error estimates.
        backward: sigma_max(J^-1) = 1 / sigma_min(J), with its error estimates.
    """

    forward: LargestSingularValue
    backward: LargestSingularValue

    @property
    def log_max(self) -> Tensor:
        """ln sigma_max(J), (B,)."""
        return self.forward.log_value

    @property
    def log_min(self) -> Tensor:
        """ln sigma_min(J), (B,)."""
        return -self.backward.log_value

    @property
    def log_condition(self) -> Tensor:
        """ln of sigma_max(J) / sigma_min(J), (B,)."""
        return self.forward.log_value + self.backward.log_value


def extreme_singular_values(
    linearization: Linearization,
    *,
    generator: torch.Generator | Noise,
    tolerance: float = 1e-3,
    max_steps: int = 60,
) -> ExtremeSingularValues:
    """sigma_max and sigma_min of every sample's Jacobian: Lanczos on J and on J^-1, chained at the forward states.

    The numerical inverse of the chain is never run and no Jacobian is formed, so sigma_min is right also where a
    dense singular value decomposition has lost it and where F^-1(F(x)) is not finite.

    Args:
        linearization: of the model at x.
        generator: of the random start vectors, on the CPU; or what draws them itself.
        tolerance: relative error to reach.
        max_steps: bound of the number of steps, each one product with J or J^-1 and one with its transpose.

    Raises:
        NotApplicable: if a layer's inverse has no correct derivative, or the map is not square.
    """
    x, z = linearization.states[0], linearization.output
    lanczos = functools.partial(largest_singular_value, tolerance=tolerance, max_steps=max_steps)
    forward = lanczos(
        *_ahead(linearization), _random(x, generator), narrow=_narrowed(linearization, _ahead)
    )
    return ExtremeSingularValues(
        forward,
        lanczos(
            *_back(linearization), _random(z, generator), narrow=_narrowed(linearization, _back)
        ),
    )


def _ahead(linearization: Linearization) -> tuple[Product, Product]:
    return linearization.jvp, linearization.vjp


def _back(linearization: Linearization) -> tuple[Product, Product]:
    return linearization.inverse_jvp, linearization.inverse_vjp


def _narrowed(
    linearization: Linearization, products: Callable[[Linearization], tuple[Product, Product]]
) -> Narrow:
    def narrow(rows: Tensor) -> tuple[Product, Product] | None:
        chosen = linearization.select(rows)
        return None if chosen is None else products(chosen)

    return narrow


def full_jacobian(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "batch *data"],
    *,
    rows: range | None = None,
) -> Tensor:
    """The Jacobian of ``function`` at every sample, (B, dim z, dim x), in the dtype of x, by reverse mode.

    Rows are computed in chunks, every chunk with one backward pass; several sizes are timed and the fastest is kept.
    Where a function cannot be differentiated in chunks, its rows are computed one by one.

    Args:
        function: (B, *data) -> (B, *latent), samples independent of one another.
        x: where.
        rows: these alone, (B, len(rows), dim x); all of them unless given.

    Raises:
        NotApplicable: if the output does not depend on x through autograd.
    """
    tangent = AutogradJacobian(function, function, x)
    rows = range(tangent.output[0].numel()) if rows is None else rows
    jacobian = x.new_empty(len(x), len(rows), x[0].numel())
    for part in _chunks(len(rows)):
        jacobian[:, part.start : part.stop] = _pulled(tangent, rows[part.start : part.stop])
    return jacobian


@dataclass(frozen=True)
class Spectrum:
    """All singular values per sample, in descending order.

    Attributes:
        values: (B, min(dim z, dim x)), float64.
        resolved: whether a value is above what rounding of the dense J leaves readable, same shape, bool.
    """

    values: Tensor
    resolved: Tensor


def spectrum(jacobian: Float[Tensor, "batch latent data"]) -> Spectrum:
    """Singular values of dense Jacobians by a float64 decomposition; which of them mean anything is said with them.

    >>> spectrum(torch.diag(torch.tensor([2.0, 1e-12])).unsqueeze(0)).resolved.tolist()
    [[True, False]]
    """
    values = torch.full((len(jacobian), min(jacobian.shape[1:])), math.nan, dtype=torch.float64)
    finite = jacobian.flatten(1).isfinite().all(1).cpu()
    values[finite] = torch.linalg.svdvals(jacobian.cpu()[finite].double())
    return Spectrum(values, values >= resolution(jacobian.dtype) * values[:, :1])


def resolution(dtype: torch.dtype) -> float:
    """sigma / sigma_max below which the singular values of a Jacobian stored in ``dtype`` are rounding noise."""
    return {torch.float64: 1e-14, torch.float32: 1e-7}.get(dtype, torch.finfo(dtype).eps)


def _random(like: Tensor, generator: torch.Generator | Noise) -> Tensor:
    return as_noise(generator)(like.shape).to(like)


def _chunks(size: int) -> Iterator[range]:
    """Ranges of rows; the first ones differ in length to find the fastest."""
    speeds: dict[int, float] = {}
    begin = 0
    while begin < size:
        untried = [chunk for chunk in CHUNKS if chunk not in speeds and size > 4 * max(CHUNKS)]
        chunk = untried[0] if untried else max(speeds, key=speeds.__getitem__, default=CHUNKS[0])
        rows = range(begin, min(begin + chunk, size))
        start = time.perf_counter()
        yield rows
        speeds.setdefault(chunk, len(rows) / (time.perf_counter() - start))
        begin = rows.stop


def _pulled(tangent: AutogradJacobian, rows: range) -> Tensor:
    """These rows of the Jacobian, (B, len(rows), dim x)."""
    batch, size = len(tangent.output), tangent.output[0].numel()
    basis = tangent.output.new_zeros(len(rows), batch, size)
    basis[range(len(rows)), :, rows] = 1
    basis = basis.reshape(len(rows), *tangent.output.shape)
    try:
        pulled = tangent.vjp(basis)
    except RuntimeError:  # no batching rule for some operation
        pulled = torch.stack([tangent.vjp(row) for row in basis])
    return pulled.reshape(len(rows), batch, -1).transpose(0, 1)

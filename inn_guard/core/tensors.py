"""Small functions of a batch (B, ...): finiteness, norms, broadcasting, random latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "binary_scale",
    "concatenate_flat",
    "draw_normal",
    "dtype_name",
    "finite_rows",
    "log_norm",
    "nonzero_or_one",
    "norms",
    "peak",
    "per_channel",
    "per_sample",
    "same_tensor",
    "split_flat",
    "standard_normal",
    "unit_vectors",
]


def finite_rows(t: Tensor) -> Tensor:
    """Which samples of t (B, ...) have neither NaN nor Inf: (B,) bool.

    >>> finite_rows(torch.tensor([[1.0, 2.0], [1.0, torch.nan]])).tolist()
    [True, False]
    """
    return t.flatten(1).isfinite().all(1)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One value per sample, (B,), as (B, 1, ..., 1), which broadcasts against ``like`` (B, ...).

    The result is on the device of ``like`` and in the dtype of ``values``.

    >>> per_sample(torch.tensor([1.0, 2.0]), torch.zeros(2, 3, 4)).shape
    torch.Size([2, 1, 1])
    """
    return values.to(like.device).reshape(-1, *[1] * (like.dim() - 1))


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """One value per channel, (C,), as (C, 1, ..., 1), to broadcast against ``like`` (B, C, ...).

    >>> per_channel(torch.tensor([1.0, 2.0]), torch.zeros(5, 2, 4, 4)).shape
    torch.Size([2, 1, 1])
    """
    return values.reshape(-1, *[1] * (like.dim() - 2))


def peak(t: Tensor) -> Tensor:
    """The largest magnitude in each sample of t (B, ...): (B,) in the dtype of t; NaN stays NaN.

    >>> peak(torch.tensor([[1.0, -3.0], [0.0, 0.0]])).tolist()
    [3.0, 0.0]
    """
    return t.flatten(1).abs().amax(1)


def nonzero_or_one(size: Tensor) -> Tensor:
    """Sizes as divisors: 1 where a size is zero, infinite or NaN. Shape and dtype stay.

    >>> nonzero_or_one(torch.tensor([2.0, 0.0, torch.inf])).tolist()
    [2.0, 1.0, 1.0]
    """
    return torch.where((size > 0) & size.isfinite(), size, torch.ones_like(size))


def binary_scale(size: Tensor) -> Tensor:
    """A power of two within a factor of two of each size; 1 for sizes 0, inf and NaN.

    Division by it rounds nothing, and leaves numbers whose squares are in range.

    >>> binary_scale(torch.tensor([3.0, 1e-3, 0.0])).tolist()
    [2.0, 0.0009765625, 1.0]
    """
    size = nonzero_or_one(size)
    return size / (2 * torch.frexp(size).mantissa)


def norms(t: Tensor) -> Tensor:
    """Euclidean norm of each sample of t (B, ...): (B,) float64.

    Squares neither overflow nor vanish. NaN where the sample has a NaN, infinite where the norm
    exceeds the range of float64.

    >>> norms(torch.tensor([[0.0, 4e200], [0.0, 0.0]], dtype=torch.float64)).tolist()
    [4e+200, 0.0]
    """
    unit, scaled = _scaled_norms(t)
    return unit * scaled


def log_norm(t: Tensor) -> Tensor:
    """Natural logarithm of the Euclidean norm of each sample of t (B, ...): (B,) float64.

    -inf for a sample of zeros, inf for one with an infinite entry, NaN for one with a NaN.

    >>> log_norm(torch.zeros(1, 3)).tolist()
    [-inf]
    """
    unit, scaled = _scaled_norms(t)
    return unit.log() + scaled.log()


def _scaled_norms(t: Tensor) -> tuple[Tensor, Tensor]:
    """(unit, norm / unit) of each sample."""
    flat = t.flatten(1).double()
    unit = binary_scale(peak(flat))
    return unit, (flat / unit.unsqueeze(1)).norm(dim=1)


def unit_vectors(t: Tensor) -> Tensor:
    """Each sample of t (B, ...) divided by its Euclidean norm, in the dtype of t.

    Samples of zeros, and samples whose norm is not finite, stay as they are.

    >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    length = nonzero_or_one(norms(t))
    return (t.double() / per_sample(length, t)).to(t.dtype)


def concatenate_flat(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (B, ...) flattened and concatenated in their order: (B, D).

    >>> concatenate_flat([torch.zeros(5, 2), torch.zeros(5, 3, 4)]).shape
    torch.Size([5, 14])
    """
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def split_flat(t: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The tensors with these shapes of one sample that ``concatenate_flat`` made into t (B, D).

    >>> [part.shape for part in split_flat(torch.zeros(5, 14), [(2,), (3, 4)])]
    [torch.Size([5, 2]), torch.Size([5, 3, 4])]
    """
    sizes = [math.prod(shape) for shape in shapes]
    pieces = t.split(sizes, dim=1)
    return [piece.reshape(-1, *shape) for piece, shape in zip(pieces, shapes, strict=True)]


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, entries, dtype and device; NaN differs from NaN.

    >>> ones = torch.ones(2)
    >>> same_tensor(ones, ones.clone()), same_tensor(ones, ones.double())
    (True, False)
    """
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as reports print it.

    >>> dtype_name(torch.float32)
    'float32'
    """
    return str(dtype).removeprefix("torch.")


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """z ~ N(0, I) with the shape, dtype and device of ``like``.

    The numbers are drawn in float64 on the CPU: they do not depend on the dtype or the device.

    Args:
        like: whose shape, dtype and device are taken.
        generator: a generator on the CPU.
    """
    return torch.randn(like.shape, generator=generator, device="cpu", dtype=torch.float64).to(like)


def draw_normal(shape: Sequence[int], *, like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of this shape, in the dtype and on the device of ``like``.

    The numbers are drawn on the CPU in that dtype: unlike those of ``standard_normal``, they differ
    between dtypes.

    Args:
        shape: of the result.
        like: whose dtype and device are taken.
        generator: a generator on the CPU.
    """
    drawn = torch.randn(tuple(shape), generator=generator, device="cpu", dtype=like.dtype)
    return drawn.to(like.device)

"""Certified spectral norms of convolutions of any padding, stride, dilation and grouping, by the torus bound.

A zero-padded convolution on n pixels is a crop of a circular convolution on a torus of N >= n + padding pixels applied
to a zero-extended image; crop and extension have norm one, and the circular convolution is block-diagonal in the
Fourier basis. Hence ||A|| <= max over the N^d grid frequencies w of sigma_max(K^(w)), for every such N.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from inn_guard.numerics.rounding import UNIT, gamma, up
from inn_guard.numerics.spectral_norm import cheap_norm, exact, norm_operations, spectral_norm

__all__ = [
    "apply",
    "cheap_convolution_norm",
    "convolution_norm",
    "convolution_operations",
    "is_transposed",
    "kernels",
    "multiplicities",
    "paddings",
    "riesz_norm",
    "symbol",
    "torus_norm",
]

Convolution = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)
Sizes = Sequence[int]
CHUNK = 2**24  #: complex entries of the symbol held at once
TRIES = 3  #: torus sizes tried; a kernel peaked at the Nyquist frequency is sharper on an odd torus
RIESZ_GRID = 32


def convolution_norm(module: Any, size: Sizes | None = None) -> float:
    """A certified upper bound of the spectral norm of a convolution's linear map.

    Args:
        module: nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d; its effective ``weight`` (weight norm included) counts.
        size: spatial size of its input; None bounds the norm for every size, with zero padding only.

    Returns:
        ||A||_2, or a little more; inf if the size is None and the padding is not zeros.

    >>> conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    >>> _ = nn.init.constant_(conv.weight, 1.0)
    >>> 8.9 < convolution_norm(conv, (64, 64)) <= 9.0 + 1e-9
    True
    """
    parts = kernels(module)
    stride = tuple(module.stride)
    if size is None:
        zero = module.padding_mode == "zeros"
        return max(riesz_norm(kernel, stride) for kernel in parts) if zero else math.inf
    before, after = paddings(module)
    size = _adjoint_size(module, size, before, after) if is_transposed(module) else tuple(size)
    if module.padding_mode == "zeros":
        return max(torus_norm(kernel, size, (before, after), stride) for kernel in parts)
    if (
        module.padding_mode == "circular"
        and set(stride) == {1}
        and all(
            left + right <= k - 1 and k <= n
            for left, right, k, n in zip(before, after, parts[0].shape[2:], size, strict=True)
        )
    ):
        return max(_grid_norm(kernel, size) for kernel in parts)
    padded = tuple(left + n + right for left, n, right in zip(before, size, after, strict=True))
    copies = _multiplicity(module, size, before, after)
    none = (0,) * len(size)
    valid = max(torus_norm(kernel, padded, (none, none), stride) for kernel in parts)
    return up(up(math.sqrt(copies)) * valid)


def convolution_operations(module: Any, size: Sizes) -> float:
    """About how many floating-point operations ``convolution_norm`` takes."""
    kernel, groups = kernels(module)[0], len(kernels(module))
    inner, outer = kernel.shape[1] * math.prod(module.stride), kernel.shape[0]
    pixels = math.prod(n + p + TRIES for n, p in zip(size, paddings(module)[0], strict=True))
    spread = kernel[0, 0].numel()
    frequencies = 1.0 if spread == 1 else 0.5 * TRIES * pixels / math.prod(module.stride)
    complexity = 1 if spread == 1 else 4
    return (
        groups
        * frequencies
        * (8.0 * inner * outer * spread + complexity * norm_operations(outer, inner))
    )


def cheap_convolution_norm(module: Any, size: Sizes) -> float:
    """An upper bound in one pass over the kernel, for every padding: ``cheap_norm`` of the sums over its window."""
    norm = max(
        cheap_norm(kernel.abs().flatten(2).sum(2) * (1 + 1e-12)) for kernel in kernels(module)
    )
    if module.padding_mode in ("zeros", "circular"):
        return norm
    return up(up(math.sqrt(_multiplicity(module, tuple(size), *paddings(module)))) * norm)


def torus_norm(
    kernel: Float[Tensor, "out in *window"],
    size: Sizes,
    padding: tuple[Sizes, Sizes],
    stride: Sizes,
) -> float:
    """A certified bound of a zero-padded, strided convolution: the least over a few torus sizes of the grid maximum.

    Args:
        kernel: K, (out, in, *window), dilation already written out as zeros.
        size: input size n per dimension.
        padding: zeros (before, after) per dimension.
        stride: per dimension; a stride s is a space-to-depth map (norm 1) and a convolution of stride 1.

    Returns:
        max over the grid of sigma_max(K^(w)), rounded up.
    """
    window = kernel.shape[2:]
    pads = list(zip(*padding, strict=True))
    if set(stride) == {1}:
        sides = zip(size, pads, window, strict=True)
        least = [max(n + max(pad), n + sum(pad) - k + 1, k) for n, pad, k in sides]
    else:
        kernel = polyphase(kernel, stride)
        parts = zip(size, pads, stride, kernel.shape[2:], strict=True)
        least = [max(-(-(n + sum(pad)) // s), k) for n, pad, s, k in parts]
    tries = 1 if set(kernel.shape[2:]) == {1} else TRIES
    return min(_grid_norm(kernel, [n + extra for n in least]) for extra in range(tries))


def riesz_norm(kernel: Float[Tensor, "out in *window"], stride: Sizes) -> float:
    """A certified bound for every image size: grid maximum over the product of cos(pi (k_i - 1) / (2 N_i)).

    At the maximiser w* the function Re(e^{i phi} u* K^(w) v) is of exponential type (k-1)/2 and largest at w*, so it is
    at least its maximum times cos((k-1) t / 2) at distance t <= pi/N, one dimension after the other.

    Args:
        kernel: K, (out, in, *window), dilation already written out as zeros.
        stride: per dimension.

    Returns:
        sup over all w of sigma_max(K^(w)), rounded up.

    References:
        Formule d'interpolation pour la derivee d'un polynome trigonometrique, M. Riesz, 1914.
    """
    kernel = kernel if set(stride) == {1} else polyphase(kernel, stride)
    grid = [1 if k == 1 else max(RIESZ_GRID, 8 * k) for k in kernel.shape[2:]]
    shrink = 1.0
    for k, n in zip(kernel.shape[2:], grid, strict=True):
        shrink = (
            math.nextafter(shrink * (math.cos(math.pi * (k - 1) / (2 * n)) * (1 - 8 * UNIT)), 0.0)
            if k > 1
            else shrink
        )
    return up(_grid_norm(kernel, grid) / shrink)


def symbol(
    kernel: Float[Tensor, "out in *window"], grid: Sizes, origin: Sizes | None = None
) -> tuple[Tensor, float]:
    """K^(w) = sum_d K[d] e^{-i w (d - p)} at the grid frequencies (one of each conjugate pair), and its rounding error.

    Args:
        kernel: K, (out, in, *window).
        grid: torus size N_i per dimension.
        origin: the offset p that is in place, the padding before; zero unless given.

    Returns:
        The symbol, (frequencies, out, in) complex128 (float64 if the window is one pixel), and a bound of the Frobenius
        norm of the error of each frequency's matrix.
    """
    K = exact(kernel).flatten(2)
    if K.shape[2] == 1:
        return K.squeeze(2)[None], 0.0
    return _transform(K, _waves(kernel.shape[2:], grid, origin)), _symbol_error(K, len(grid))


def apply(module: Any, weight: Tensor, x: Tensor) -> Tensor:
    """The convolution of ``module`` without bias and with another weight, on one sample x (C, *size)."""
    if is_transposed(module):
        function = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[
            weight.dim()
        ]
        geometry = (
            module.stride,
            module.padding,
            module.output_padding,
            module.groups,
            module.dilation,
        )
        return function(x[None], weight, None, *geometry)[0]
    return module._conv_forward(x[None], weight, None)[0]


def polyphase(kernel: Tensor, stride: Sizes) -> Tensor:
    """The kernel of the stride-one convolution on the space-to-depth image that equals a strided convolution."""
    out, inner, *window = kernel.shape
    counts = [-(-k // s) for k, s in zip(window, stride, strict=True)]
    margins = [(0, q * s - k) for q, s, k in zip(counts, stride, window, strict=True)]
    kernel = F.pad(kernel, [side for pair in reversed(margins) for side in pair])
    split = [part for pair in zip(counts, stride, strict=True) for part in pair]
    order = [0, 1, *range(3, 3 + 2 * len(window), 2), *range(2, 2 + 2 * len(window), 2)]
    return (
        kernel.reshape(out, inner, *split)
        .permute(order)
        .reshape(out, inner * math.prod(stride), *counts)
    )


def _grid_norm(kernel: Tensor, grid: Sizes) -> float:
    K = exact(kernel).flatten(2)
    if K.shape[2] == 1:
        return spectral_norm(K.squeeze(2))
    error = _symbol_error(K, len(grid))
    chunks = _waves(kernel.shape[2:], grid).split(max(CHUNK // (K.shape[0] * K.shape[1]), 1))
    return max(spectral_norm(_transform(K, waves), error) for waves in chunks)


def _transform(K: Tensor, waves: Tensor) -> Tensor:
    return torch.einsum("oid,fd->foi", K.to(torch.complex128), waves)


def _symbol_error(K: Tensor, dimensions: int) -> float:
    """Frobenius norm of the rounding error of one frequency's matrix."""
    sums = K.abs().sum(2)
    # angles are multiples of 2 pi / N within 16 u; sines, cosines and their products within 8 u each
    relative = gamma(8 * (K.shape[2] + 2)) + 32 * dimensions * UNIT
    return up(float(sums.square().sum().sqrt()) * relative * (1 + 1e-9), 2)


def _waves(window: Sizes, grid: Sizes, origin: Sizes | None = None) -> Tensor:
    """e^{-i w (d - p)} for the grid frequencies w (half of them: real kernels) and the window's offsets d."""
    half = grid[-1] // 2 + 1
    frequencies = torch.tensor(list(itertools.product(*[range(n) for n in grid[:-1]], range(half))))
    starts = (0,) * len(grid) if origin is None else origin
    offsets = torch.tensor(
        list(itertools.product(*[range(-p, k - p) for k, p in zip(window, starts, strict=True)]))
    )
    waves = torch.ones(len(frequencies), len(offsets), dtype=torch.complex128)
    for axis, n in enumerate(grid):
        turns = (frequencies[:, axis, None] * offsets[None, :, axis]) % n
        angle = turns.double() * (2 * math.pi / n)
        waves = waves * torch.complex(angle.cos(), -angle.sin())
    return waves


def multiplicities(grid: Sizes) -> Tensor:
    """How many of the torus's frequencies each of the grid frequencies of ``symbol`` stands for: one or two."""
    half = torch.arange(grid[-1] // 2 + 1)
    return torch.where((half == 0) | (2 * half == grid[-1]), 1, 2).repeat(math.prod(grid[:-1]))


def is_transposed(module: Any) -> bool:
    """Whether the module is a transposed convolution."""
    return isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))


def kernels(module: Any) -> list[Tensor]:
    """One kernel per group, (out, in, *window) of the convolution or, transposed, of its adjoint, dilated."""
    weight = exact(module.weight)
    return [_dilated(part, module.dilation) for part in weight.chunk(module.groups, 0)]


def _dilated(kernel: Tensor, dilation: Sizes) -> Tensor:
    if set(dilation) == {1}:
        return kernel
    window = [(k - 1) * d + 1 for k, d in zip(kernel.shape[2:], dilation, strict=True)]
    wide = kernel.new_zeros(*kernel.shape[:2], *window)
    index = [slice(None), slice(None), *[slice(None, None, d) for d in dilation]]
    wide[tuple(index)] = kernel
    return wide


def paddings(module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros before and after each dimension."""
    if module.padding == "valid":
        return (0,) * len(module.kernel_size), (0,) * len(module.kernel_size)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    return tuple(module.padding), tuple(module.padding)


def _adjoint_size(module: Any, size: Sizes, before: Sizes, after: Sizes) -> tuple[int, ...]:
    """Output size of a transposed convolution: the input size of the convolution whose adjoint it is."""
    windows = [(k - 1) * d + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    sides = zip(size, module.stride, before, after, windows, module.output_padding, strict=True)
    return tuple((n - 1) * s - left - right + k + extra for n, s, left, right, k, extra in sides)


def _multiplicity(module: Any, size: Sizes, before: Sizes, after: Sizes) -> int:
    """How often the padding copies one pixel at most: the squared norm of the padding map."""
    pads = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
    pixels = torch.arange(math.prod(size), dtype=torch.float64).reshape(1, 1, *size)
    padded = F.pad(pixels, pads, mode=module.padding_mode)
    return int(padded.long().flatten().bincount().max())

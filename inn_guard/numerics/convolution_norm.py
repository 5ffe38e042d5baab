"""Certified spectral norms of convolutions of any padding, stride, dilation and grouping.

A zero-padded convolution on n pixels is a crop of a circular convolution on a torus of at least n +
padding pixels, applied to a zero-extended image. Crop and extension have norm one, and the circular
convolution is block-diagonal in the Fourier basis. Hence ||A|| <= max over the N^d grid frequencies
w of sigma_max(K^(w)), for every such torus.
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

from inn_guard.numerics.rounding import UNIT, Upper, enlarged, frobenius_norm, gamma
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

Sizes = Sequence[int]
CHUNK = 2**24  #: complex entries of the symbol held at once
TRIES = 3  #: torus sizes tried; a kernel peaked at the Nyquist frequency is sharper on an odd torus
RIESZ_GRID = 32


def convolution_norm(module: Any, size: Sizes | None = None) -> Upper:
    """A certified upper bound of the spectral norm of a convolution's linear map.

    Args:
        module: nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d, with its effective ``weight`` (weight
            norm included).
        size: spatial size of its input; None bounds the norm for every size, with zero padding
            only.

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
        if module.padding_mode != "zeros":
            return Upper(math.inf)
        return Upper.max(*[riesz_norm(kernel, stride) for kernel in parts])
    padding = paddings(module)
    if is_transposed(module):
        size = _adjoint_size(module, size, padding)
    if module.padding_mode == "zeros":
        return Upper.max(*[torus_norm(kernel, size, padding, stride) for kernel in parts])
    if _is_circular(module, parts[0], size):
        return Upper.max(*[_grid_norm(kernel, size) for kernel in parts])
    # a padding map of norm sqrt(copies), then a convolution without padding on the padded image
    before, after = padding
    padded = [left + n + right for left, n, right in zip(before, size, after, strict=True)]
    none = (0,) * len(padded)
    valid = [torus_norm(kernel, padded, (none, none), stride) for kernel in parts]
    return _padding_norm(module, size) * Upper.max(*valid)


def _is_circular(module: Any, kernel: Tensor, size: Sizes) -> bool:
    """Whether a convolution with circular padding is one on the torus of its image."""
    if module.padding_mode != "circular" or set(module.stride) != {1}:
        return False
    before, after = paddings(module)
    for left, right, k, n in zip(before, after, kernel.shape[2:], size, strict=True):
        if left + right > k - 1 or k > n:
            return False
    return True


def convolution_operations(module: Any, size: Sizes) -> float:
    """About how many floating-point operations ``convolution_norm`` takes."""
    parts = kernels(module)
    stride = math.prod(module.stride)
    rows, columns = parts[0].shape[0], parts[0].shape[1] * stride
    window = parts[0][0, 0].numel()
    symbol_operations = 8.0 * rows * columns * window
    if window == 1:
        return len(parts) * (symbol_operations + norm_operations(rows, columns))
    pixels = 1
    for n, padding in zip(size, paddings(module)[0], strict=True):
        pixels *= n + padding + TRIES
    frequencies = 0.5 * TRIES * pixels / stride
    return len(parts) * frequencies * (symbol_operations + 4 * norm_operations(rows, columns))


def cheap_convolution_norm(module: Any, size: Sizes) -> Upper:
    """An upper bound in one pass over the kernel: ``cheap_norm`` of the sums over its window."""
    bounds = []
    for kernel in kernels(module):
        window = kernel[0, 0].numel()
        bounds.append(cheap_norm(enlarged(kernel.abs().flatten(2).sum(2), window)))
    norm = Upper.max(*bounds)
    if module.padding_mode in ("zeros", "circular"):
        return norm
    return _padding_norm(module, size) * norm


def torus_norm(
    kernel: Float[Tensor, "out in *window"],
    size: Sizes,
    padding: tuple[Sizes, Sizes],
    stride: Sizes,
) -> Upper:
    """A certified bound of a zero-padded, strided convolution: the least over a few torus sizes.

    Args:
        kernel: K, (out, in, *window), dilation already written out as zeros.
        size: input size n per dimension.
        padding: zeros (before, after) per dimension.
        stride: per dimension; a stride s is a space-to-depth map (norm 1) and a convolution of
            stride 1.

    Returns:
        max over the grid of sigma_max(K^(w)), rounded up.
    """
    is_strided = set(stride) != {1}
    if is_strided:
        kernel = polyphase(kernel, stride)
    least = []
    for n, left, right, s, k in zip(size, *padding, stride, kernel.shape[2:], strict=True):
        if is_strided:
            least.append(max(-(-(n + left + right) // s), k))
        else:
            least.append(max(n + left, n + right, n + left + right - k + 1, k))
    tries = TRIES
    if set(kernel.shape[2:]) == {1}:
        tries = 1
    return Upper.min(*[_grid_norm(kernel, [n + extra for n in least]) for extra in range(tries)])


def riesz_norm(kernel: Float[Tensor, "out in *window"], stride: Sizes) -> Upper:
    """A certified bound for every image size: grid maximum / product of cos(pi (k - 1) / 2N).

    At the maximiser w* the function Re(e^{i phi} u* K^(w) v) is of exponential type (k-1)/2 and
    largest at w*, so it is at least its maximum times cos((k-1) t / 2) at distance t <= pi/N, one
    dimension after the other.

    Args:
        kernel: K, (out, in, *window), dilation already written out as zeros.
        stride: per dimension.

    Returns:
        sup over all w of sigma_max(K^(w)), rounded up.

    References:
        Formule d'interpolation pour la derivee d'un polynome trigonometrique, M. Riesz, 1914.
    """
    if set(stride) != {1}:
        kernel = polyphase(kernel, stride)
    grid, shrinks = [], []
    for k in kernel.shape[2:]:
        n = 1
        if k > 1:
            n = max(RIESZ_GRID, 8 * k)
            # the cosine and its argument err by fewer than eight roundings
            shrinks.append(math.cos(math.pi * (k - 1) / (2 * n)) * (1 - 16 * UNIT))
        grid.append(n)
    bound = _grid_norm(kernel, grid)
    for shrink in shrinks:
        bound = bound / shrink
    return bound


def symbol(
    kernel: Float[Tensor, "out in *window"], grid: Sizes, origin: Sizes | None = None
) -> tuple[Tensor, Upper]:
    """K^(w) = sum_d K[d] e^{-i w (d - p)} at the grid frequencies, and its rounding error.

    Args:
        kernel: K, (out, in, *window).
        grid: torus size N_i per dimension.
        origin: offset p of the output pixel in the window, the padding before; default: zero.

    Returns:
        The symbol, (frequencies, out, in) complex128 (float64 if the window is one pixel), one of
        each conjugate pair of frequencies, and a bound of the Frobenius norm of the error of each
        frequency's matrix.
    """
    K = exact(kernel).flatten(2)
    if K.shape[2] == 1:
        return K.squeeze(2)[None], Upper(0.0)
    return _transform(K, _waves(kernel.shape[2:], grid, origin)), _symbol_error(K, len(grid))


def apply(module: Any, weight: Tensor, x: Tensor) -> Tensor:
    """``module`` with another weight and without bias, applied to a batch x (B, C, *size)."""
    if not is_transposed(module):
        return module._conv_forward(x, weight, None)
    functions = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
    return functions[weight.dim()](
        x,
        weight,
        None,
        module.stride,
        module.padding,
        module.output_padding,
        module.groups,
        module.dilation,
    )


def polyphase(kernel: Tensor, stride: Sizes) -> Tensor:
    """The kernel of the stride-one convolution on the space-to-depth image."""
    out, inner, *window = kernel.shape
    counts, split = [], []
    margins: list[int] = []  # F.pad counts from the last dimension
    for k, s in zip(window, stride, strict=True):
        count = -(-k // s)
        counts.append(count)
        split += [count, s]
        margins = [0, count * s - k, *margins]
    dimensions = len(window)
    phases = range(3, 3 + 2 * dimensions, 2)
    positions = range(2, 2 + 2 * dimensions, 2)
    parts = F.pad(kernel, margins).reshape(out, inner, *split).permute(0, 1, *phases, *positions)
    return parts.reshape(out, inner * math.prod(stride), *counts)


def _grid_norm(kernel: Tensor, grid: Sizes) -> Upper:
    K = exact(kernel).flatten(2)
    if K.shape[2] == 1:
        return spectral_norm(K.squeeze(2))
    error = _symbol_error(K, len(grid))
    chunks = _waves(kernel.shape[2:], grid).split(max(CHUNK // (K.shape[0] * K.shape[1]), 1))
    return Upper.max(*[spectral_norm(_transform(K, waves), error) for waves in chunks])


def _transform(K: Tensor, waves: Tensor) -> Tensor:
    return torch.einsum("oid,fd->foi", K.to(torch.complex128), waves)


def _symbol_error(K: Tensor, dimensions: int) -> Upper:
    """Frobenius norm of the rounding error of one frequency's matrix."""
    # angles are multiples of 2 pi / N within 16 u; sines, cosines and their products within 8 u
    # each
    relative = gamma(8 * (K.shape[2] + 2)) + 32 * dimensions * UNIT
    return frobenius_norm(enlarged(K.abs().sum(2), K.shape[2])) * relative


def _waves(window: Sizes, grid: Sizes, origin: Sizes | None = None) -> Tensor:
    """e^{-i w (d - p)} for half of the grid frequencies w (K is real) and the offsets d."""
    ranges = [range(n) for n in grid[:-1]]
    frequencies = torch.tensor(list(itertools.product(*ranges, range(grid[-1] // 2 + 1))))
    starts = origin or (0,) * len(grid)
    ranges = [range(-p, k - p) for k, p in zip(window, starts, strict=True)]
    offsets = torch.tensor(list(itertools.product(*ranges)))
    waves = torch.ones(len(frequencies), len(offsets), dtype=torch.complex128)
    for axis, n in enumerate(grid):
        turns = (frequencies[:, axis, None] * offsets[None, :, axis]) % n
        angle = turns.double() * (2 * math.pi / n)
        waves = waves * torch.complex(angle.cos(), -angle.sin())
    return waves


def multiplicities(grid: Sizes) -> Tensor:
    """How many of the torus's frequencies each frequency of ``symbol`` stands for: one or two."""
    half = torch.arange(grid[-1] // 2 + 1)
    is_single = (half == 0) | (2 * half == grid[-1])
    return torch.where(is_single, 1, 2).repeat(math.prod(grid[:-1]))


def is_transposed(module: Any) -> bool:
    """Whether the module is a transposed convolution."""
    return isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))


def kernels(module: Any) -> list[Tensor]:
    """One kernel per group, (out, in, *window), dilated; that of the adjoint if transposed."""
    weight = exact(module.weight)
    return [_dilated(part, module.dilation) for part in weight.chunk(module.groups, 0)]


def _dilated(kernel: Tensor, dilation: Sizes) -> Tensor:
    if set(dilation) == {1}:
        return kernel
    window = [(k - 1) * d + 1 for k, d in zip(kernel.shape[2:], dilation, strict=True)]
    wide = kernel.new_zeros(*kernel.shape[:2], *window)
    index = [slice(None), slice(None)]
    for d in dilation:
        index.append(slice(None, None, d))
    wide[tuple(index)] = kernel
    return wide


def paddings(module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Pixels added before and after the image, per dimension."""
    if module.padding == "valid":
        return (0,) * len(module.kernel_size), (0,) * len(module.kernel_size)
    if module.padding != "same":
        return tuple(module.padding), tuple(module.padding)
    before, after = [], []
    for d, k in zip(module.dilation, module.kernel_size, strict=True):
        total = d * (k - 1)
        before.append(total // 2)
        after.append(total - total // 2)
    return tuple(before), tuple(after)


def _adjoint_size(module: Any, size: Sizes, padding: tuple[Sizes, Sizes]) -> list[int]:
    """Output size of a transposed convolution, the input size of its adjoint."""
    result = []
    for axis, n in enumerate(size):
        window = (module.kernel_size[axis] - 1) * module.dilation[axis] + 1
        cropped = padding[0][axis] + padding[1][axis] - module.output_padding[axis]
        result.append((n - 1) * module.stride[axis] + window - cropped)
    return result


def _padding_norm(module: Any, size: Sizes) -> Upper:
    """Norm of the padding map: the root of how often it copies one pixel at most."""
    sides: list[int] = []  # F.pad counts from the last dimension
    for left, right in zip(*paddings(module), strict=True):
        sides = [left, right, *sides]
    pixels = torch.arange(math.prod(size), dtype=torch.float64).reshape(1, 1, *size)
    padded = F.pad(pixels, sides, mode=module.padding_mode)
    return Upper(int(padded.long().flatten().bincount().max())).sqrt()

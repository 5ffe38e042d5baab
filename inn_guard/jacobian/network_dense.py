"""The dense Jacobian of a feed-forward network at one sample, by products of matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inn_guard.jacobian.network import (
    Convolution,
    DiagonalJacobian,
    IdentityJacobian,
    LinearJacobian,
    NetworkJacobian,
    PointwiseConvolution,
    SequentialJacobian,
)

__all__ = ["add_product_", "dense_network"]

#: largest size of an intermediate product: memory of this size is reused after it has been freed
ENTRIES = 2**21
CHUNK = 64  #: columns of the identity at once

_MATRICES = (LinearJacobian, DiagonalJacobian, IdentityJacobian)


def dense_network(
    network: NetworkJacobian, shape: Sequence[int], *, gain: Tensor | None = None
) -> Tensor:
    """The Jacobian of a network at one sample, (dim out, dim in).

    For a chain of dense layers it is a product of matrices. A chain of convolutions that keep the
    size of the image is local: an output pixel depends on a window of the input only. These windows
    are composed, with one batch of matrix products over all pixels per layer. Other networks are
    multiplied with the columns of the identity.

    Args:
        network: the network's Jacobian at a batch of one.
        shape: shape of one input.
        gain: s, if the output is [t, h] along its channels and t + s h is to be differentiated
            instead, with s fixed. Default: the output itself is differentiated.
    """
    steps = _flat(network)
    if len(shape) == 3 and _are_local(steps):
        return _scattered(_windows(steps, shape, gain), shape)
    if len(shape) == 1 and all(isinstance(step, _MATRICES) for step in steps):
        J = _product(steps, network.output, shape[0])
    else:
        J = _by_columns(network, shape)
    if gain is None:
        return J
    shift, h = J.chunk(2)
    return torch.addcmul(shift, gain.reshape(-1, 1), h)


def add_product_(
    target: Tensor,
    network: NetworkJacobian,
    matrix: Tensor,
    *,
    shape: Sequence[int],
    gain: Tensor | None = None,
) -> None:
    """Add J M to ``target``, with the J of `dense_network`.

    Where a row of the output image depends on a few rows of the input image only, J is not formed:
    each row is multiplied with those.

    Args:
        target: (dim out, K), changed in place.
        network: the network's Jacobian at a batch of one.
        matrix: M, (dim in, K).
        shape: shape of one input.
        gain: as in `dense_network`.
    """
    steps = _flat(network)
    if len(shape) == 3 and _are_local(steps):
        T = _windows(steps, shape, gain)
        if T.shape[3] < shape[1]:
            _add_rows_(target, T, matrix)
            return
        target.addmm_(_scattered(T, shape), matrix)
        return
    target.addmm_(dense_network(network, shape, gain=gain), matrix)


def _add_rows_(target: Tensor, T: Tensor, matrix: Tensor) -> None:
    """Add J M to ``target`` image row by image row, for J given by the windows T.

    ``matrix`` is M, (channels * H * W, K); some of its columns are multiplied at a time.
    """
    height, width, out, _, _, channels = T.shape
    blocks = _row_blocks(T)
    columns = max(1, ENTRIES // len(matrix))
    for part, sums in zip(matrix.split(columns, dim=1), target.split(columns, dim=1), strict=True):
        # the channels of an image row together, so that neighbouring image rows form one block
        rows = part.unflatten(0, (channels, height, width)).transpose(0, 1).contiguous()
        products = part.new_empty(height, out * width, part.shape[1])
        for product, (begin, end, block) in zip(products, blocks, strict=True):
            torch.mm(block, rows[begin:end].view(-1, part.shape[1]), out=product)
        sums.unflatten(0, (out, height, width)).add_(
            products.unflatten(1, (out, width)).transpose(0, 1)
        )


def _row_blocks(T: Tensor) -> list[tuple[int, int, Tensor]]:
    """For each row of the output image: the input rows [begin, end) it depends on, and J there."""
    height, width, out, window = T.shape[:4]
    blocks = []
    for y, band in enumerate(_bands(T)):
        top = y - window // 2  # the first row of the window, which may lie above the image
        begin, end = max(0, top), min(height, top + window)
        block = band[:, :, begin - top : end - top].reshape(out * width, -1)
        blocks.append((begin, end, block))
    return blocks


def _bands(T: Tensor) -> Tensor:
    """d out[c, y, x] / d in[c', y + i, x'] as (y, c, x, i, c', x'): dense along the width."""
    height, width, out, window, columns, channels = T.shape
    canvas = T.new_zeros(height, out, width, window, channels, width + columns - 1)
    s = canvas.stride()
    # pixel x and column j of its window lie at x + j: one stride moves along both at once, so the
    # view has the shape of T and one copy writes all windows
    diagonal = canvas.as_strided(T.shape, (s[0], s[2] + s[5], s[1], s[3], s[5], s[4]))
    diagonal.copy_(T)
    return canvas[..., columns // 2 : columns // 2 + width]


def _flat(network: NetworkJacobian) -> list[NetworkJacobian]:
    """The steps of a network, those of nested chains in their place."""
    if not isinstance(network, SequentialJacobian):
        return [network]
    steps = []
    for step in network.steps:
        steps.extend(_flat(step))
    return steps


def _are_local(steps: Sequence[NetworkJacobian]) -> bool:
    """Whether all steps are local, and not all are the identity."""
    if all(isinstance(step, IdentityJacobian) for step in steps):
        return False
    return all(map(_is_local, steps))


def _is_local(step: NetworkJacobian) -> bool:
    """Whether a step is elementwise, or a convolution that keeps height and width."""
    if isinstance(step, Convolution):
        rows, columns = step.weight.shape[2:]
        stride, padding, dilation, groups = step.geometry
        keeps_size = tuple(padding) == (rows // 2, columns // 2) and rows % 2 == columns % 2 == 1
        return keeps_size and {*stride, *dilation, groups} == {1}
    return isinstance(step, (PointwiseConvolution, DiagonalJacobian, IdentityJacobian))


def _product(steps: Sequence[NetworkJacobian], like: Tensor, size: int) -> Tensor:
    """The Jacobian of a chain of dense and elementwise layers, (dim out, size)."""
    J = torch.eye(size, dtype=like.dtype, device=like.device)
    for step in steps:
        if isinstance(step, LinearJacobian):
            J = step.weight @ J
        elif isinstance(step, DiagonalJacobian):
            J = J * step.slope.reshape(-1, 1)
    return J


def _windows(steps: Sequence[NetworkJacobian], shape: Sequence[int], gain: Tensor | None) -> Tensor:
    """d out[c, p] / d in[c', p + d] as (H, W, c, window rows, window columns, c').

    Entries of the window that lie outside of the image are not used.
    """
    channels, height, width = shape
    steps = [step for step in steps if not isinstance(step, IdentityJacobian)]
    eye = torch.eye(channels, dtype=steps[0].output.dtype, device=steps[0].output.device)
    T = eye.reshape(1, 1, channels, 1, 1, channels).expand(height, width, -1, -1, -1, -1)
    pending = gain  # a last convolution applies it at a lower cost
    for k, step in enumerate(steps):
        if isinstance(step, DiagonalJacobian):
            T = T * _per_pixel(step.slope, height, width)
        elif isinstance(step, PointwiseConvolution):
            pixels = height * width
            weights = step.weight.expand(pixels, -1, -1)
            product = torch.bmm(weights, T.reshape(pixels, T.shape[2], -1))
            T = product.reshape(height, width, len(step.weight), *T.shape[3:])
        elif isinstance(step, Convolution) and k == 0:
            # the windows of a first convolution are its kernel: nothing to multiply
            T = step.weight.permute(0, 2, 3, 1).expand(height, width, -1, -1, -1, -1)
        elif isinstance(step, Convolution) and k == len(steps) - 1:
            T, pending = _convolved(step.weight, T, gain), None
        elif isinstance(step, Convolution):
            T = _convolved(step.weight, T, None)
    if pending is None:
        return T
    shift, h = T.chunk(2, dim=2)
    return torch.addcmul(shift, _per_pixel(pending, height, width), h)


def _per_pixel(values: Tensor, height: int, width: int) -> Tensor:
    """One number per channel and pixel, in a shape that broadcasts with the windows."""
    return values.reshape(-1, height, width).permute(1, 2, 0)[..., None, None, None]


def _convolved(weight: Tensor, T: Tensor, gain: Tensor | None) -> Tensor:
    """The windows after a convolution: each pixel's contributions to its readers, summed."""
    rows, columns = weight.shape[2:]
    height, width, hidden, *window, channels = T.shape
    weights = _at_every_pixel(weight, gain, height, width).unflatten(1, (rows * columns, -1))
    out = weights.shape[2]
    T = T.reshape(height * width, hidden, -1)
    grown = T.new_zeros(height, width, out, window[0] + rows - 1, window[1] + columns - 1, channels)
    offsets = list(itertools.product(range(rows), range(columns)))
    at_once = max(1, ENTRIES // (len(T) * out * T.shape[2]))
    for begin in range(0, len(offsets), at_once):
        some = offsets[begin : begin + at_once]
        parts = torch.bmm(weights[:, begin : begin + at_once].flatten(1, 2), T)
        parts = parts.reshape(height, width, len(some), out, *window, channels)
        for k, (i, j) in enumerate(some):
            to_y, from_y = _shifted(height, i - rows // 2)
            to_x, from_x = _shifted(width, j - columns // 2)
            target = grown[to_y, to_x, :, i : i + window[0], j : j + window[1]]
            target += parts[from_y, from_x, k]
    return grown


def _at_every_pixel(weight: Tensor, gain: Tensor | None, height: int, width: int) -> Tensor:
    """(pixels, window * out, in): the factors of a pixel for each pixel that reads it."""
    rows, columns = weight.shape[2:]
    kernel = weight.permute(2, 3, 0, 1)
    if gain is None:
        return kernel.reshape(-1, weight.shape[1]).expand(height * width, -1, -1)
    shift, h = kernel.chunk(2, dim=2)
    gain = gain.reshape(-1, height, width)
    # pixel p contributes to p - offset, whose gain applies
    moved = gain.new_zeros(height, width, rows, columns, len(gain))
    for i in range(rows):
        for j in range(columns):
            to_y, from_y = _shifted(height, rows // 2 - i)
            to_x, from_x = _shifted(width, columns // 2 - j)
            moved[to_y, to_x, i, j] = gain[:, from_y, from_x].permute(1, 2, 0)
    return torch.addcmul(shift, moved[..., None], h).reshape(height * width, -1, weight.shape[1])


def _shifted(size: int, offset: int) -> tuple[slice, slice]:
    """The pixels p for which p + offset is in the image, and the pixels p + offset."""
    begin, end = max(0, -offset), min(size, size - offset)
    return slice(begin, max(begin, end)), slice(begin + offset, max(begin, end) + offset)


def _scattered(T: Tensor, shape: Sequence[int]) -> Tensor:
    """The windows written into the rows of a dense matrix, (dim out, dim in)."""
    height, width, out, rows, columns, channels = T.shape
    # Windows at the border reach out of the image: they are written into a larger one, cut at the
    # end. As in `_bands`, one stride moves pixel and window together.
    tall, wide = height + rows - 1, width + columns - 1
    canvas = T.new_zeros(out, height, width, channels, tall, wide)
    s = canvas.stride()
    diagonal = canvas.as_strided(T.shape, (s[1] + s[4], s[2] + s[5], s[0], s[4], s[5], s[3]))
    diagonal.copy_(T)
    inside = canvas[..., rows // 2 : rows // 2 + height, columns // 2 : columns // 2 + width]
    return inside.reshape(out * height * width, math.prod(shape))


def _by_columns(network: NetworkJacobian, shape: Sequence[int]) -> Tensor:
    """The Jacobian from its products with the columns of the identity, (dim out, dim in)."""
    size = math.prod(shape)
    eye = torch.eye(size, dtype=network.output.dtype, device=network.output.device)
    columns = []
    for part in eye.split(CHUNK):
        columns.append(network.jvp(part.reshape(-1, 1, *shape)).reshape(len(part), -1))
    return torch.cat(columns).T

"""The dense Jacobian of a feed-forward network at one sample, by matrix products instead of one product per column."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inn_guard.network_tangent import (
    Composed,
    Convolution,
    Dense,
    NetworkTangent,
    PointwiseConvolution,
    Slope,
    Unchanged,
)

__all__ = ["dense_network"]

CHUNK = 64  #: columns at once where the products are computed one by one


def dense_network(network: NetworkTangent, shape: Sequence[int]) -> Tensor:
    """J of shape (dim out, dim in), of a network linearised at one sample.

    A chain of dense layers is a product of matrices. A chain of convolutions that keep the image's size is local: the
    derivative of one output pixel reaches a window of the input only, and those windows are composed, all pixels in
    one matrix product per layer. Anything else is multiplied with the columns of the identity.

    Args:
        network: its tangent, at a batch of one.
        shape: of one input.
    """
    steps = list(_flat(network))
    if len(shape) == 1 and all(isinstance(step, (Dense, Slope, Unchanged)) for step in steps):
        return _product(steps, network.output.new_empty(0), shape[0])
    if len(shape) == 3 and all(_is_local(step) for step in steps):
        return _scattered(_windows(steps, shape), shape)
    return _by_columns(network, shape)


def _flat(network: NetworkTangent) -> list[NetworkTangent]:
    if not isinstance(network, Composed):
        return [network]
    return [inner for step in network.steps for inner in _flat(step)]


def _is_local(step: NetworkTangent) -> bool:
    """Whether it is elementwise, or a convolution that keeps height and width."""
    if isinstance(step, Convolution):
        (rows, columns), geometry = step.weight.shape[2:], step.geometry
        same = tuple(geometry[1]) == (rows // 2, columns // 2) and rows % 2 == columns % 2 == 1
        return same and {*geometry[0], *geometry[2], geometry[3]} == {1}
    return isinstance(step, (PointwiseConvolution, Slope, Unchanged))


def _product(steps: Sequence[NetworkTangent], like: Tensor, size: int) -> Tensor:
    J = torch.eye(size, dtype=like.dtype, device=like.device)
    for step in steps:
        if isinstance(step, Dense):
            J = step.weight @ J
        elif isinstance(step, Slope):
            J = J * step.slope.reshape(-1, 1)
    return J


def _windows(steps: Sequence[NetworkTangent], shape: Sequence[int]) -> Tensor:
    """d out[c, p] / d in[c', p + d] as (c, H, W, window rows, window columns, c').

    Entries of the window that lie outside of the image are not used.
    """
    channels, height, width = shape
    T: Tensor | None = None
    for step in steps:
        if isinstance(step, Unchanged):
            continue
        if T is None:
            reference = step.slope if isinstance(step, Slope) else step.weight  # type: ignore[attr-defined]
            eye = torch.eye(channels, dtype=reference.dtype, device=reference.device)
            T = eye.reshape(channels, 1, 1, 1, 1, channels).expand(-1, height, width, -1, -1, -1)
        if isinstance(step, Slope):
            T = T * step.slope.reshape(*T.shape[:3], 1, 1, 1)
        elif isinstance(step, PointwiseConvolution):
            T = torch.tensordot(step.weight, T, dims=1)
        elif isinstance(step, Convolution):
            T = _first(step.weight, T) if T.shape[3:5] == (1, 1) and T.stride(1) == 0 else _convolved(step.weight, T)
    if T is None:
        raise ValueError("expected at least one layer with a weight or a slope")
    return T


def _first(weight: Tensor, identity: Tensor) -> Tensor:
    """A convolution of the identity: the same window at every pixel."""
    window = weight.permute(0, 2, 3, 1)
    return window[:, None, None].expand(-1, *identity.shape[1:3], -1, -1, -1)


def _convolved(weight: Tensor, T: Tensor) -> Tensor:
    """A convolution after T: the windows of the pixels it reads, shifted and summed."""
    (out, _, rows, columns), (_, height, width, *window, channels) = weight.shape, T.shape
    parts = weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1]) @ T.reshape(len(T), -1)
    parts = parts.reshape(rows, columns, out, height, width, *window, channels)
    grown = parts.new_zeros(out, height, width, window[0] + rows - 1, window[1] + columns - 1, channels)
    for i in range(rows):
        for j in range(columns):
            (to_y, from_y), (to_x, from_x) = _shifted(height, i - rows // 2), _shifted(width, j - columns // 2)
            target = grown[:, to_y, to_x, i : i + window[0], j : j + window[1]]
            target += parts[i, j][:, from_y, from_x]
    return grown


def _shifted(size: int, offset: int) -> tuple[slice, slice]:
    """The pixels p for which p + offset is in the image, and those p + offset."""
    begin, end = max(0, -offset), min(size, size - offset)
    return slice(begin, max(begin, end)), slice(begin + offset, max(begin, end) + offset)


def _scattered(T: Tensor, shape: Sequence[int]) -> Tensor:
    """The windows written into the rows of a dense matrix, (dim out, dim in)."""
    (out, height, width, rows, columns, channels), T = T.shape, T.contiguous()
    tall, wide = height + rows - 1, width + columns - 1
    canvas = T.new_zeros(out, height, width, channels, tall, wide)
    s = canvas.stride()
    diagonal = canvas.as_strided(
        (out, height, width, rows, columns, channels), (s[0], s[1] + s[4], s[2] + s[5], s[4], s[5], s[3])
    )
    diagonal.copy_(T)
    inside = canvas[..., rows // 2 : rows // 2 + height, columns // 2 : columns // 2 + width]
    return inside.reshape(out * height * width, math.prod(shape))


def _by_columns(network: NetworkTangent, shape: Sequence[int]) -> Tensor:
    size = math.prod(shape)
    eye = torch.eye(size, dtype=network.output.dtype, device=network.output.device)
    columns = [network.jvp(part.reshape(-1, 1, *shape)).reshape(len(part), -1) for part in eye.split(CHUNK)]
    return torch.cat(columns).T

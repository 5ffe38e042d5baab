"""Steps of whole families of layers, whose parameters are found by evaluating the layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.exact.fixed_point import NoExactRule
from inn_guard.exact.steps import Affine, Constants, Matrix, Moves, Step

__all__ = ["channels_of", "coupling", "elementwise_affine", "matrix", "moves"]

EXACT_IN_FLOAT32 = 2**24  #: below which integers are numbers of float32


def moves(layer: Invertible, x: Tensor) -> list[Step]:
    """Of a map that only moves entries."""
    samples = 1 if layer.context is None else None
    if x.dtype == torch.float32 and x[0].numel() < EXACT_IN_FLOAT32:
        return [Moves.of(layer, x, samples=samples, dtype=x.dtype)]
    return [Moves.of(layer.to_dtype(torch.float64), x, samples=samples)]


def elementwise_affine(layer: Invertible, x: Tensor) -> list[Step]:
    """Of z = scale * x + shift with constants: the layer in float64 at zeros and at ones."""
    if layer.training:
        raise NoExactRule("it is in training mode and may change in a forward pass")
    double = layer.to_dtype(torch.float64)
    samples = x if layer.context is not None else x[:1]
    zeros = torch.zeros_like(samples, dtype=torch.float64)
    shift = double(zeros)
    scale = double(zeros + 1) - shift
    return [Affine(Constants(scale, shift), None, dtype=x.dtype)]


def matrix(layer: Invertible, x: Tensor) -> list[Step]:
    """Of z = W x + b over the channels: the layer in float64 at unit vectors and at zero."""
    if layer.context is not None:
        raise NoExactRule("its matrix may depend on the context")
    double = layer.to_dtype(torch.float64)
    channels = x.shape[1]
    # every position has the same matrix: one is enough
    zeros = x.new_zeros(channels, channels, *[1] * (x.dim() - 2), dtype=torch.float64)
    units = zeros.clone()
    index = torch.arange(channels, device=x.device)
    units[index, index] = 1
    origin = double(zeros)
    columns = double(units) - origin
    weight = columns.reshape(channels, channels, -1)[:, :, 0].T
    bias = origin.reshape(channels, channels, -1)[0, :, 0]
    if not bool(bias.any()):
        return [Matrix(weight, None, dtype=x.dtype)]
    return [Matrix(weight, bias, dtype=x.dtype)]


def coupling(
    x: Tensor,
    identity: Tensor,
    changed: Tensor,
    parameters: Callable[[Tensor], tuple[Tensor | None, Tensor | None]],
) -> Affine:
    """One coupling along dimension 1.

    Args:
        x: a batch of inputs.
        identity: channels that stay.
        changed: channels that are scaled and shifted.
        parameters: x[:, identity] -> (scale, shift) of x[:, changed].
    """

    def at(known: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return parameters(known.index_select(1, identity))

    return Affine(at, channels_of(changed, x), dtype=x.dtype)


def channels_of(channels: Tensor, x: Tensor) -> Tensor:
    """The entries of these channels, as indices into one flat sample."""
    positions = x.shape[2:].numel()
    inside = torch.arange(positions, device=channels.device)
    return (channels[:, None] * positions + inside).flatten()

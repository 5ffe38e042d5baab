"""The bound rules of this package's models: autoencoders, and the autoencoders within flows."""

# The name of a rule says what it is: bound_<block>.
# ruff: noqa: D103

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from inn_guard.core.readable import is_plain
from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap, bounded_map
from inn_guard.lipschitz.maps.elementary import Diagonal, Rearrangement, ShapeDependent
from inn_guard.lipschitz.maps.preimage import everywhere
from inn_guard.lipschitz.networks.conditioner import SearchBudget, analyse, subnetwork_lipschitz
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.models.aef.flow import ResidualScale
from inn_guard.models.aef.model import CoreLast
from inn_guard.models.autoencoder import Autoencoder
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import Upper


@bounded_map.register
def bound_core_last(block: CoreLast, layer: Any) -> BoundedMap:
    return Rearrangement(block.forward)


@bounded_map.register
def bound_residual_scale(block: ResidualScale, layer: Any) -> BoundedMap:
    def make(box: Interval) -> BoundedMap:
        scale = torch.ones(box.shape[0], dtype=torch.float64)
        scale[: len(block.raw)] = 1 / block.sigma().detach().double().cpu()
        return Diagonal(scale, torch.zeros_like(scale))

    return ShapeDependent(make)


@bounded_map.register
def bound_autoencoder(block: Autoencoder, layer: Any) -> BoundedMap:
    return _EncoderDecoder(block.encoder, block.decoder, block.stochastic)


@dataclass(frozen=True)
class _EncoderDecoder(BoundedMap):
    """The encoder on the box; in place of its inverse the decoder on a box that holds the codes.

    Neither undoes the other: a bound of one says nothing about the other, there is no Remark 3.

    Attributes:
        encoder: if it is stochastic its outputs hold log-variances too, which the bound includes.
        decoder: from codes to data.
        stochastic: whether only the first half of the encoder's outputs is the code.
    """

    encoder: nn.Module
    decoder: nn.Module
    stochastic: bool

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """The least of norm product and recursion, part by part."""
        forward, first_reason = _constant("encoder", self.encoder, box, effort)
        codes = self.image(box)
        inverse, last_reason = _constant("decoder", self.decoder, codes, effort)
        return BlockBounds(
            forward,
            inverse,
            is_global=not box.bounded,
            reason=first_reason or last_reason,
            method="recursions of two networks",
        )

    def image(self, box: Interval) -> Interval:
        """A box of the codes; all of space where the encoder is not understood."""
        output = box
        try:
            for part, shape in _parts(self.encoder):
                output = _reshaped(analyse(part, output).output, shape)
        except Unbounded:
            sample = Interval.of(torch.zeros_like(box.lo)[None])
            output = everywhere(sample.map(self.encoder)[0])
        if self.stochastic:
            return output.map(lambda t: t.chunk(2)[0])
        return output


def _constant(
    name: str, network: nn.Module, box: Interval, effort: SearchBudget
) -> tuple[float, str]:
    """A Lipschitz constant within half of the time that is left, and why it is infinite."""
    half, constant = effort.fraction(0.5), Upper(1.0)
    try:
        for part, shape in _parts(network):
            constant = constant * subnetwork_lipschitz(part, box, effort=half)
            box = _reshaped(analyse(part, box).output, shape)
    except Unbounded as why:
        return math.inf, f"{name}: {why}"
    return constant, ""


def _parts(network: nn.Module) -> Iterator[tuple[nn.Module, Sequence[int] | None]]:
    """A chain cut where it unflattens, an isometry, with the shape after each cut."""
    children: list[Any] = [network]
    if is_plain(network, nn.Sequential):
        sequence: Any = network
        children = list(sequence)
    begin = 0
    for k, child in enumerate(children):
        if is_plain(child, nn.Unflatten) and child.dim == 1:
            yield nn.Sequential(*children[begin:k]), tuple(child.unflattened_size)
            begin = k + 1
    yield nn.Sequential(*children[begin:]), None


def _reshaped(box: Interval, shape: Sequence[int] | None) -> Interval:
    if shape is None:
        return box
    return box.map(lambda t: t.reshape(*shape))

"""Lipschitz constants of an autoencoder: of its encoder on a box, and of its decoder on a box that holds the codes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap, bounded_map
from inn_guard.lipschitz.networks.conditioner import SearchBudget, read, subnetwork_lipschitz
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.whole_network import product
from inn_guard.models.autoencoder import Autoencoder
from inn_guard.numerics.intervals import Interval

__all__ = ["EncoderDecoder"]


@dataclass(frozen=True)
class EncoderDecoder(BoundedMap):
    """h on the box, and in place of the inverse g on the image of the box, where all of its codes lie.

    Neither undoes the other, so that the two constants have nothing to do with each other: there is no Remark 3.

    Attributes:
        encoder: h; its outputs beyond ``latent``, the log-variances of a stochastic one, go into the bound as well.
        decoder: g.
        stochastic: whether only the first half of the encoder's outputs is the code.
    """

    encoder: nn.Module
    decoder: nn.Module
    stochastic: bool

    def bounds(self, box: Interval, effort: SearchBudget) -> BlockBounds:
        """Certified constants of h and g: the least of norm product and recursion, part by part."""
        found, reason = [], ""
        for name, network, domain in (
            ("encoder", self.encoder, box),
            ("decoder", self.decoder, self.image(box)),
        ):
            try:
                found.append(_constant(network, domain, effort.within(0.5)))
            except Unbounded as why:
                found.append(math.inf)
                reason = reason or f"{name}: {why}"
        return BlockBounds(
            found[0],
            found[1],
            is_global=not box.bounded,
            reason=reason,
            method="recursions of two networks",
        )

    def image(self, box: Interval) -> Interval:
        """A box of the codes; all of space where the encoder is not understood."""
        try:
            output = box
            for part, shape in _parts(self.encoder):
                output = _shaped(read(part, output).output, shape)
        except Unbounded:
            everything = torch.full_like(self.encoder(torch.zeros_like(box.lo)[None])[0], math.inf)
            output = Interval(-everything, everything)
        return output.map(lambda t: t.chunk(2)[0]) if self.stochastic else output


def _constant(network: nn.Module, box: Interval, effort: SearchBudget) -> float:
    constants = []
    for part, shape in _parts(network):
        constants.append(subnetwork_lipschitz(part, box, effort=effort))
        box = _shaped(read(part, box).output, shape)
    return product(constants)


def _parts(network: nn.Module) -> Iterator[tuple[nn.Module, Sequence[int] | None]]:
    """A chain cut where it unflattens, which is an isometry, with the shape that comes out there."""
    children = list(network) if isinstance(network, nn.Sequential) else [network]
    begin = 0
    for k, child in enumerate(children):
        if isinstance(child, nn.Unflatten) and child.dim == 1:
            yield nn.Sequential(*children[begin:k]), tuple(child.unflattened_size)
            begin = k + 1
    yield nn.Sequential(*children[begin:]), None


def _shaped(box: Interval, shape: Sequence[int] | None) -> Interval:
    return box if shape is None else box.map(lambda t: t.reshape(*shape))


@bounded_map.register
def _(block: Autoencoder, layer: Any) -> BoundedMap:
    return EncoderDecoder(block.encoder, block.decoder, block.stochastic)

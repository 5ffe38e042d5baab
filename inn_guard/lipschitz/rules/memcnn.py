"""The bound rules of MemCNN: its two-sided couplings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from memcnn import AdditiveCoupling, AffineAdapterNaive, AffineAdapterSigmoid, AffineCoupling
from torch import Tensor, nn

from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.composition import Composition
from inn_guard.lipschitz.maps.coupling import ByChannel, Coupling
from inn_guard.lipschitz.maps.elementary import ShapeDependent
from inn_guard.lipschitz.transformers.affine import (
    Additive,
    Affine,
    SigmoidScaleBounds,
    Transformer,
)
from inn_guard.lipschitz.transformers.inverse_affine import ExpScale
from inn_guard.numerics.intervals import Interval

Half = tuple[
    nn.Module, Transformer, Sequence[Tensor]
]  #: network, what it does to an entry, rows of its parameters


@bounded_map.register
def _(block: AdditiveCoupling, layer: Any) -> BoundedMap:
    return _two_sided(block, lambda network, n: (network, Additive(), [torch.arange(n)]))


@bounded_map.register
def _(block: AffineCoupling, layer: Any) -> BoundedMap:
    if not all(
        isinstance(network, (AffineAdapterNaive, AffineAdapterSigmoid))
        for network in (block.Fm, block.Gm)
    ):
        return NoRule("an affine coupling with an adapter of the user's own")
    return _two_sided(block, _affine)


def _affine(adapter: Any, n: int) -> Half:
    if isinstance(
        adapter, AffineAdapterNaive
    ):  # one output is both the shift and the logarithm of the scale
        return adapter.f, Affine(ExpScale()), [torch.arange(n), torch.arange(n)]
    rows = [torch.arange(n) * 2, torch.arange(n) * 2 + 1]
    return adapter.f, Affine(SigmoidScaleBounds(0.0, 1.0, 2.0)), rows


def _two_sided(block: Any, half: Any) -> BoundedMap:
    """The first half changes by the second, then the second by the new first."""
    if block.split_dim != 1:
        return NoRule("a coupling that is not split along the channels")

    def make(box: Interval) -> BoundedMap:
        halves = ByChannel.halves(box.shape[0], (box.shape[0] + 1) // 2)
        parts = []
        for split, network in ((halves.swapped, block.Fm), (halves, block.Gm)):
            net, transformer, rows = half(network, len(split.change))
            parts.append(Coupling(split, net, transformer, rows))
        return Composition(tuple(parts))

    return ShapeDependent(make, (block.Fm, block.Gm))

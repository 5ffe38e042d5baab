"""The bound rules of MemCNN: its two-sided couplings."""

# The name of a rule says what it is: bound_<block>.
# ruff: noqa: D103

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from memcnn import AdditiveCoupling, AffineAdapterNaive, AffineAdapterSigmoid, AffineCoupling
from torch import Tensor, nn

from inn_guard.core.readable import is_plain
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.composition import Composition
from inn_guard.lipschitz.maps.coupling import ByChannel, Coupling, interleaved_rows
from inn_guard.lipschitz.maps.elementary import ShapeDependent
from inn_guard.lipschitz.transformers.affine import (
    EXPONENTIAL,
    Additive,
    Affine,
    SigmoidScaleBounds,
)
from inn_guard.lipschitz.transformers.base import Transformer
from inn_guard.numerics.intervals import Interval

#: network, its transformer, and the rows of its parameters
Half = tuple[nn.Module, Transformer, Sequence[Tensor]]


@bounded_map.register
def bound_additive_coupling(block: AdditiveCoupling, layer: Any) -> BoundedMap:
    return _two_sided(block, lambda network, n: (network, Additive(), [torch.arange(n)]))


@bounded_map.register
def bound_affine_coupling(block: AffineCoupling, layer: Any) -> BoundedMap:
    known = (AffineAdapterNaive, AffineAdapterSigmoid)
    if not is_plain(block.Fm, *known) or not is_plain(block.Gm, *known):
        return NoRule("an affine coupling with an adapter of the user's own")
    return _two_sided(block, _affine)


def _affine(adapter: Any, n: int) -> Half:
    if isinstance(adapter, AffineAdapterNaive):
        # one output is both the shift and the logarithm of the scale
        return adapter.f, Affine(EXPONENTIAL), [torch.arange(n), torch.arange(n)]
    return adapter.f, Affine(SigmoidScaleBounds(0.0, 1.0, 2.0)), interleaved_rows(n, 2)


def _two_sided(block: Any, half: Callable[[Any, int], Half]) -> BoundedMap:
    """The first half changes by the second, then the second by the new first."""
    if block.split_dim != 1:
        return NoRule("a coupling that is not split along the channels")

    def make(box: Interval) -> BoundedMap:
        halves = ByChannel.halves(box.shape[0], (box.shape[0] + 1) // 2)
        parts = []
        for split, adapter in ((halves.swapped, block.Fm), (halves, block.Gm)):
            network, transformer, rows = half(adapter, len(split.change))
            parts.append(Coupling(split, network, transformer, rows))
        return Composition(tuple(parts))

    return ShapeDependent(make, (block.Fm, block.Gm))

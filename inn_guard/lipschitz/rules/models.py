"""Bound rules of the neural ODE and of autoencoders within flows."""

from __future__ import annotations

from typing import Any

import torch

from inn_guard.lipschitz.maps import elementary as maps
from inn_guard.lipschitz.maps.base import BoundedMap, bounded_map
from inn_guard.models.aef.flow import ResidualScale
from inn_guard.models.aef.model import CoreLast


@bounded_map.register
def _(block: CoreLast, layer: Any) -> BoundedMap:
    return maps.Rearrangement(block.forward)


@bounded_map.register
def _(block: ResidualScale, layer: Any) -> BoundedMap:
    def make(entries: int) -> BoundedMap:
        scale = torch.ones(entries, dtype=torch.float64)
        scale[: len(block.raw)] = 1 / block.sigma().detach().double().cpu()
        return maps.Diagonal(scale, torch.zeros_like(scale))

    return maps.ShapeDependent(lambda box: make(box.shape[0]))

"""How many bits each layer of a forward pass throws away."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.audited_model import ModelError
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable

__all__ = ["bits_lost", "bits_lost_by_layer"]


@torch.no_grad()
def bits_lost(layer: Invertible, state: Tensor, *, dimension: int) -> Tensor:
    """Bits that a layer throws away at an absolute resolution, per entry of x.

        bits_b = -log2|det J(h_b)| / D

    Of two numbers with p bits after the point, a contraction by s leaves p - log2(1/s) bits apart.
    The sum over singular values is the log-determinant. A negative number is room that the layer
    makes. It is what ``exact(model)`` has to keep of the layer to restore its input.

    Args:
        layer: a bijective layer.
        state: its inputs h, (B, *shape).
        dimension: D, of x.

    Returns:
        (B,) float64; NaN where the layer has no log-determinant.
    """
    try:
        log_det = layer.forward_and_log_det(state)[1].double()
    except (ModelError, NotApplicable):
        return torch.full((len(state),), torch.nan, dtype=torch.float64, device=state.device)
    return -log_det / (math.log(2) * dimension)


@torch.no_grad()
def bits_lost_by_layer(model: Invertible, x: Tensor) -> tuple[dict[str, Any], ...]:
    """One row per layer: index, name and ``bits_lost``, the mean over the samples of x (B, *data).

    >>> from inn_guard.layers.actnorm import Diagonal
    >>> layer = Diagonal(2)
    >>> _ = layer.log_scale.data.fill_(-math.log(2))
    >>> round(bits_lost_by_layer(layer, torch.zeros(1, 2))[0]["bits_lost"], 6)
    1.0
    """
    rows: list[dict[str, Any]] = []
    state = x
    for index, layer in enumerate(model.layers() or (model,)):
        lost = bits_lost(layer, state, dimension=x[0].numel()).mean().item()
        rows.append({"index": index, "name": layer.name, "bits_lost": lost})
        state = layer(state)
    return tuple(rows)

"""Where the inverse of a flow overflows: sizes of its layers' inputs, on samples and on data."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.common.runner import Row
from inn_guard.core.invertible import Invertible

__all__ = ["overflow"]


@torch.no_grad()
def overflow(flow: Invertible, latents: Tensor, x: Tensor) -> Row:
    """The first layer whose inverse gives a value that is not finite, and the size of its inputs.

    Args:
        flow: with layers.
        latents: what the inverse is taken of, (B, D).
        x: images, for comparison, (B, C, H, W).

    Returns:
        ``overflow_samples``: how many samples lose a value; ``overflow_layer``: number and name of
        the layer, "" for none; ``overflow_input``: the largest input of that layer among these
        samples; ``overflow_input_on_data``: the largest one among the images.
    """
    layers = list(enumerate(flow.layers()))
    on_data = []
    for _, layer in layers:
        x = layer(x)
        on_data.append(x.abs().max().item())
    row: Row = {
        "overflow_samples": 0,
        "overflow_layer": "",
        "overflow_input": None,
        "overflow_input_on_data": None,
    }
    for k, layer in reversed(layers):
        after = layer.inverse(latents)
        lost = ~after.flatten(1).isfinite().all(1)
        if bool(lost.any()) and not row["overflow_layer"]:
            row["overflow_layer"] = f"{k} {layer.name}"
            row["overflow_input"] = latents[lost].abs().max().item()
            row["overflow_input_on_data"] = on_data[k]
        row["overflow_samples"] = int(lost.sum())
        latents = after
    return row

"""Random numbers that belong to samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Noise", "SampleNoise", "as_noise", "current_device", "generator_of_device"]

#: shape (B, ...) -> standard normal numbers, float64, on the CPU
Noise = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class SampleNoise:
    """Standard normal numbers for some samples of a batch: the same as in a run over all samples.

    Args:
        generator: on the CPU; it advances by the draws of the whole batch.
        rows: positions in the batch.
        count: samples in the batch.
    """

    generator: torch.Generator
    rows: Tensor
    count: int

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """Numbers of shape (len(rows), ...), float64, on the CPU."""
        # the whole batch is drawn, so that a sample's numbers do not depend on who computes it
        whole = (self.count, *shape[1:])
        drawn = torch.randn(whole, generator=self.generator, device="cpu", dtype=torch.float64)
        return drawn[self.rows.cpu()]


def as_noise(source: torch.Generator | Noise) -> Noise:
    """A generator as a function that draws with it; a function is returned as it is."""
    if not isinstance(source, torch.Generator):
        return source
    return lambda shape: torch.randn(
        tuple(shape), generator=source, device="cpu", dtype=torch.float64
    )


def generator_of_device(device: torch.device) -> Any:
    """What holds the global random numbers of an accelerator: torch.cuda, torch.mps, torch.xpu ...

    It has ``get_rng_state(device)``, ``set_rng_state(state, device)`` and ``manual_seed(seed)``.
    None for the CPU, and for devices that draw no numbers, such as "meta".
    """
    if device.type == "cpu":
        return None
    holder = getattr(torch, device.type, None)
    if not hasattr(holder, "get_rng_state"):
        return None
    return holder


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which ``device`` is the current one of its kind, where there are several."""
    switch = getattr(getattr(torch, device.type, None), "device", None)
    return nullcontext() if switch is None else switch(device)

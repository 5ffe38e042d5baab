"""normflows' MultiscaleFlow as one chain: latents that are finished in front, what is still worked on behind."""

from __future__ import annotations

import math
from typing import Any

import torch
from normflows.core import MultiscaleFlow
from normflows.flows import Merge, Squeeze
from torch import Tensor

from inn_guard.adapters.base import Adapted
from inn_guard.adapters.normflows.layers import chain_of
from inn_guard.core.invertible import Invertible, NotApplicable
from inn_guard.layers.inverted import InverseLayer
from inn_guard.layers.multiscale import OnRemaining
from inn_guard.layers.reshape import Flatten, Rearrangement

__all__ = ["NormflowsMultiscale", "SplitOff"]

Shape = tuple[int, ...]


class NormflowsMultiscale(Adapted):
    """A MultiscaleFlow. z is flat, the latents in the order in which they are finished: the library's list reversed.

    ``unpack(z)`` is that list. The context are the class labels y, which go to the base distributions alone.
    """

    module: MultiscaleFlow

    def unpack(self, z: Tensor) -> list[Tensor]:
        """z (B, D) as the list of latents that the library takes and returns.

        Raises:
            NotApplicable: if the base distributions do not tell their shapes.
        """
        shapes = self._latents()
        parts = z.split([math.prod(shape) for shape in reversed(shapes)], dim=1)
        return [
            part.reshape(-1, *shape) for part, shape in zip(reversed(parts), shapes, strict=True)
        ]

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        latents, log_det = self.module.inverse_and_log_det(x)
        return torch.cat([latent.flatten(1) for latent in reversed(latents)], dim=1), log_det

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        return self.module.forward_and_log_det(self.unpack(z))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,), by the model's own base distributions, in the classes that are its context."""
        if any(getattr(base, "shape", None) is None for base in self.module.q0):
            # the latents in z cannot be told apart
            return self.module.log_prob(x.clone(), self.context)
        z, log_det = self.forward_and_log_det(x)
        return self._base_log_prob(z) + log_det

    def _base_log_prob(self, z: Tensor) -> Tensor:
        classes: tuple[Any, ...] = ()
        if self.module.class_cond:
            classes = (self.context,)
        total = z.new_zeros(len(z))
        for base, latent in zip(self.module.q0, self.unpack(z), strict=True):
            total = total + base.log_prob(latent, *classes)  # type: ignore[operator]
        return total

    def layers(self) -> tuple[Invertible, ...]:
        """The flows of every level, from the second on acting on the remaining part; () if a merge is unknown."""
        if not all(isinstance(merge, Merge) for merge in self.module.merges):
            return ()
        levels = self._levels()
        first = [] if self.module.transform is None else list(chain_of(self.module.transform))
        flat: list[Invertible] = first
        for k, (steps, shape, latent) in enumerate(levels):
            flat += steps if k == 0 else _on_remaining(steps, shape)
            last = k == len(levels) - 1
            cut = (
                Flatten(latent)
                if last
                else SplitOff(self.module.merges[-1 - k], levels[k + 1][1], latent)
            )
            flat.append(
                cut if k == 0 else OnRemaining(cut, shape=latent, latent_shape=(math.prod(latent),))
            )
        return tuple(flat)

    def _levels(self) -> list[tuple[tuple[Invertible, ...], Shape, Shape]]:
        """Per level, from the data on: its layers, the shape they start from and the one they end with."""
        levels: list[tuple[tuple[Invertible, ...], Shape, Shape]] = []
        before: Shape = ()
        for k, (flows, finished) in enumerate(zip(self.module.flows, self._latents(), strict=True)):
            after = finished if k == 0 else _merged(self.module.merges[k - 1], before, finished)
            steps = tuple(layer for flow in reversed(list(flows)) for layer in chain_of(flow))  # type: ignore[call-overload]
            before = after
            for step in reversed(steps):
                before = _shape_before(step, before)
            levels.insert(0, (steps, before, after))
        return levels

    def _latents(self) -> list[Shape]:
        """Shape of one sample of each latent, as its base distribution has it, in the library's order."""
        shapes = [getattr(base, "shape", None) for base in self.module.q0]
        if any(shape is None for shape in shapes):
            raise NotApplicable(
                "the base distributions have no attribute shape, so the latents' shapes are unknown; "
                "type wrap(encode=..., decode=...) with one tensor z instead"
            )
        return [(shape,) if isinstance(shape, int) else tuple(shape) for shape in shapes]  # type: ignore[arg-type]


class SplitOff(Rearrangement):
    """x (B, *shape) -> [finished, remaining], flat, as a Merge of normflows takes it apart.

    Args:
        merge: puts [remaining, finished] together.
        remaining: shape of one sample of what remains.
        shape: of x.
    """

    def __init__(self, merge: Any, remaining: Shape, shape: Shape) -> None:
        super().__init__()
        self.merge, self.remaining = merge, remaining
        self.finished = _rest(merge, shape, remaining)

    def forward(self, x: Tensor) -> Tensor:
        """[finished, remaining], (B, D)."""
        (remaining, finished), _ = self.merge.inverse(x)
        return torch.cat([finished.flatten(1), remaining.flatten(1)], dim=1)

    def inverse(self, z: Tensor) -> Tensor:
        """Both put together."""
        finished, remaining = z.split([math.prod(self.finished), math.prod(self.remaining)], dim=1)
        return self.merge(
            [remaining.reshape(-1, *self.remaining), finished.reshape(-1, *self.finished)]
        )[0]


def _merged(merge: Any, remaining: Shape, finished: Shape) -> Shape:
    """Shape of what a merge puts together: along the channels, or along the last dimension for checkerboards."""
    dim = len(remaining) - 1 if "checkerboard" in merge.mode else 0
    return (*remaining[:dim], remaining[dim] + finished[dim], *remaining[dim + 1 :])


def _rest(merge: Any, shape: Shape, remaining: Shape) -> Shape:
    dim = len(remaining) - 1 if "checkerboard" in merge.mode else 0
    return (*shape[:dim], shape[dim] - remaining[dim], *shape[dim + 1 :])


def _on_remaining(steps: tuple[Invertible, ...], shape: Shape) -> list[Invertible]:
    lifted: list[Invertible] = []
    for step in steps:
        latent = _shape_after(step, shape)
        lifted.append(OnRemaining(step, shape=shape, latent_shape=latent))
        shape = latent
    return lifted


def _shape_after(step: Invertible, shape: Shape) -> Shape:
    """From the data's side to the latents': a Squeeze makes blocks of pixels into channels."""
    if isinstance(step, InverseLayer):
        return _shape_before(step.inner, shape)
    if isinstance(step.block, Squeeze):
        return (4 * shape[0], shape[1] // 2, shape[2] // 2)
    return shape


def _shape_before(step: Invertible, shape: Shape) -> Shape:
    if isinstance(step, InverseLayer):
        return _shape_after(step.inner, shape)
    if isinstance(step.block, Squeeze):
        return (shape[0] // 4, 2 * shape[1], 2 * shape[2])
    return shape

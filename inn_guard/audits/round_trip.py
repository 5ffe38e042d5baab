"""Running a model there and back, and finding the layer in which a number stopped being finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.limits import data_scale
from inn_guard.audits.watched import shares_of
from inn_guard.invertible import Invertible

__all__ = [
    "RoundTrip",
    "finite_rows",
    "first_non_finite",
    "latent_trip",
    "round_trip",
    "standard_normal",
    "unconverged",
]


@dataclass(frozen=True)
class RoundTrip:
    """start -> middle -> end, which ought to be start. Errors are (B,) float64 on the CPU.

    Attributes:
        start: where the trip began, (B, *).
        middle: the other side, (B, *).
        end: what came back, (B, *).
    """

    start: Tensor
    middle: Tensor
    end: Tensor

    @property
    def largest(self) -> Tensor:
        """Largest absolute error of any entry."""
        return self._difference.abs().amax(1).cpu()

    @property
    def l2(self) -> Tensor:
        """Euclidean length of the error."""
        return self._difference.norm(dim=1).cpu()

    @property
    def relative(self) -> Tensor:
        """Largest absolute error in units of the data's scale."""
        return self.largest / data_scale(self.start).cpu()

    @property
    def finite(self) -> Tensor:
        """Samples that stayed finite all the way."""
        return (finite_rows(self.middle) & finite_rows(self.end)).cpu()

    @property
    def _difference(self) -> Tensor:
        return (self.end.double() - self.start.double()).flatten(1)


def round_trip(model: Invertible, x: Tensor, *, batch_size: int) -> RoundTrip:
    """x -> z -> x, without a graph."""
    z = _in_batches(model, x, lambda part, rows: part(rows), batch_size)
    return RoundTrip(x, z, _in_batches(model, z, lambda part, rows: part.inverse(rows), batch_size))


def latent_trip(model: Invertible, z: Tensor, *, batch_size: int, x: Tensor | None = None) -> RoundTrip:
    """z -> x -> z, without a graph; ``x`` is F^-1(z) where it is known already."""
    if x is None:
        x = _in_batches(model, z, lambda part, rows: part.inverse(rows), batch_size)
    return RoundTrip(z, x, _in_batches(model, x, lambda part, rows: part(rows), batch_size))


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Latents z ~ N(0, I) of that shape, dtype and device."""
    return torch.randn(like.shape, generator=generator, device="cpu", dtype=torch.float64).to(like)


def finite_rows(t: Tensor) -> Tensor:
    """Samples without NaN and Inf, (B,) bool."""
    return t.flatten(1).isfinite().all(1)


def first_non_finite(model: Invertible, t: Tensor, *, latent: bool = False) -> str | None:
    """Where on a round trip NaN or Inf first appears in a sample that was finite until then; None: nowhere.

    Args:
        model: the map, walked layer by layer.
        t: data; with ``latent``, latents, and the trip is z -> x -> z.
        latent: where the trip starts.
    """
    layers = list(enumerate(model.layers() or (model,)))
    there = [(f"the forward of {_place(layers, k)}", layer.forward) for k, layer in layers]
    back = [(f"the inverse of {_place(layers, k)}", layer.inverse) for k, layer in reversed(layers)]
    with torch.no_grad():
        for place, step in back + there if latent else there + back:
            before, t = t, step(t)
            if bool((finite_rows(before) & ~finite_rows(t)).any()):
                return place
    return None


def unconverged(model: Invertible, x: Tensor) -> dict[str, str]:
    """Layers whose inverse is an iteration that did not end, on the way back from F(x), and how far each one came.

    A block that iterates has ``convergence``, the record of its last inverse (`FixedPoint`).
    """
    layers = list(enumerate(model.layers() or (model,)))
    if not any(hasattr(layer.block, "convergence") for _, layer in layers):
        return {}
    found = {}
    with torch.no_grad():
        t = model(x)
        for k, layer in reversed(layers):
            t = layer.inverse(t)
            record = getattr(layer.block, "convergence", None)
            if record is not None and not bool(record.converged.all()):
                worst = record.residual.nan_to_num(math.inf).max().item()
                left = int((~record.converged).sum())
                found[_place(layers, k)] = (
                    f"{left} of {len(x)} samples, residual {worst:.1e} after {record.iterations} iterations"
                )
    return found


def _place(layers: list[tuple[int, Invertible]], k: int) -> str:
    name = layers[k][1].name
    return name if len(layers) == 1 else f"layer {k} ({name})"


def _in_batches(model: Invertible, t: Tensor, call: Callable[[Invertible, Tensor], Tensor], batch_size: int) -> Tensor:
    def measure(rows: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            return (call(model.select(rows), t[rows]),)

    return shares_of(model).map(torch.arange(len(t), device=t.device), measure, at_most=batch_size)[0]

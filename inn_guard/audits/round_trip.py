"""Round trips x -> z -> x and z -> x -> z, and the layer in which a number stopped being finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from inn_guard.audits.fault_tolerant import Guarded
from inn_guard.audits.thresholds import data_scale, feature_scale
from inn_guard.core.invertible import Invertible
from inn_guard.core.tensors import finite_rows, nonzero_or_one, norms, per_sample
from inn_guard.execution.parallel import SERIAL, WorkSharing
from inn_guard.report.formatting import brief

__all__ = [
    "GuardedRoundTrip",
    "RoundTrip",
    "draw_error",
    "first_non_finite",
    "guarded_from_data",
    "guarded_from_latents",
    "latent_round_trip",
    "round_trip",
    "unconverged",
]


@dataclass(frozen=True)
class RoundTrip:
    """start -> middle -> end, which ought to be start. Errors are (B,) float64 on the CPU.

    Attributes:
        start: where it began, (B, *).
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
        """Largest absolute error over the sample's root mean square (`data_scale`)."""
        return self.largest / data_scale(self.start).cpu()

    @property
    def by_feature(self) -> Tensor:
        """Largest error of an entry over the scale of its feature (`feature_scale`)."""
        scaled = self._difference.reshape(self.start.shape) / feature_scale(self.start)
        return scaled.flatten(1).abs().amax(1).cpu()

    @property
    def finite(self) -> Tensor:
        """Samples that stayed finite all the way."""
        return (finite_rows(self.middle) & finite_rows(self.end)).cpu()

    @property
    def _difference(self) -> Tensor:
        return (self.end.double() - self.start.double()).flatten(1)


def round_trip(
    model: Invertible, x: Tensor, *, batch_size: int, parallel: WorkSharing = SERIAL
) -> RoundTrip:
    """x -> z -> x, without a graph."""
    z = _in_batches(model, x, Invertible.__call__, batch_size, parallel)
    back = _in_batches(model, z, _inverse, batch_size, parallel)
    return RoundTrip(x, z, back)


def latent_round_trip(
    model: Invertible,
    z: Tensor,
    *,
    batch_size: int,
    x: Tensor | None = None,
    parallel: WorkSharing = SERIAL,
) -> RoundTrip:
    """z -> x -> z, without a graph; ``x`` is F^-1(z) where it is known already."""
    if x is None:
        x = _in_batches(model, z, _inverse, batch_size, parallel)
    return RoundTrip(z, x, _in_batches(model, x, Invertible.__call__, batch_size, parallel))


def _inverse(model: Invertible, z: Tensor) -> Tensor:
    return model.inverse(z)


def _in_batches(
    model: Invertible,
    t: Tensor,
    call: Callable[[Invertible, Tensor], Tensor],
    batch_size: int,
    parallel: WorkSharing,
) -> Tensor:
    def measure(rows: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            return (call(model.select(rows), t[rows]),)

    rows = torch.arange(len(t), device=t.device)
    return parallel.map(rows, measure, at_most=batch_size)[0]


def draw_error(z: Tensor, again: Tensor, deviation: Tensor) -> Tensor:
    """Root mean square of F(F^-1(z)) - z in units of the base's deviation.

    Args:
        z: latents, (B, *latent).
        again: F(F^-1(z)), (B, *latent).
        deviation: of the base, (*latent).

    Returns:
        (B,) float64, infinite where it is not finite.
    """
    scaled = (again.double() - z.double()) / nonzero_or_one(deviation)
    off = norms(scaled) / math.sqrt(z[0].numel())
    return off.nan_to_num(nan=math.inf, posinf=math.inf)


def first_non_finite(model: Invertible, t: Tensor, *, latent: bool = False) -> str | None:
    """Where on a round trip a finite sample first becomes NaN or Inf; None: nowhere.

    Args:
        model: the map, followed layer by layer.
        t: data; with ``latent``, latents, and the round trip is z -> x -> z.
        latent: where it starts.
    """
    with torch.no_grad():
        for place, step in _steps(model, latent=latent):
            before, t = t, step(t)
            if bool((finite_rows(before) & ~finite_rows(t)).any()):
                return place
    return None


def _steps(model: Invertible, *, latent: bool) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The layers of a round trip in the order in which they are called."""
    layers = list(enumerate(model.layers() or (model,)))
    there = [(f"the forward of {_place(layers, k)}", layer.forward) for k, layer in layers]
    back = [(f"the inverse of {_place(layers, k)}", layer.inverse) for k, layer in reversed(layers)]
    if latent:
        yield from back
        yield from there
    else:
        yield from there
        yield from back


def unconverged(model: Invertible, x: Tensor) -> dict[str, str]:
    """Layers whose inverse is an iteration that did not converge, and how far each one came.

    The inverse is run on the way back from F(x).

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
            if record is None or bool(record.converged.all()):
                continue
            residual = record.residual.nan_to_num(math.inf, posinf=math.inf).max().item()
            left = int((~record.converged).sum())
            found[_place(layers, k)] = (
                f"{left} of {len(x)} samples, residual {brief(residual)} after {record.iterations} "
                "iterations"
            )
    return found


def _place(layers: list[tuple[int, Invertible]], k: int) -> str:
    name = layers[k][1].name
    return name if len(layers) == 1 else f"layer {k} ({name})"


@dataclass(frozen=True)
class GuardedRoundTrip:
    """A round trip of a model that may raise or hang. All (B,) tensors are float64 on the CPU.

    Attributes:
        start: where it began.
        x: the data side; where it ended, if it began with data.
        end: what came back.
        error: largest entry of end - start over its unit; inf where not finite.
        bits: |log|det J| + log|det J^-1||, which ought to be 0, in bits per dimension; inf where
            not finite, None where the model has no log-determinants.
        log_det: the forward log-determinant in nats, None likewise.
    """

    start: Tensor
    x: Tensor
    end: Tensor
    error: Tensor
    bits: Tensor | None
    log_det: Tensor | None

    def split(self, sizes: Sequence[int]) -> list[GuardedRoundTrip]:
        """The round trips of parts of the batch, in their order."""
        columns = []
        for field in fields(self):
            whole: Tensor | None = getattr(self, field.name)
            columns.append([None] * len(sizes) if whole is None else whole.split(list(sizes)))
        return [GuardedRoundTrip(*part) for part in zip(*columns, strict=True)]


def guarded_from_data(
    guarded: Guarded,
    x: Tensor,
    *,
    log_det: bool,
    bijective: bool = True,
    unit: Tensor | None = None,
) -> GuardedRoundTrip:
    """x -> z -> x; for a map that is injective only, z -> x -> z from the latents of x.

    ``unit`` is what the errors of x are divided by, in a shape that broadcasts against it. Default:
    each sample's root mean square (`data_scale`).
    """
    if not bijective:
        return guarded_from_latents(guarded, guarded.forward(x), log_det=False)
    if not log_det:
        back = guarded.inverse(guarded.forward(x))
        return _measured(x, x, back, None, None, unit)
    z, forward = guarded.forward_and_log_det(x)
    back, backward = guarded.inverse_and_log_det(z)
    return _measured(x, x, back, forward, backward, unit)


def guarded_from_latents(
    guarded: Guarded, z: Tensor, *, log_det: bool, unit: Tensor | None = None
) -> GuardedRoundTrip:
    """z -> x -> z; ``unit`` is what the errors of z are divided by, as in `guarded_from_data`."""
    if not log_det:
        x = guarded.inverse(z)
        return _measured(z, x, guarded.forward(x), None, None, unit)
    x, backward = guarded.inverse_and_log_det(z)
    back, forward = guarded.forward_and_log_det(x)
    return _measured(z, x, back, forward, backward, unit)


def _measured(
    start: Tensor,
    x: Tensor,
    end: Tensor,
    forward: Tensor | None,
    backward: Tensor | None,
    unit: Tensor | None = None,
) -> GuardedRoundTrip:
    if unit is None:
        unit = per_sample(data_scale(start), start)
    off = ((end.double() - start.double()) / unit).flatten(1).abs().amax(1)
    whole = finite_rows(start) & finite_rows(end)
    error = torch.where(whole, off, torch.full_like(off, math.inf)).cpu()
    if forward is None or backward is None:
        return GuardedRoundTrip(start, x, end, error, None, None)
    gap = (forward.double() + backward.double()).abs() / (start[0].numel() * math.log(2))
    bits = gap.nan_to_num(math.inf, posinf=math.inf).cpu()
    return GuardedRoundTrip(start, x, end, error, bits, forward.double().cpu())

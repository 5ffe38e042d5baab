"""shadowing: how near to exact ones are draws and latents whose round trips are lost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.audited_model import AuditedModel, ModelError
from inn_guard.audits.context import AuditContext
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.level import Level
from inn_guard.audits.round_trip import RoundTrip, draw_error
from inn_guard.audits.sampling import (
    BLOCK,
    block_of_draws,
    context_rows,
    guarded_model,
)
from inn_guard.audits.spec import audit_check
from inn_guard.core.missing import NotApplicable
from inn_guard.core.tensors import finite_rows
from inn_guard.jacobian.shadowing import NEWTON_STEPS, shadowing_window
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict

__all__ = ["shadowing"]

MAX_DIMENSION = 64  #: a dense Jacobian of every layer takes D products
MAX_SAMPLES = 8
HELD = 10  #: D x D matrices that a sample holds for each layer
_MEASURED = ("window", "start", "end", "amplification", "residual")


def _cost(task: Task) -> Cost:
    samples = int(task.settings["samples"])
    looked_at = Passes(forward=1, inverse=1) * (task.samples + int(task.settings["draws"]))
    newton = Passes(linearize=1, product=task.dimension) * (NEWTON_STEPS + 1)
    each = Passes(forward=1) + newton
    vectors = HELD * task.layers * task.dimension
    return Cost(looked_at + each * samples, samples, linearized=True, vectors=vectors)


@audit_check(
    question="Are draws right although their round trips are lost?",
    level=Level.FULL,
    cost=_cost,
)
def shadowing(
    context: AuditContext, *, samples: int = MAX_SAMPLES, draws: int = BLOCK
) -> AuditResult:
    """Shadowing windows of lost draws, and of data whose round trips are lost.

    A draw is computed as an orbit h_N = z, ..., h_0 = x of the layers f_k, with a rounding error in
    each. An exact orbit h*_k = f_k(h*_{k-1}) is sought near it, in float64 (`shadowing_window`):

        window = max_k |h_k - h*_k| / |h_k| + 2 |G| / sigma_min(G')

    Then x is within the window of F^-1(z') for a z' within the window of z: it is a right draw,
    even where F(x) is far from z. Of data, z is within the window of F(x') for an x' within the
    window of x. The window is measured, not proved, and tells nothing about log p(x). It is
    relative to the length of a state: of features in different units, to that of the largest.

    The verdict holds the largest window against ``limits.draw``, and is undecided if Newton's
    method finds no orbit. It decides no use.

    Args:
        context: a bijective model of up to 64 dimensions below float64, and data.
        samples: how many orbits are followed, at most 8, half of them of data.
        draws: from the model's own base, among which lost ones are sought, at most 1,024.

    Returns:
        the largest windows of draws and of data, relative to the size of a state; a row for each
        orbit with the distances at both of its ends.

    Raises:
        NotApplicable: if there is nothing to explain, or no float64 copy to explain it with.
        ValueError: if a setting is out of its range.

    References:
        Z. Xu, T. Campbell: Embracing the chaos: analysis and diagnosis of numerical instability in
        variational flows. NeurIPS 2023.
    """
    for name, value, most in (("samples", samples, MAX_SAMPLES), ("draws", draws, BLOCK)):
        if not 1 <= value <= most:
            raise ValueError(f"expected {name} from 1 to {most}; got {value!r}")
    precise = _float64_copy(context)
    lost_data, lost_draws = _lost_data(context), _lost_draws(context, draws)
    if not lost_data.count and not lost_draws.count:
        raise NotApplicable(
            f"no round trip of x or of {draws:,} draws is lost: there is nothing to explain"
        )
    taken = max(samples // 2, samples - len(lost_draws.rows))
    chosen_data = lost_data.first(taken)
    chosen_draws = lost_draws.first(samples - len(chosen_data.rows))
    orbits = _windows(context, precise, chosen_data) + _windows(context, precise, chosen_draws)
    return _result(context, lost_data, lost_draws, orbits)


@dataclass(frozen=True)
class _Lost:
    """Round trips that are lost although their other end is finite.

    Attributes:
        kind: "data" or "draw".
        start: x of data, z of draws, (n, *).
        rows: of the batch, or numbers of the draws, (n,).
        error: of their round trips, (n,).
        non_finite: how many more are lost because their other end is not finite.
    """

    kind: str
    start: Tensor
    rows: Tensor
    error: Tensor
    non_finite: int

    @property
    def count(self) -> int:
        return len(self.rows) + self.non_finite

    def first(self, number: int) -> _Lost:
        return _Lost(
            self.kind,
            self.start[:number],
            self.rows[:number],
            self.error[:number],
            self.non_finite,
        )


def _float64_copy(context: AuditContext) -> AuditedModel:
    dimension = context.x[0].numel()
    if not context.model.bijective:
        raise NotApplicable("the map is injective only: its layers change the number of dimensions")
    if dimension > MAX_DIMENSION:
        raise NotApplicable(
            f"the dense Jacobian of every layer is formed for up to {MAX_DIMENSION} dimensions; "
            f"this model has {dimension}"
        )
    if context.x.dtype == torch.float64:
        raise NotApplicable("the model is in float64 itself: nothing finer can follow its orbits")
    if not len(context.finite_rows()):
        raise NotApplicable("no sample of x is finite")
    try:
        return context.in_float64()
    except ModelError as error:
        raise NotApplicable(f"there is no float64 copy: {error}") from error


def _lost_data(context: AuditContext) -> _Lost:
    guarded = guarded_model(context)
    rows = context.finite_rows()

    def round_trips(part: Tensor) -> tuple[Tensor, Tensor]:
        z = guarded.select(part).forward(context.x[part])
        return z, guarded.select(part).inverse(z)

    at_most = min(BLOCK, context.max_forward())
    z, again = context.parallel.map(rows, round_trips, at_most=at_most)
    x = context.x[rows]
    error = RoundTrip(x, z, again).by_feature.to(x.device)
    lost = ~(error <= context.limits.round_trip(x.dtype))
    finite = finite_rows(z)
    kept = lost & finite
    return _Lost("data", x[kept], rows[kept], error[kept], int((lost & ~finite).sum()))


def _lost_draws(context: AuditContext, draws: int) -> _Lost:
    guarded = guarded_model(context)
    z = block_of_draws(context, 0, shape=guarded.latent_shape)[:draws]
    rows = torch.arange(len(z), device=z.device)

    def round_trips(part: Tensor) -> tuple[Tensor, Tensor]:
        some = guarded.select(context_rows(context, part))
        x = some.inverse(z[part])
        return x, draw_error(z[part], some.forward(x), context.base.deviation.double())

    at_most = min(BLOCK, context.max_forward())
    x, error = context.parallel.map(rows, round_trips, at_most=at_most)
    finite = finite_rows(x)
    lost = ~(finite & (error <= context.limits.returned_draw(z.dtype)))
    kept = lost & finite
    return _Lost("draw", z[kept], rows[kept], error[kept], int((lost & ~finite).sum()))


def _windows(
    context: AuditContext, precise: AuditedModel, lost: _Lost
) -> tuple[dict[str, Any], ...]:
    """A row for each of the lost ones."""
    if not len(lost.rows):
        return ()
    try:
        return _together(context, precise, lost)
    except ModelError as error:
        if len(lost.rows) == 1:
            nothing = dict.fromkeys(_MEASURED, math.nan)
            return ({**_named(lost, 0), **nothing, "converged": False, "why": str(error)},)
    rows: list[dict[str, Any]] = []
    for k in range(len(lost.rows)):  # the model may raise for one of them and take the others
        part = slice(k, k + 1)
        alone = _Lost(lost.kind, lost.start[part], lost.rows[part], lost.error[part], 0)
        rows += _windows(context, precise, alone)
    return tuple(rows)


def _together(
    context: AuditContext, precise: AuditedModel, lost: _Lost
) -> tuple[dict[str, Any], ...]:
    select = context_rows(context, lost.rows)
    states = _orbit(context.model.select(select), lost.start, latent=lost.kind == "draw")
    copy = precise.select(select)
    found = shadowing_window(copy.layers() or (copy,), states, relative=True)
    ends = (found.moved[0], found.moved[-1])
    measured = (found.window, *ends, found.amplification, found.residual)
    rows = []
    for k in range(len(lost.rows)):
        row = _named(lost, k)
        for name, values in zip(_MEASURED, measured, strict=True):
            row[name] = values[k].item()
        rows.append({**row, "converged": bool(found.converged[k]), "why": ""})
    return tuple(rows)


def _named(lost: _Lost, k: int) -> dict[str, Any]:
    return {
        "kind": lost.kind,
        "row": int(lost.rows[k]),
        "round_trip_error": lost.error[k].item(),
    }


def _orbit(model: AuditedModel, t: Tensor, *, latent: bool) -> list[Tensor]:
    """The states h_0 = x, ..., h_N = z that lead from x to z, or from z to x."""
    layers: Sequence[Any] = model.layers() or (model,)
    states = [t]
    with torch.no_grad():
        if not latent:
            for layer in layers:
                states.append(layer(states[-1]))
            return states
        for layer in reversed(layers):
            states.append(layer.inverse(states[-1]))
    return states[::-1]


def _result(
    context: AuditContext, data: _Lost, draws: _Lost, orbits: tuple[dict[str, Any], ...]
) -> AuditResult:
    limit = context.limits.draw
    values: dict[str, float] = {}
    sentences: list[str] = []
    for lost, name, subject in ((draws, "draws", "lost draws"), (data, "data", "latents of x")):
        followed = [row for row in orbits if row["kind"] == lost.kind]
        windows = [row["window"] for row in followed if row["converged"]]
        values[f"lost_{name}"] = float(lost.count)
        values[f"non_finite_{name}"] = float(lost.non_finite)
        if windows:
            values[f"window_of_{name}"] = max(windows)
        sentences += _sentences(subject, windows, limit=limit, of=len(followed))
        if lost.non_finite:
            sentences.append(f"{lost.non_finite:,} {subject} are not finite and have no orbit")
    return AuditResult(
        "shadowing",
        _verdict(context, orbits),
        "; ".join(sentences),
        headline=("window_of_draws", "window_of_data"),
        values=values,
        units=dict.fromkeys(("window_of_draws", "window_of_data"), "of the states' size"),
        tables={"orbits": orbits},
        settings={
            "base": context.base.description,
            "limit": limit,
            "seed": context.seed,
        },
    )


def _sentences(
    subject: str, windows: Sequence[float], *, limit: float | int, of: int
) -> Iterator[str]:
    right = [window for window in windows if window <= limit]
    off = [window for window in windows if window > limit]
    if right:
        yield (
            f"{len(right)} of {of} {subject} are right to {max(right):.1g} of their size although "
            "their round trips are lost"
        )
    if off:
        yield (
            f"{len(off)} of {of} {subject} are off by up to {max(off):.1g} of their size from the "
            "nearest exact orbit"
        )
    if len(windows) < of:
        yield f"near {of - len(windows)} of {of} {subject} no exact orbit was found"


def _verdict(context: AuditContext, orbits: Sequence[Mapping[str, Any]]) -> Verdict:
    if not orbits:
        return Verdict.NON_FINITE
    limit = context.limits.draw
    found = []
    for row in orbits:
        if row["converged"]:
            found.append(context.limits.verdict(row["window"], limit))
        else:
            found.append(Verdict.UNDECIDED)
    return Verdict.worst(found)

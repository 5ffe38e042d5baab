"""How much the rounding of each layer adds to the error of each use, to first order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inn_guard.audits.priors import base_of
from inn_guard.audits.thresholds import feature_scale
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable
from inn_guard.core.tensors import finite_rows, nonzero_or_one, standard_normal
from inn_guard.report.limits import Limits

__all__ = ["needed_layers", "sensitive_first"]

Map = Callable[[Tensor], Tensor]

ROWS = 64  #: of the data
DRAWS = 256  #: of the base
PROBES = 4  #: random directions in which errors are measured
MARGIN = 5.0  #: by which the forecast must be below the limit


def sensitive_first(
    model: Invertible,
    x: Tensor,
    *,
    limits: Limits,
    uses: Sequence[str] | None,
    prior: object,
    seed: int,
) -> list[float]:
    """Error over limit that each layer adds, for a unit roundoff of 1; the worst of the uses.

    All of it is computed in a float64 copy. A use whose forecast fails counts nothing; where all
    fail, the layers are equal.

    Args:
        model: the map, with its layers or opaque.
        x: data, (B, *data).
        limits: what errors are held against.
        uses: that count; None: all.
        prior: where latents are drawn from; None: from the model's own base.
        seed: of the random errors and the draws.
    """
    rows = finite_rows(x).nonzero()[:ROWS, 0]
    count = max(1, len(model.layers()))
    shares = [0.0] * count
    forecasts: list[tuple[tuple[str, ...], Callable[[], list[float]]]] = [
        (("reconstruction", "gradients"), lambda: _round_trips(model, x, rows, limits, seed)),
        (("sampling",), lambda: _draws(model, x, limits, prior, seed)),
        (("density",), lambda: _density(model, x, rows, limits)),
    ]
    for wanted, forecast in forecasts:
        if uses is not None and not set(wanted) & set(uses):
            continue
        try:
            found = forecast()
        except (NotApplicable, RuntimeError, ValueError, TypeError, ArithmeticError):
            continue
        if len(found) == count:
            shares = [max(a, b) for a, b in zip(shares, found, strict=True)]
    return shares


def needed_layers(shares: Sequence[float], *, roundoff: float) -> int:
    """How many of the first layers must be raised so that the others' errors are forecast to pass.

    Args:
        shares: error over limit of each layer for a unit roundoff of 1, largest first.
        roundoff: unit roundoff of the layers that are not raised.

    >>> needed_layers([1e9, 1e3, 1e2], roundoff=6e-8)
    1
    """
    for count in range(len(shares)):
        if math.hypot(*shares[count:]) * roundoff * MARGIN <= 1:
            return count
    return len(shares)


def _round_trips(
    model: Invertible, x: Tensor, rows: Tensor, limits: Limits, seed: int
) -> list[float]:
    """x -> z -> x, by feature."""
    precise, start = model.select(rows).to_dtype(torch.float64), x[rows].double()
    layers = precise.layers() or (precise,)
    there = [layer.forward for layer in layers]
    back = [layer.inverse for layer in reversed(layers)]
    unit = feature_scale(x[rows])
    return _one_by_one(there, back, start, unit, limits.reconstruction, seed)


def _draws(model: Invertible, x: Tensor, limits: Limits, prior: object, seed: int) -> list[float]:
    """z -> x -> z, in units of the base's deviation."""
    base = base_of(model, x, prior=prior)
    z = base.draw(DRAWS, seed=seed).double()
    precise = model.select(torch.arange(DRAWS) % len(x)).to_dtype(torch.float64)
    layers = precise.layers() or (precise,)
    unit = nonzero_or_one(base.deviation.double())
    # a draw is lost by the root mean square over its entries, forecasts are Euclidean norms
    limit = limits.draw * math.sqrt(z[0].numel())
    there = [layer.inverse for layer in reversed(layers)]
    back = [layer.forward for layer in layers]
    return _one_by_one(there, back, z, unit, limit, seed)[::-1]


def _one_by_one(
    there: Sequence[Map],
    back: Sequence[Map],
    start: Tensor,
    unit: Tensor,
    limit: float,
    seed: int,
) -> list[float]:
    """The forecast error of a round trip by the roundings of each layer alone, over the limit.

    The sum of ``jacobian.rounding_error``, e = sum_i A_i delta_i, term by term, every entry in its
    unit, S. For w ~ N(0, S^-2) the mean of (w^T A_i delta_i)^2 is |S^-1 A_i delta_i|^2, and one
    backward pass gives w^T A_i for all i.
    """
    states = [start]
    with torch.no_grad():
        for forward in there:
            states.append(forward(states[-1]))
    generator = torch.Generator().manual_seed(seed)
    squares = [torch.zeros(len(start), dtype=torch.float64) for _ in there]
    for _ in range(PROBES):
        gradients = _adjoints(states, back, standard_normal(start, generator) / unit)
        for k, square in enumerate(squares):
            for i in (k, k + 1):
                moved = (gradients[i] * states[i]).flatten(1)
                if states[k].shape == states[k + 1].shape:
                    # what a layer copies is not rounded
                    moved = moved * (states[k] != states[k + 1]).flatten(1)
                square += moved.square().sum(1).cpu() / (3 * PROBES)
    found = []
    for square in squares:
        errors = square.sqrt()
        errors = errors[errors.isfinite()]
        found.append(errors.max().item() / limit if len(errors) else math.inf)
    return found


def _adjoints(states: Sequence[Tensor], back: Sequence[Map], probe: Tensor) -> list[Tensor]:
    """w^T A_i for the errors of every state h_i on the way back, first state first."""
    errors = [torch.zeros_like(state, requires_grad=True) for state in states]
    state = states[-1] + errors[-1]
    for inverse, error in zip(back, reversed(errors[:-1]), strict=True):
        state = inverse(state) + error
    return list(torch.autograd.grad((probe * state).sum(), errors))


def _density(model: Invertible, x: Tensor, rows: Tensor, limits: Limits) -> list[float]:
    """|d log p / d h_k| |h_k| of every layer's output, and |log det| of the layer itself."""
    precise = model.select(rows).to_dtype(torch.float64)
    layers = precise.layers() or (precise,)
    state, states, log_dets = x[rows].double(), [], []
    total = torch.zeros(len(rows), dtype=torch.float64, device=x.device)
    for layer in layers:
        state, log_det = layer.forward_and_log_det(state)
        if not state.requires_grad:
            state = state.requires_grad_()
        states.append(state)
        log_dets.append(log_det.detach())
        total = total + log_det
    base = precise.base()
    if base is None or base.log_density is None:
        density = -0.5 * state.flatten(1).square().sum(1)
    else:
        density = base.log_prob(state)
    gradients = torch.autograd.grad((density + total).sum(), states, allow_unused=True)
    found = []
    for state, gradient, log_det in zip(states, gradients, log_dets, strict=True):
        rounding = log_det.abs()
        if gradient is not None:
            rounding = rounding + (gradient * state).detach().flatten(1).norm(dim=1)
        finite = rounding[rounding.isfinite()]
        found.append(finite.max().item() / limits.density if len(finite) else math.inf)
    return found

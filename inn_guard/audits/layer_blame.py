"""layer_blame: which layer costs the inverse most digits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from inn_guard.audits.bits_lost import bits_lost
from inn_guard.audits.context import AuditContext
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.level import Level
from inn_guard.audits.spec import audit_check
from inn_guard.audits.thresholds import feature_scale, format_log10
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.core.random import Noise, SampleNoise
from inn_guard.core.tensors import log_norm, per_sample
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.inverse_gains import inverse_gains, layer_extremes
from inn_guard.report.limits import Limits
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict

__all__ = ["digits_lost", "layer_blame"]

LN10 = math.log(10)
#: Fewer digits than this are the rounding of the estimate itself.
LEAST_DIGITS = 0.01
LAYER_STEPS = 20  #: of the iteration for a layer's own condition number


def _cost(task: Task) -> Cost:
    sweeps = Passes(product=min(task.dimension, int(task.settings["probes"])))
    extremes = Passes(linearize=1, product=4 * task.steps(LAYER_STEPS))
    each = sweeps + extremes + Passes(forward=1, inverse=1)
    passes = Passes(forward=1) * task.samples + each * task.chosen
    return Cost(passes, task.chosen, linearized=True, vectors=2 * LAYER_STEPS + task.layers)


@audit_check(
    question="Which layer costs the inverse most digits?",
    level=Level.STANDARD,
    cost=_cost,
    shares_samples=True,
)
def layer_blame(context: AuditContext, *, samples: int = 32, probes: int = 8) -> AuditResult:
    """Digits that the inverse loses in each layer, and what each layer adds to the error of x.

    For layer k with input h_k: its condition number; the local error e_k = F_k^-1(F_k(h_k)) - h_k,
    measured; and what of it reaches x, every entry in units of its feature (`feature_scale`, S):

        contribution = sqrt( E |S^-1 J_1^-1 ... J_{k-1}^-1 (s * e_k)|^2 / D ),   s: random signs

    The gain is the same of an error as long as h_k, spread evenly over its entries, in place of
    e_k: the growth of a relative error of h_k. Errors of different layers add up as squares. A
    layer's digits are log10 of the error over the error that would be left if this layer only
    rounded and did not amplify what comes from behind it; its share is its part of all digits. A
    layer that squeezes some entries of a state amplifies: later layers may mix them with the
    others. One that brings entries of x from their units to a common one does not.

    A layer's ``bits_lost``, -log2|det J_k| / D, are those that it throws away at an absolute
    resolution, as the mean over the samples. Exact mode keeps as many. They are left out where a
    layer has no log-determinant.

    Args:
        context: a bijective model, and data.
        samples: how many of the samples with finite latents are measured, the first ones; the worst
            one's layers are reported.
        probes: sweeps that estimate the gains; exact if there are as many as dimensions.

    Returns:
        one row per layer; the worst layer by name.

    Raises:
        NotApplicable: if the map is injective only or a layer's inverse has no correct derivative.
    """
    if not context.model.bijective:
        raise NotApplicable(
            "the map is injective only: errors of its layers cannot be carried through an inverse"
        )
    rows = context.usable_rows()[:samples]
    if not len(rows):
        return AuditResult(
            "layer_blame", Verdict.NON_FINITE, "no sample has a finite latent: nothing to linearize"
        )
    measured = _measured(context, rows, probes)
    sample = int(measured.log_total.nan_to_num(math.inf, posinf=math.inf).argmax())
    layers = context.model.layers() or (context.model,)
    limit = context.limits.round_trip(context.x.dtype)
    table = measured.table([layer.name for layer in layers], sample)
    verdict, reason = _judged(context.limits, measured, table, limit)
    worst = _worst(table)
    return AuditResult(
        "layer_blame",
        verdict,
        reason,
        headline=("expected_error", "digits_lost"),
        values={
            "expected_error": measured.log_total[sample].exp().item(),
            "log10_expected_error": measured.log_total[sample].item() / LN10,
            "digits_lost": sum(row["digits_lost"] for row in table),
            "worst_share": worst["share"],
            **({"bits_lost": measured.bits_lost} if measured.knows_bits else {}),
        },
        units={
            "expected_error": "of the feature",
            "log10_expected_error": "log10, of the feature",
            "contribution": "of the feature",
            "local_error": "length, in units of the layer's input",
            "bits_lost": "bits per entry of x",
        },
        per_layer=table,
        settings={
            **_blamed(table),
            "samples": len(rows),
            "of": len(context.x),
            "worst_sample": int(rows[sample]),
            "probes": "exact" if measured.exact else probes,
            "seed": context.seed,
            "limit": limit,
        },
        advice=f"Look at {_place(worst)} first: bound its scale, or replace it."
        if verdict.failed
        else "",
    )


def digits_lost(
    contribution: Tensor, unavoidable: Tensor, amplification: Tensor, base: Tensor
) -> Tensor:
    """log10 of the total error over the error that a harmless layer would leave, (n, B).

    The total is sqrt(base^2 + sum_k contribution_k^2). A harmless layer k errs by rounding its
    input only, and does not amplify the errors of the layers behind it, which pass through it on
    their way to x.

    Args:
        contribution: ln of each layer's part of the error of x, (n, B).
        unavoidable: ln of the part that rounding the layer's input alone would make, (n, B).
        amplification: ln of the growth of a relative error on its way back through each layer, (n,
            B).
        base: ln of the error that rounding x itself makes, (B,).
    """
    total = _log_root_sum_squares(torch.cat([contribution, base[None]]))
    left = []
    for k in range(len(contribution)):
        own = torch.minimum(contribution[k], unavoidable[k])
        behind = contribution[k + 1 :] - amplification[k].clamp(min=0)
        left.append(
            _log_root_sum_squares(torch.cat([contribution[:k], own[None], behind, base[None]]))
        )
    return (total - torch.stack(left)) / LN10


def _log_root_sum_squares(logs: Tensor) -> Tensor:
    return torch.logsumexp(2 * logs, dim=0) / 2


@dataclass(frozen=True)
class _Measurement:
    tensors: ClassVar = (
        "log_condition",
        "log_gain",
        "log_local",
        "log_contribution",
        "digits",
        "bits",
        "log_base",
    )

    log_condition: Tensor  #: (n, B), as all below
    log_gain: Tensor
    log_local: Tensor
    log_contribution: Tensor
    digits: Tensor
    bits: Tensor
    log_base: Tensor  #: (B,)
    exact: bool

    def by_sample(self) -> tuple[Tensor, ...]:
        """The tensors, samples first."""
        return tuple(getattr(self, name).movedim(-1, 0) for name in _Measurement.tensors)

    @classmethod
    def of_samples(cls, parts: Sequence[Tensor], *, exact: bool) -> _Measurement:
        """From the tensors with the samples first."""
        named = zip(cls.tensors, parts, strict=True)
        return cls(**{name: part.movedim(0, -1).cpu() for name, part in named}, exact=exact)

    @property
    def log_total(self) -> Tensor:
        return _log_root_sum_squares(torch.cat([self.log_contribution, self.log_base[None]]))

    @property
    def knows_bits(self) -> bool:
        return not bool(self.bits.isnan().any())

    @property
    def bits_lost(self) -> float:
        """Of all layers, the mean over the samples."""
        return self.bits.sum(0).mean().item()

    def table(self, names: Sequence[str], sample: int) -> tuple[Mapping[str, Any], ...]:
        lost = self.digits[:, sample].nan_to_num(0.0, posinf=0.0)
        lost = torch.where(lost > LEAST_DIGITS, lost, 0.0)
        shares = lost / lost.sum().clamp(min=torch.finfo(lost.dtype).tiny)
        rows = []
        for k, name in enumerate(names):
            row = {
                "index": k,
                "name": name,
                "log10_condition_number": self.log_condition[k, sample].item() / LN10,
                "log10_gain": self.log_gain[k, sample].item() / LN10,
                "local_error": self.log_local[k, sample].exp().item(),
                "contribution": self.log_contribution[k, sample].exp().item(),
                "digits_lost": lost[k].item(),
                "share": shares[k].item(),
            }
            if self.knows_bits:
                row["bits_lost"] = self.bits[k].mean().item()
            rows.append(row)
        return tuple(rows)


def _measured(context: AuditContext, rows: Tensor, probes: int) -> _Measurement:
    """`_measure` for these rows, in parts where they are shared out or memory is short."""
    units = feature_scale(context.x[rows])
    alone = context.parallel.size == 1 and context.parallel.memory is None

    def measure(part: Tensor) -> tuple[Tensor, ...]:
        noise = SampleNoise(context.generator(), part, len(rows))
        if alone:
            linearization = context.linearization(rows)
        else:
            linearization = Linearization(*context.at(rows[part]))
        return _measure(linearization, probes, noise, units[part]).by_sample()

    layers = len(context.model.layers())
    at_most = context.max_linearized(2 * LAYER_STEPS + probes * (layers + 1))
    positions = torch.arange(len(rows), device=rows.device)
    parts = context.parallel.map(positions, measure, at_most=at_most)
    return _Measurement.of_samples(parts, exact=probes >= context.x[0].numel())


def _measure(linearization: Linearization, probes: int, noise: Noise, unit: Tensor) -> _Measurement:
    gains = inverse_gains(linearization, unit=unit, probes=probes, generator=noise)
    conditions, errors, contributions, bits = [], [], [], []
    dimension = linearization.states[0][0].numel()
    for k, layer in enumerate(linearization.layers):
        state, tangent = linearization.states[k], linearization.inverse_checked(k)
        forward, backward = layer_extremes(tangent, state, generator=noise, max_steps=LAYER_STEPS)
        conditions.append(forward + backward)
        with torch.no_grad():
            error = layer.inverse(tangent.output).double() - state.double()
        errors.append(log_norm(error))
        contributions.append(gains.log_size(k, error))
        bits.append(bits_lost(layer, state, dimension=dimension))
    eps = math.log(torch.finfo(linearization.output.dtype).eps)
    states = list(enumerate(linearization.states))
    log_gain = torch.stack([gains.log_size(k, _spread_evenly(state)) for k, state in states])
    by_entry = torch.stack([gains.log_size(k, state) for k, state in states])
    contribution = torch.stack(contributions)
    # rounding of x itself, in units of its features
    base = torch.full_like(log_gain[0], eps)
    # evenly spread errors shrink where a layer undoes units of the data: see its entries, too
    growth = torch.maximum(log_gain.diff(dim=0), by_entry.diff(dim=0))
    rounding = torch.cat([by_entry[:1], log_gain[1:-1]]) + eps
    digits = digits_lost(contribution, rounding, growth.nan_to_num(0.0), base)
    return _Measurement(
        torch.stack(conditions).cpu(),
        log_gain[:-1].cpu(),
        torch.stack(errors).cpu(),
        contribution.cpu(),
        digits.cpu(),
        torch.stack(bits).cpu(),
        base.cpu(),
        gains.exact,
    )


def _spread_evenly(state: Tensor) -> Tensor:
    """A vector of the same length whose entries are all alike."""
    each = log_norm(state.double()).exp() / math.sqrt(state[0].numel())
    return per_sample(each, state).expand_as(state)


def _judged(
    limits: Limits, measured: _Measurement, table: tuple[Mapping[str, Any], ...], limit: float
) -> tuple[Verdict, str]:
    worst = _worst(table)
    broken = [row for row in table if not math.isfinite(row["local_error"])]
    if broken:
        return (
            Verdict.NON_FINITE,
            f"the inverse of {_place(broken[0])} returns NaN or Inf at its own forward output",
        )
    log_expected = measured.log_total.max().item()
    expected = format_log10(log_expected / LN10)
    reason = f"errors of the layers are expected to move x by {expected} of each feature; "
    lost = sum(row["digits_lost"] for row in table)
    if lost:
        reason += f"{_place(worst)} loses {worst['digits_lost']:.1f} of {lost:.1f} digits"
    else:
        reason += "no layer loses more than rounding does"
    if not math.isfinite(log_expected):
        return (
            Verdict.NON_FINITE,
            f"the error that reaches x is not finite; {_place(worst)} loses most digits",
        )
    # an error beyond the range of floats is no NaN of the model
    if log_expected > math.log(limit):
        return Verdict.UNSTABLE, reason
    return limits.verdict(math.exp(log_expected), limit), reason


def _worst(table: tuple[Mapping[str, Any], ...]) -> Mapping[str, Any]:
    broken = [row for row in table if not math.isfinite(row["local_error"])]
    return broken[0] if broken else max(table, key=lambda row: row["digits_lost"])


def _blamed(table: tuple[Mapping[str, Any], ...]) -> dict[str, str]:
    """The worst layer in words; nothing where none loses digits."""
    worst = _worst(table)
    lost = sum(row["digits_lost"] for row in table)
    if not lost and math.isfinite(worst["local_error"]):
        return {}
    share = f"{100 * worst['share']:.0f} % of {lost:.1f} digits lost"
    return {"worst_layer": f"{_place(worst)}: {share}"}


def _place(row: Mapping[str, Any]) -> str:
    return f"layer {row['index']} ({row['name']})"

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
from inn_guard.audits.thresholds import data_scale, format_log10
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.core.random import Noise, SampleNoise
from inn_guard.core.tensors import log_norm
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.inverse_gains import inverse_gains, layer_extremes
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict

__all__ = ["digits_lost", "layer_blame"]

LN10 = math.log(10)
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

    For layer k with input h_k: its condition number; the gain ||J_1^-1 ... J_{k-1}^-1||_F / sqrt(D)
    with which an error made there reaches x; the local error |F_k^-1(F_k(h_k)) - h_k|, measured;
    and their product, its part of the error of x. Errors of different layers add up as squares. A
    layer's digits are log10 of the error over the error that would be left if this layer only
    rounded and did not amplify what comes from behind it; its share is its part of all digits. A
    change of unit, which amplifies absolute but not relative errors, costs none. |x| is that of the
    sample, or of its batch's median sample where that is larger (``data_scale``).

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
    verdict, reason = _judged(measured, table, limit)
    worst = _worst(table)
    return AuditResult(
        "layer_blame",
        verdict,
        reason,
        headline=("expected_error", "digits_lost"),
        values={
            "expected_error": measured.log_relative[sample].exp().item(),
            "log10_expected_error": measured.log_relative[sample].item() / LN10,
            "digits_lost": sum(row["digits_lost"] for row in table),
            "worst_share": worst["share"],
            **({"bits_lost": measured.bits_lost} if measured.knows_bits else {}),
        },
        units={
            "expected_error": "of |x|",
            "log10_expected_error": "of |x|",
            "contribution": "units of x",
            "bits_lost": "bits per entry of x",
        },
        per_layer=table,
        settings={
            "worst_layer": f"{_place(worst)}: {100 * worst['share']:.0f} % of "
            f"{sum(row['digits_lost'] for row in table):.1f} digits lost",
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
        "digits",
        "bits",
        "log_x",
        "log_base",
    )

    log_condition: Tensor  #: (n, B), as all below
    log_gain: Tensor
    log_local: Tensor
    digits: Tensor
    bits: Tensor
    log_x: Tensor  #: (B,)
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
    def log_contribution(self) -> Tensor:
        return self.log_local + self.log_gain

    @property
    def log_total(self) -> Tensor:
        return _log_root_sum_squares(torch.cat([self.log_contribution, self.log_base[None]]))

    @property
    def log_relative(self) -> Tensor:
        return self.log_total - self.log_x

    @property
    def knows_bits(self) -> bool:
        return not bool(self.bits.isnan().any())

    @property
    def bits_lost(self) -> float:
        """Of all layers, the mean over the samples."""
        return self.bits.sum(0).mean().item()

    def table(self, names: Sequence[str], sample: int) -> tuple[Mapping[str, Any], ...]:
        lost = self.digits[:, sample].nan_to_num(0.0, posinf=0.0).clamp(min=0)
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
    scales = data_scale(context.x[rows])
    alone = context.parallel.size == 1 and context.parallel.memory is None

    def measure(part: Tensor) -> tuple[Tensor, ...]:
        noise = SampleNoise(context.generator(), part, len(rows))
        if alone:
            linearization = context.linearization(rows)
        else:
            linearization = Linearization(*context.at(rows[part]))
        return _measure(linearization, probes, noise, scales[part]).by_sample()

    layers = len(context.model.layers())
    at_most = context.max_linearized(2 * LAYER_STEPS + probes * (layers + 1))
    positions = torch.arange(len(rows), device=rows.device)
    parts = context.parallel.map(positions, measure, at_most=at_most)
    return _Measurement.of_samples(parts, exact=probes >= context.x[0].numel())


def _measure(
    linearization: Linearization, probes: int, noise: Noise, scales: Tensor
) -> _Measurement:
    gains = inverse_gains(linearization, probes=probes, generator=noise)
    conditions, errors, bits = [], [], []
    dimension = linearization.states[0][0].numel()
    for k, layer in enumerate(linearization.layers):
        state, tangent = linearization.states[k], linearization.inverse_checked(k)
        forward, backward = layer_extremes(tangent, state, generator=noise, max_steps=LAYER_STEPS)
        conditions.append(forward + backward)
        with torch.no_grad():
            errors.append(log_norm(layer.inverse(tangent.output).double() - state.double()))
        bits.append(bits_lost(layer, state, dimension=dimension))
    eps = math.log(torch.finfo(linearization.output.dtype).eps)
    log_states = torch.stack([log_norm(state.double()) for state in linearization.states])
    # a sample of zeros, or nearly, is held to the size of its neighbours
    log_x = (scales * math.sqrt(dimension)).log()
    base = log_x + eps
    log_gain, log_local = gains.log_rms[:-1], torch.stack(errors)
    amplification = (gains.log_rms + log_states).diff(dim=0).nan_to_num(0.0)
    digits = digits_lost(
        log_local + log_gain, log_states[:-1] + eps + log_gain, amplification, base
    )
    log_condition = torch.stack(conditions)
    return _Measurement(
        log_condition.cpu(),
        log_gain.cpu(),
        log_local.cpu(),
        digits.cpu(),
        torch.stack(bits).cpu(),
        log_x.cpu(),
        base.cpu(),
        gains.exact,
    )


def _judged(
    measured: _Measurement, table: tuple[Mapping[str, Any], ...], limit: float
) -> tuple[Verdict, str]:
    worst = _worst(table)
    broken = [row for row in table if not math.isfinite(row["local_error"])]
    if broken:
        return (
            Verdict.NON_FINITE,
            f"the inverse of {_place(broken[0])} returns NaN or Inf at its own forward output",
        )
    expected = measured.log_relative.max().item() / LN10
    reason = (
        f"errors of the layers are expected to move x by {format_log10(expected)} of its length; "
    )
    lost = sum(row["digits_lost"] for row in table)
    reason += f"{_place(worst)} loses {worst['digits_lost']:.1f} of {lost:.1f} digits"
    if not math.isfinite(expected):
        return (
            Verdict.NON_FINITE,
            f"the error that reaches x is not finite; {_place(worst)} loses most digits",
        )
    return (Verdict.UNSTABLE if expected > math.log10(limit) else Verdict.STABLE), reason


def _worst(table: tuple[Mapping[str, Any], ...]) -> Mapping[str, Any]:
    broken = [row for row in table if not math.isfinite(row["local_error"])]
    return broken[0] if broken else max(table, key=lambda row: row["digits_lost"])


def _place(row: Mapping[str, Any]) -> str:
    return f"layer {row['index']} ({row['name']})"

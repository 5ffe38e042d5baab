"""Checks whose default effort is for one model, not for a hundred: the same code on less."""

from __future__ import annotations

from inn_guard.audits import AuditSpec
from inn_guard.audits.dequantization_attack import Ascent
from inn_guard.audits.dequantization_attack.audit import dequantization_attack
from inn_guard.audits.lipschitz_bounds import lipschitz_bounds
from inn_guard.audits.out_of_distribution.audit import out_of_distribution
from inn_guard.audits.rare_event_sampling import rare_event_sampling
from inn_guard.audits.sampling import sampling
from inn_guard.audits.shadowing import shadowing

SHORTENED: dict[str, AuditSpec] = {
    check.name: check
    for check in (
        dequantization_attack.with_settings(strategy=Ascent(budget=20), samples=2),
        lipschitz_bounds.with_settings(seconds=1.0),
        out_of_distribution.with_settings(samples=2),
        rare_event_sampling.with_settings(particles=20, moves=1, levels=2, repeats=1),
        sampling.with_settings(draws=64),
        shadowing.with_settings(samples=2, draws=16),
    )
}

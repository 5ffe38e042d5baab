"""Audits whose default effort is for one model: the same code on less, for tests over cases."""

from __future__ import annotations

import functools

from inn_guard.audits import Audit
from inn_guard.audits.dequantization_attack import Ascent
from inn_guard.audits.dequantization_attack.audit import dequantization_attack
from inn_guard.audits.lipschitz_bounds import lipschitz_bounds
from inn_guard.audits.out_of_distribution.audit import out_of_distribution

SHORTENED: dict[str, Audit] = {
    "dequantization_attack": functools.partial(
        dequantization_attack, strategy=Ascent(budget=20), samples=2
    ),
    "lipschitz_bounds": functools.partial(lipschitz_bounds, seconds=1.0),
    "out_of_distribution": functools.partial(out_of_distribution, samples=2, spectrum_samples=1),
}

"""Every check, in the order in which they run, and which level runs which."""

from __future__ import annotations

from inn_guard.audits.density import density
from inn_guard.audits.dequantization_attack.audit import dequantization_attack
from inn_guard.audits.full_spectrum import full_spectrum
from inn_guard.audits.gradient_angle import gradient_angle
from inn_guard.audits.jacobian_spectrum import jacobian_spectrum
from inn_guard.audits.layer_blame import layer_blame
from inn_guard.audits.level import Level
from inn_guard.audits.lipschitz_bounds import lipschitz_bounds
from inn_guard.audits.log_det import log_det
from inn_guard.audits.out_of_distribution.audit import out_of_distribution
from inn_guard.audits.precision.audit import precision
from inn_guard.audits.preflight import preflight
from inn_guard.audits.rare_event_sampling import rare_event_sampling
from inn_guard.audits.reconstruction import reconstruction
from inn_guard.audits.sampling import sampling
from inn_guard.audits.shadowing import shadowing
from inn_guard.audits.spec import AuditSpec

__all__ = ["AUDITS", "checks_of_level"]

#: Every check by its name, in the order in which they run.
AUDITS: dict[str, AuditSpec] = {
    check.name: check
    for check in (
        preflight,
        density,
        log_det,
        sampling,
        reconstruction,
        gradient_angle,
        out_of_distribution,
        jacobian_spectrum,
        layer_blame,
        precision,
        full_spectrum,
        rare_event_sampling,
        shadowing,
        dequantization_attack,
        lipschitz_bounds,
    )
}


def checks_of_level(level: Level | str) -> list[AuditSpec]:
    """The checks that a level runs, in their order.

    Raises:
        ValueError: if there is no such level.
    """
    try:
        chosen = Level(level)
    except ValueError:
        known = ", ".join(known.value for known in Level)
        raise ValueError(f"expected a level out of {known}; got {level!r}") from None
    checks = AUDITS.values()
    return [check for check in checks if check.level is not None and chosen.includes(check.level)]

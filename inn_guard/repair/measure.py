"""What a repair measures before, while and after it works: the checks that decide uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from inn_guard.audits.level import Level
from inn_guard.audits.registry import AUDITS
from inn_guard.audits.run import audit
from inn_guard.audits.spec import AuditSpec
from inn_guard.core.invertible import Invertible
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.limits import Limits
from inn_guard.report.uses import UseVerdict
from inn_guard.report.verdict import Verdict

__all__ = ["Examination", "badness", "excess", "open_uses"]


@dataclass(frozen=True)
class Examination:
    """The same audit, of one model after the other.

    Up to 16,384 draws are made for sampling, as at level full, so that a rate below the limit can
    be proved.

    Attributes:
        uses: that count; None: those that the model declares.
        limits: up to which figure a model is fit for a use.
        prior: where latents are drawn from; None: from the model's own base.
        name: what reports call the model.
    """

    uses: tuple[str, ...] | None
    limits: Limits | None
    prior: Any
    name: str

    def report(self, model: Invertible, x: Tensor, *, seed: int) -> AuditReport:
        """Every use that can be measured quickly, and the counted ones, at the data x."""
        chosen = [check for check in AUDITS.values() if check.uses and self._is_due(check)]
        return self._audit(model, x, chosen, seed)

    def look(self, model: Invertible, x: Tensor, *, seed: int) -> AuditReport:
        """The counted uses only."""
        return self._audit(model, x, [*filter(self._decides, AUDITS.values())], seed)

    def _is_due(self, check: AuditSpec) -> bool:
        return check.level is Level.QUICK or self._decides(check)

    def _decides(self, check: AuditSpec) -> bool:
        if self.uses is None:
            return bool(check.uses) and check.level is Level.QUICK
        return bool(set(check.uses) & set(self.uses))

    def _audit(
        self, model: Invertible, x: Tensor, checks: list[AuditSpec], seed: int
    ) -> AuditReport:
        return audit(
            model,
            x,
            uses=self.uses,
            checks=checks,
            level=Level.FULL,
            limits=self.limits,
            prior=self.prior,
            name=self.name,
            seed=seed,
            progress=False,
        )


def open_uses(report: AuditReport) -> tuple[UseVerdict, ...]:
    """The counted uses that are measured and not passed, undecided ones included."""
    found = []
    for use in report.uses.values():
        silent = use.verdict.passed or use.verdict is Verdict.NOT_APPLICABLE
        if use.counted and not silent:
            found.append(use)
    return tuple(found)


def badness(report: AuditReport) -> tuple[int, float]:
    """How far a report is from passing: how many uses are open, and the worst figure / limit."""
    left = open_uses(report)
    return len(left), max(map(excess, left), default=0.0)


def excess(use: UseVerdict) -> float:
    """Figure over limit; inf where there is no finite figure."""
    ratio = use.figure / use.limit if use.limit > 0 else math.inf
    return ratio if math.isfinite(ratio) else math.inf

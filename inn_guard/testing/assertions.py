"""assert_stable: an audit as one line of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from inn_guard.audits.level import Level
from inn_guard.audits.run import Check, audit
from inn_guard.core.context import Context
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.limits import Limits

__all__ = ["Unfit", "assert_stable"]


class Unfit(AssertionError):
    """The model is not fit for its uses; the message is the report.

    Attributes:
        report: the report of the audit.
    """

    def __init__(self, report: AuditReport) -> None:
        super().__init__(f"the verdict is {report.verdict.label}\n\n{report}")
        self.report = report


def assert_stable(  # noqa: PLR0913
    model: Any,
    x: Any,
    *,
    uses: str | Iterable[str] | None = None,
    level: Level | str = Level.QUICK,
    checks: Iterable[str | Check] | None = None,
    context: Context = None,
    prior: Any = None,
    limits: Limits | None = None,
    loss: Callable[..., Tensor] | None = None,
    name: str | None = None,
    seed: int = 0,
    memory: float | int | None = None,
) -> AuditReport:
    """Audit the model, and fail with the report as the message if it is not fit for its uses.

    An undecided verdict fails, too: nothing was shown. The audit is quick, and deterministic in
    ``seed``.

    >>> import torch, inn_guard as ig
    >>> double = ig.wrap(encode=lambda x: 2 * x, decode=lambda z: z / 2)
    >>> ig.assert_stable(double, torch.randn(8, 3), uses="reconstruction").verdict.label
    'stable'

    Args:
        model: anything that `wrap` accepts.
        x: data, as for `audit`.
        uses: which uses the verdict counts. Default: those that the model declares.
        level: which checks run.
        checks: checks in place of those of the level.
        context: what the model is conditioned on.
        prior: where latents are drawn from.
        limits: up to which figure the model is fit for a use.
        loss: z -> scalar or (z, log_det) -> scalar, whose gradient is compared.
        name: what the report calls the model.
        seed: of everything random.
        memory: bytes that a check may hold at once.

    Returns:
        the report, if its verdict is stable or marginal.

    Raises:
        Unfit: an AssertionError, if the verdict is unstable, non_finite or undecided.
        TypeError, ValueError: as `audit` does.
    """
    __tracebackhide__ = True  # pytest then shows the line of the test, not this function
    report = audit(
        model,
        x,
        uses=uses,
        level=level,
        checks=checks,
        context=context,
        prior=prior,
        limits=limits,
        loss=loss,
        name=name,
        seed=seed,
        memory=memory,
        progress=False,
    )
    if not report.verdict.passed:
        raise Unfit(report)
    return report

"""AuditSpec: one check with all that is declared about it, and the decorator that makes one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from inn_guard.audits.audited_model import AuditedModel, ModelError
from inn_guard.audits.batch import checked_batch, checked_domain
from inn_guard.audits.context import AuditContext, audited_model
from inn_guard.audits.cost_model import Cost, Task
from inn_guard.audits.level import Level
from inn_guard.audits.priors import base_of
from inn_guard.core.composition import Composition
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable
from inn_guard.execution.parallel import SERIAL
from inn_guard.execution.state import StateSnapshot, without_autocast
from inn_guard.report.limits import Limits
from inn_guard.report.result import AuditResult
from inn_guard.report.uses import Finding
from inn_guard.report.verdict import Verdict

__all__ = ["AuditSpec", "audit_check"]

Function = Callable[..., AuditResult]

#: What a call of a check may set apart from the check's own settings.
_CONTEXT_SETTINGS = ("limits", "prior", "domain", "loss", "seed", "parallel", "level", "starts")


@dataclass(frozen=True, eq=False)
class AuditSpec:
    """A check: a function of an `AuditContext`, and what levels, dry runs and docs know of it.

    A check can be called on its own: ``reconstruction(model, x, seed=1)``.

    Attributes:
        name: under which reports show it.
        question: what it asks, in one sentence.
        function: (context, **settings) -> AuditResult.
        uses: the uses that its findings decide; () for one that explains.
        level: the first level that runs it; None: only by name.
        cost: from what is audited, the passes that it takes; None: unknown.
        shares_samples: from the settings, whether processes share its samples; else one process
            runs it whole.
        settings: given to the function.
    """

    name: str
    question: str
    function: Function
    uses: tuple[str, ...] = ()
    level: Level | None = None
    cost: Callable[[Task], Cost] | None = None
    shares_samples: Callable[[Mapping[str, Any]], bool] = lambda settings: False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # help() and inspect show the function
        for name in ("__doc__", "__name__", "__module__", "__qualname__"):
            object.__setattr__(self, name, getattr(self.function, name, None))
        object.__setattr__(self, "__wrapped__", self.function)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{self.name}({settings})"

    @without_autocast()
    def __call__(self, model: Invertible, x: Any, **settings: Any) -> AuditResult:
        """Run this check alone.

        Args:
            model: the map.
            x: data, (B, *data).
            settings: the check's own, and limits, prior, domain, loss, seed, parallel and level, as
                ``audit`` has them. Of one name, the check's own: the domain of lipschitz_bounds is
                a box. ``starts`` is a dictionary in which a check leaves what it begins from the
                next time, and how layers and model differ.

        Raises:
            TypeError: if a setting is unknown, or x is no real floating-point tensor.
            ValueError: if x has no samples, or another dtype or device than the model.
        """
        own = inspect.signature(self.function).parameters
        shared = [name for name in _CONTEXT_SETTINGS if name in settings and name not in own]
        given = {name: settings.pop(name) for name in shared}
        if settings:
            return self.with_settings(**settings)(model, x, **given)
        x = checked_batch(model, x).detach().clone()
        starts = given.get("starts", {})
        audited = audited_model(model, x, known=_composition_in(starts))
        context = AuditContext(
            audited,
            x,
            base_of(audited, x, prior=given.pop("prior", None)),
            limits=given.get("limits") or Limits(),
            domain=checked_domain(given.get("domain"), x),
            loss=given.get("loss"),
            seed=given.get("seed", 0),
            parallel=given.get("parallel", SERIAL),
            level=Level(given.get("level", Level.STANDARD)),
            starts=starts,
        )
        result = self.run(context)
        if result.values:
            # where nothing could be measured, layers and model could not be compared, either
            starts["composition"] = dataclasses.astuple(audited.composition)
        return result

    def run(self, context: AuditContext) -> AuditResult:
        """Run this check within an audit; the model comes out as it went in, also after an error.

        Autocast, inference mode and no_grad of the caller are set aside: the model itself is
        measured. A question that the model cannot answer is not applicable. An exception of the
        model is a finding that names it. An exception of the check itself is raised.
        """
        model = context.model
        plain = torch.autocast(context.x.device.type, enabled=False)
        with contextlib.ExitStack() as stack:
            for surroundings in (torch.inference_mode(mode=False), torch.enable_grad(), plain):
                stack.enter_context(surroundings)
            state = model.state or StateSnapshot(model)
            recover = stack.enter_context(state.preserved())
            stack.enter_context(_recovering(model, recover))
            stack.callback(context.take_back_copies)
            model.eval()
            try:
                return self.function(context, **self.settings)
            except NotApplicable as reason:
                return self.without_answer(Verdict.NOT_APPLICABLE, str(reason))
            except ModelError as error:
                advice = (
                    "Call the model on this batch outside of the audit to see the whole traceback."
                )
                return self.without_answer(Verdict.UNSTABLE, str(error), advice=advice)

    def without_answer(self, verdict: Verdict, reason: str, *, advice: str = "") -> AuditResult:
        """A result without figures, which is a finding about every use that this check decides."""
        finding = Finding(verdict, math.nan, math.nan, "", reason, samples=0, of=0)
        uses = dict.fromkeys(self.uses, finding)
        return AuditResult(self.name, verdict, reason, uses=uses, advice=advice)

    def with_settings(self, **settings: Any) -> AuditSpec:
        """The same check with further settings.

        Raises:
            TypeError: if the check has no setting of that name.
        """
        parameters = inspect.signature(self.function).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        unknown = [name for name in settings if name not in parameters and not open_ended]
        if unknown:
            known = ", ".join(list(parameters)[1:])
            raise TypeError(
                f"{self.name} has no setting {unknown[0]!r}; its settings are {known or 'none'}"
            )
        return dataclasses.replace(self, settings={**self.settings, **settings})

    def all_settings(self) -> dict[str, Any]:
        """The settings, with the defaults of those that are not given."""
        parameters = inspect.signature(self.function).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return {**defaults, **self.settings}

    @property
    def is_shared(self) -> bool:
        """Whether all processes run this check together."""
        return self.shares_samples(self.settings)

    @classmethod
    def of(cls, check: Any) -> AuditSpec:
        """A check from a spec, a partial of one, or a plain function (model, x) -> AuditResult.

        Raises:
            TypeError: if it is none of these.
        """
        if isinstance(check, AuditSpec):
            return check
        if isinstance(check, functools.partial):
            inner = cls.of(check.func)
            if check.args:
                raise TypeError("expected a check whose settings are given by keyword")
            return inner.with_settings(**check.keywords)
        if not callable(check) or isinstance(check, type):
            raise TypeError(f"expected checks by name or as functions; got {check!r}")
        name = getattr(check, "__name__", type(check).__name__)

        def function(context: AuditContext, **settings: Any) -> AuditResult:
            result = check(context.model, context.x.clone(), **settings)
            if not isinstance(result, AuditResult):
                raise TypeError(
                    f"expected the check {name} to return an AuditResult, got "
                    f"{type(result).__name__}: return inn_guard.AuditResult(name, verdict, reason)"
                )
            return result

        question = inspect.getdoc(check) or name
        return cls(name, question.splitlines()[0], function)


def _composition_in(starts: Mapping[str, Any]) -> Composition | None:
    """How layers and model were found to differ at the last look; None at the first one."""
    if "composition" not in starts:
        return None
    return Composition(*starts["composition"])


@contextlib.contextmanager
def _recovering(model: AuditedModel, recover: Callable[[], None]) -> Iterator[None]:
    """Within the block, a call that raises leaves the model as it was before the check."""

    def action() -> None:
        recover()
        model.eval()

    before, model.recovery.action = model.recovery.action, action
    try:
        yield
    finally:
        model.recovery.action = before


def audit_check(
    *,
    question: str,
    uses: tuple[str, ...] = (),
    level: Level | None = None,
    cost: Callable[[Task], Cost] | None = None,
    shares_samples: bool | Callable[[Mapping[str, Any]], bool] = False,
) -> Callable[[Function], AuditSpec]:
    """Make a check of a function (context, **settings) -> AuditResult.

    AUDITS lists the checks that are run by name.

    Args:
        question: what the check asks, in one sentence.
        uses: the uses that its findings decide.
        level: the first level that runs it; None: only by name.
        cost: (task) -> passes that it takes; None: a dry run says that it does not know.
        shares_samples: whether processes share its samples, always or by its settings.
    """
    if callable(shares_samples):
        shares = shares_samples
    else:
        always = shares_samples

        def shares(settings: Mapping[str, Any]) -> bool:
            return always

    def made(function: Function) -> AuditSpec:
        name = function.__name__
        return AuditSpec(name, question, function, uses, level, cost, shares)

    return made

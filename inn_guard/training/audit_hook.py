"""AuditHook: any audit on a schedule inside a training loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.audits.quick_check import quick_round_trip
from inn_guard.audits.run import Check, resolve_check
from inn_guard.core.invertible import Context, Invertible
from inn_guard.core.mismatch import check_rows
from inn_guard.core.tensors import dtype_name
from inn_guard.memory_saving import MemorySaving
from inn_guard.report.audit_report import AuditReport
from inn_guard.training.actions import Action
from inn_guard.training.records import Record
from inn_guard.training.regularizers.checks import is_number
from inn_guard.training.schedule import Schedule, checked_step, schedule

__all__ = ["AuditHook"]


class AuditHook:
    """Audits the model during training every few steps, on a few samples.

        hook = AuditHook(
            model, every=100, record=CsvRecorder("stability.csv"), actions=[EmitWarning()]
        )
        ...
        optimizer.step()
        hook(x)

    ``AuditHook(model, x)`` audits the same batch every time, so that its figures show how the model
    changes; then ``hook()`` is enough.

    Training is not affected. The model is audited in eval mode, with autocast off and gradients on
    whatever surrounds the call, and afterwards weights, gradients, statistics, modes and random
    numbers are bit for bit as before. Of a memory-saving model the map itself is audited. A report
    is recorded first; then the actions are called in their order. Without actions nothing is
    changed, whatever an audit finds.

    The default check runs one forward and one inverse pass over eight samples. Ask for more with
    ``checks=["jacobian_spectrum", functools.partial(gradient_angle, loss=loss)]``. Whether the
    layers are the same map as the model is measured at the first audit only.

    Singular values begin at the vectors of the last look. ``jacobian_spectrum`` takes two steps
    where the weights have changed little; see `largest_singular_value` for what such a look may
    overlook. ``tracked_spectrum`` takes one step and gives lower bounds.

    How much of the training's time an audit takes depends on the net. ``share=0.01`` keeps all
    audits together within one per cent of it: an audit that is due is left out until there is time
    for it. The first one is always made. Which steps are audited then depends on the clock, so that
    runs are not repeated bit for bit in what is recorded, and processes of one training may audit
    different steps.

    With gradient accumulation, where one optimizer step takes several calls, pass the number of
    the optimizer step: ``hook(x, step=step)``. The first call of a due step is audited.

    Args:
        model: an Invertible, or a model that ``wrap`` accepts.
        x: what is audited every time, (B, *data). Default: the batch of the call.
        checks: names in AUDITS, or checks themselves.
        every: period in steps (due at 0, k, 2k, ...), or any function step -> bool.
        samples: how many samples of the batch are audited, the first ones; None: all.
        record: called with the ``Record`` of every audit: a CsvRecorder, a TensorBoardRecorder,
            the ``append`` of a list.
        actions: called with it afterwards; see ``inn_guard.training.actions``.
        share: of the time since the first call, how much the audits may take, in (0, 1]. Default:
            every audit that is due is made.

    Attributes:
        next_step: number of the next call's step.
        left_out: how many audits were due and not made, for want of time.

    Raises:
        TypeError: if ``checks`` is a string, or x is no tensor (B, *data).
        ValueError: if ``samples`` is below 1, or ``share`` is no share.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        x: Shaped[Tensor, "batch *data"] | None = None,
        *,
        checks: Sequence[str | Check] = (quick_round_trip,),
        every: int | Schedule = 100,
        samples: int | None = 8,
        record: Callable[[Record], object] | None = None,
        actions: Sequence[Action] = (),
        share: float | None = None,
    ) -> None:
        if isinstance(checks, str):
            raise TypeError(f'expected a list of checks, got a string: pass checks=["{checks}"]')
        if not isinstance(checks, (list, tuple)):
            raise TypeError(f"expected a list of checks, got {checks!r:.60}: pass checks=[...]")
        whole = isinstance(samples, int) and not isinstance(samples, bool)
        if samples is not None and not (whole and samples >= 1):
            raise ValueError(
                f"expected at least 1 sample, or None for the whole batch; got {samples!r:.60}"
            )
        if record is not None and not callable(record):
            raise TypeError(f"expected record as a function of a Record; got {record!r:.60}")
        if not isinstance(actions, (list, tuple)) or not all(map(callable, actions)):
            raise TypeError(
                f"expected actions as a list of functions, got {actions!r:.60}: pass "
                "actions=[inn_guard.actions.RaiseError()]"
            )
        if share is not None and not (is_number(share) and 0 < share <= 1):
            raise ValueError(
                "expected share as a number above 0, at most 1, or None for every audit that is "
                f"due; got {share!r:.60}"
            )
        wrapped = wrap(model, x=x)
        if isinstance(wrapped, MemorySaving):
            wrapped = wrapped.inner
        self.model: Invertible = wrapped
        self.x = None if x is None else _checked(x).detach().clone()
        self.checks = tuple(resolve_check(check) for check in checks)
        self.due: Schedule = schedule(every)
        self.samples = samples
        self.record = record
        self.actions = tuple(actions)
        self.share = share
        self.next_step = 0
        self.left_out = 0
        self._every = every
        self._clock = _Clock()
        self._audited: int | None = None
        self._starts: dict[str, Any] = {}

    def __repr__(self) -> str:
        checks = ", ".join(check.name for check in self.checks)
        actions = ", ".join(_name(action) for action in self.actions)
        return (
            f"AuditHook({self.model.name}, checks=[{checks}], every={self._every}, "
            f"samples={self.samples}, actions=[{actions}], next_step={self.next_step})"
        )

    def __call__(
        self,
        x: Shaped[Tensor, "batch *data"] | None = None,
        context: Context = None,
        *,
        step: int | None = None,
    ) -> AuditReport | None:
        """Audit, record and act if this step is due; the report, or None if it is not due.

        Args:
            x: data, (B, *data); not used by a hook that has a batch of its own.
            context: condition for the audited batch, in place of the model's own.
            step: the optimizer's step. Default: the hook's own count of calls.

        Raises:
            TypeError: if x is no floating-point tensor, or neither the hook nor the call has one.
            ValueError: if x is empty or has another dtype or device than the model, or the context
                has not one row for each sample.
        """
        step = checked_step(self.next_step if step is None else step)
        x = _checked(x if self.x is None else self.x)
        self.next_step = step + 1
        self._clock.start()
        if step == self._audited or not self.due(step):
            return None
        if self.share is not None and not self._clock.allows(self.share):
            self.left_out += 1
            return None
        with self._clock.measured():
            report = self.report(x, context)
        self._audited = step
        # before the actions run: a record tells what was in force when the audit was made
        values: dict[str, float] = {}
        for action in self.actions:
            values.update(getattr(action, "values", {}))
        record = Record(step, report, values)
        if self.record is not None:
            self.record(record)
        for action in self.actions:
            action(record)
        return report

    def report(self, x: Shaped[Tensor, "batch *data"], context: Context = None) -> AuditReport:
        """Run the checks on the first samples of x, whether due or not, without a record."""
        model = self.model
        if context is not None:
            check_rows(context, x)
            model = model.with_context(context)
        if self.samples is not None and self.samples < len(x):
            rows = torch.arange(self.samples, device=x.device)
            model = model.select(rows)
            x = x[rows]
        start = time.perf_counter()
        results = tuple(check(model, x, starts=self._starts) for check in self.checks)
        settings = {
            "shape": tuple(x.shape),
            "dtype": dtype_name(x.dtype),
            "device": str(x.device),
            "samples": len(x),
            "seconds": round(time.perf_counter() - start, 4),
        }
        return AuditReport(results, model.name, settings)

    def state_dict(self) -> dict[str, Any]:
        """The step counter and the actions' states, to resume a run."""
        return {
            "step": self.next_step,
            "audited": self._audited,
            "starts": dict(self._starts),
            "actions": [_state(action) for action in self.actions],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the step counter and the actions' states of ``state``.

        Raises:
            ValueError: if ``state`` belongs to a hook with other actions.
        """
        mine = [_state(action) for action in self.actions]
        theirs = state["actions"]
        if [_keys(one) for one in mine] != [_keys(one) for one in theirs]:
            names = ", ".join(_name(action) for action in self.actions) or "none"
            raise ValueError(
                f"expected the state of {len(mine)} actions, {names}; got that of {len(theirs)} "
                "others: build the hook with the same actions in the same order"
            )
        self.next_step = int(state["step"])
        self._audited = state["audited"]
        self._starts = dict(state.get("starts", {}))
        for action, saved in zip(self.actions, theirs, strict=True):
            if saved is not None:
                action.load_state_dict(saved)  # type: ignore[attr-defined]


class _Clock:
    """Seconds since the first call of a hook, and those that its audits took."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._audits = self._last = 0.0

    def start(self) -> None:
        """Begin to count, at the first call."""
        if self._began is None:
            self._began = time.perf_counter()

    def allows(self, share: float) -> bool:
        """Whether the audits, with one more like the last one, take at most this share.

        The first one is always allowed.
        """
        if self._began is None or not self._audits:
            return True
        return self._audits + self._last <= share * (time.perf_counter() - self._began)

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """A block that is an audit."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._last = time.perf_counter() - start
            self._audits += self._last


def _checked(x: object) -> Tensor:
    if isinstance(x, Tensor) and x.dim() >= 2:
        return x
    got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
    raise TypeError(f"expected x as a tensor (B, *data); got {got}: call hook(x)")


def _state(action: Action) -> dict[str, Any] | None:
    """The state of an action; None if it has none, as a plain function."""
    take: Callable[[], dict[str, Any]] | None = getattr(action, "state_dict", None)
    if take is None:
        return None
    return take()


def _keys(state: dict[str, Any] | None) -> list[str] | None:
    if state is None:
        return None
    return sorted(state)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)

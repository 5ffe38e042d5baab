"""AuditHook: any audit on a schedule inside a training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.audits import Audit, AuditReport, polite
from inn_guard.audits.quick_check import quick_round_trip
from inn_guard.audits.run import resolve_check
from inn_guard.core.invertible import Context, Invertible
from inn_guard.memory_saving import MemorySaving
from inn_guard.training.actions import Action
from inn_guard.training.records import Record
from inn_guard.training.schedule import Schedule, schedule

__all__ = ["AuditHook"]


class AuditHook:
    """Audits the model being trained every few steps, on a few samples of the batch; training does not notice.

        hook = AuditHook(model, every=100, record=CsvRecorder("stability.csv"), actions=[Warn()])
        ...
        optimizer.step()
        hook(x)

    The model is audited as it is, in eval mode, with autocast off and gradients on whatever surrounds the call, and
    comes out bit for bit as it went in: weights, gradients, statistics, modes, random numbers. Of a memory-saving
    model the map itself is audited. What an audit finds is recorded first and acted upon then, by the actions in their
    order; without actions nothing is changed, whatever is found.

    The default check runs one forward and one inverse pass over eight samples. More is asked for by
    ``checks=["jacobian_spectrum", functools.partial(gradient_angle, loss=loss)]``.

    With gradient accumulation, where one optimizer step takes several calls, hand the hook the number of the optimizer
    step: ``hook(x, step=step)``; the first call of a due step is audited.

    Args:
        model: an Invertible, or a model that ``wrap`` knows.
        checks: names in AUDITS, or audits themselves.
        every: period in steps (due at 0, k, 2k, ...), or any function step -> bool.
        samples: the first so many of the batch are audited; None: all of it.
        record: called with the ``Record`` of every audit: a CsvRecorder, a TensorBoardRecorder, a list's ``append``.
        actions: called with it afterwards; see ``inn_guard.actions``.

    Attributes:
        step: number of the next step.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        checks: Sequence[str | Audit] = (quick_round_trip,),
        every: int | Schedule = 100,
        samples: int | None = 8,
        record: Callable[[Record], object] | None = None,
        actions: Sequence[Action] = (),
    ) -> None:
        if isinstance(checks, str):
            raise TypeError(f'expected a list of checks, got a string: type checks=["{checks}"]')
        if samples is not None and samples < 1:
            raise ValueError(
                f"expected at least 1 sample, or None for the whole batch; got {samples}"
            )
        wrapped = wrap(model)
        self.model: Invertible = wrapped.model if isinstance(wrapped, MemorySaving) else wrapped
        self.checks = tuple(polite(resolve_check(check)) for check in checks)
        self.due: Schedule = schedule(every)
        self.samples, self.record, self.actions = samples, record, tuple(actions)
        self.step = 0
        self._audited: int | None = None

    def __call__(
        self, x: Shaped[Tensor, "batch *data"], context: Context = None, *, step: int | None = None
    ) -> AuditReport | None:
        """The report if this step is due, else None.

        Args:
            x: data, (B, *data).
            context: condition for this batch, in place of the model's own.
            step: the optimizer's step; None: the hook's own count of calls.

        Raises:
            TypeError: if x is no floating-point tensor.
            ValueError: if x is empty or has another dtype or device than the model.
        """
        step = self.step if step is None else step
        self.step = step + 1
        if step == self._audited or not self.due(step):
            return None
        report = self.report(x, context)
        self._audited = step
        values = {
            name: value
            for action in self.actions
            for name, value in getattr(action, "values", {}).items()
        }
        record = Record(step, report, values)
        if self.record is not None:
            self.record(record)
        for action in self.actions:
            action(record)
        return report

    def report(self, x: Shaped[Tensor, "batch *data"], context: Context = None) -> AuditReport:
        """The checks' findings on the first samples of x, whether due or not; nothing is recorded."""
        model = self.model if context is None else self.model.with_context(context)
        if self.samples is not None and self.samples < len(x):
            rows = torch.arange(self.samples, device=x.device)
            model, x = model.select(rows), x[rows]
        start = time.perf_counter()
        results = tuple(check(model, x) for check in self.checks)
        settings = {
            "shape": tuple(x.shape),
            "dtype": str(x.dtype).removeprefix("torch."),
            "device": str(x.device),
            "samples": len(x),
            "seconds": round(time.perf_counter() - start, 4),
        }
        return AuditReport(results, model.name, settings)

    def state_dict(self) -> dict[str, Any]:
        """The step counter and the actions' states: what resuming a run takes."""
        return {
            "step": self.step,
            "audited": self._audited,
            "actions": [_state(action) for action in self.actions],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: if ``state`` belongs to a hook with other actions.
        """
        mine, theirs = [_state(action) for action in self.actions], state["actions"]
        if [_keys(action) for action in mine] != [_keys(action) for action in theirs]:
            raise ValueError(
                f"expected the state of {len(mine)} actions, {', '.join(_names(self.actions)) or 'none'}; got that of "
                f"{len(theirs)} others: build the hook with the same actions in the same order"
            )
        self.step, self._audited = int(state["step"]), state["audited"]
        for action, saved in zip(self.actions, theirs, strict=True):
            if saved is not None:
                action.load_state_dict(saved)  # type: ignore[attr-defined]


def _state(action: Action) -> dict[str, Any] | None:
    take: Callable[[], dict[str, Any]] | None = getattr(action, "state_dict", None)
    return None if take is None else take()


def _keys(state: dict[str, Any] | None) -> list[str] | None:
    return None if state is None else sorted(state)


def _names(actions: Sequence[Action]) -> list[str]:
    return [getattr(action, "__name__", type(action).__name__) for action in actions]

"""Actions on an audit during training: warn, stop, store activations, adapt, or roll back."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from inn_guard.memory_saving import MemorySaving
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.verdict import Verdict
from inn_guard.training.records import Record
from inn_guard.training.regularizers import AdaptiveCoefficient

__all__ = [
    "Action",
    "AdaptCoefficient",
    "DisableMemorySaving",
    "EmitWarning",
    "RaiseError",
    "RollBack",
    "StabilityError",
    "StabilityWarning",
    "log10_condition_number",
]

Action = Callable[[Record], None]
Condition = Callable[[Record], bool]


class StabilityWarning(UserWarning):
    """An audit during training found the model unstable or not finite."""


class StabilityError(RuntimeError):
    """An audit during training found a reason to stop.

    Attributes:
        report: the report of that audit.
    """

    def __init__(self, message: str, report: AuditReport) -> None:
        super().__init__(message, report)  # both, so that the error can be pickled
        self.report = report

    def __str__(self) -> str:
        return str(self.args[0])


def failed(record: Record) -> bool:
    """Whether the audit's verdict is unstable or non_finite."""
    return record.report.verdict.failed


@dataclass(frozen=True)
class EmitWarning:
    """Issues a StabilityWarning with the findings of an audit.

    Args:
        when: which audits. Default: those whose verdict is unstable or non_finite.
    """

    when: Condition = failed

    def __call__(self, record: Record) -> None:
        """Warn if ``when`` says so."""
        if self.when(record):
            # level 3: the line of the training loop that called the hook
            warnings.warn(_findings(record), StabilityWarning, stacklevel=3)


@dataclass(frozen=True)
class RaiseError:
    """Raises a StabilityError that carries the report of an audit.

    Args:
        when: which audits. Default: those whose verdict is unstable or non_finite.
    """

    when: Condition = failed

    def __call__(self, record: Record) -> None:
        """Raise if ``when`` says so.

        Raises:
            StabilityError: with the report.
        """
        if self.when(record):
            raise StabilityError(_findings(record), record.report)


@dataclass(frozen=True)
class DisableMemorySaving:
    """Switches memory saving off: gradients then come from stored activations.

    These are right whatever the inverse does. Memory saving stays off until you set
    ``saving.enabled = True``.

    Args:
        saving: what ``memory_saving(model)`` returned.
        when: which audits. Default: those whose verdict is unstable or non_finite.
    """

    saving: MemorySaving
    when: Condition = failed

    def __call__(self, record: Record) -> None:
        """Switch off if ``when`` says so, and warn that more memory is needed."""
        if self.saving.enabled and self.when(record):
            self.saving.enabled = False
            message = (
                f"{_findings(record)}; memory saving is off: activations are stored from now on"
            )
            warnings.warn(message, StabilityWarning, stacklevel=3)

    @property
    def values(self) -> dict[str, float]:
        """The number ``memory_saving`` for records: 1 if it is on, else 0."""
        return {"memory_saving": float(self.saving.enabled)}

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from: whether memory saving is on."""
        return {"enabled": self.saving.enabled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Switch memory saving on or off, as it was in ``state``."""
        self.saving.enabled = bool(state["enabled"])


def log10_condition_number(report: AuditReport) -> float:
    """log10 of the worst condition number in the report; inf if not finite.

    It is that of the check ``jacobian_spectrum``, else the lower bound of ``tracked_spectrum``.

    Raises:
        ValueError: if the report has neither of these checks, or the check has no condition number.
    """
    measured = [name for name in ("jacobian_spectrum", "tracked_spectrum") if name in report]
    if not measured:
        names = ", ".join(report.names) or "none"
        raise ValueError(
            f"expected the check jacobian_spectrum in the report; it has {names}: pass "
            'AuditHook(..., checks=["jacobian_spectrum"])'
        )
    result = report[measured[0]]
    if result.verdict is Verdict.NON_FINITE:
        return math.inf
    if "log10_condition_number" in result.values:
        return result.values["log10_condition_number"]
    plain = [value for name, value in result.values.items() if name.endswith("condition_number")]
    if not plain:
        raise ValueError(f"the condition number cannot be measured: {result.reason}")
    if not all(value > 0 for value in plain):
        return math.inf  # zero, negative and NaN are no condition numbers
    return math.log10(max(plain))


@dataclass(frozen=True)
class AdaptCoefficient:
    """Updates an AdaptiveCoefficient with the measured condition number.

    Args:
        coefficient: the coefficient to update.
        measured: report -> log10 of the condition number. Default: the worst one in the check
            ``jacobian_spectrum``, or else in ``tracked_spectrum``.
    """

    coefficient: AdaptiveCoefficient
    measured: Callable[[AuditReport], float] = log10_condition_number

    def __call__(self, record: Record) -> None:
        """Update the coefficient with the audit's condition number."""
        self.coefficient.update(self.measured(record.report))

    @property
    def values(self) -> dict[str, float]:
        """The number ``coefficient`` for records: its current value."""
        return {"coefficient": self.coefficient.value}

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from: that of the coefficient."""
        return self.coefficient.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the coefficient to what it was in ``state``."""
        self.coefficient.load_state_dict(state)


@runtime_checkable
class Restorable(Protocol):
    """An optimizer, a learning rate schedule, a gradient scaler: anything with a state."""

    def state_dict(self) -> dict[str, Any]:
        """The state, in the form that ``load_state_dict`` takes."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Continue from a state that ``state_dict`` returned."""
        ...


class RollBack:
    """Keeps the last good weights on the CPU and restores them bit for bit when an audit fails.

    Gradients of the discarded weights are dropped. Call the hook after ``optimizer.step()``: a
    graph recorded before a rollback cannot be differentiated afterwards.

    Args:
        model: the module whose parameters and buffers are kept: all that is trained, not only its
            invertible part.
        others: the optimizer, and whatever else must be restored with the weights.
        limit: how many rollbacks in a row, without a passed audit in between, end the run.

    Attributes:
        count: rollbacks so far.
        step: the training step whose weights are kept; None before the first passed audit.

    Raises:
        ValueError: if ``limit`` is below 1.
    """

    def __init__(self, model: nn.Module, *others: Restorable, limit: int = 5) -> None:
        if limit < 1:
            raise ValueError(f"expected a limit of at least 1 rollback in a row; got {limit}")
        self.model = model
        self.others = others
        self.limit = limit
        self.count = 0
        self.step: int | None = None
        self._in_a_row = 0
        self._kept: dict[str, Any] = {}

    def __call__(self, record: Record) -> None:
        """Keep the weights after a passed audit, restore them after a failed one.

        Raises:
            StabilityError: if there are no weights to restore, or the limit is reached.
        """
        if not failed(record):
            self._keep(record.step)
            return
        if self.step is None:
            raise StabilityError(f"{_findings(record)}; no audit has passed before", record.report)
        if self._in_a_row >= self.limit:
            message = f"{_findings(record)}; {self.limit} rollbacks in a row did not help"
            raise StabilityError(message, record.report)
        self._restore()
        message = f"{_findings(record)}; rolled back to the weights of step {self.step}"
        warnings.warn(message, StabilityWarning, stacklevel=3)

    @property
    def values(self) -> dict[str, float]:
        """The number ``rollbacks`` for records: how many there have been so far."""
        return {"rollbacks": float(self.count)}

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from: the kept weights and the counters."""
        return {
            "kept": self._kept,
            "step": self.step,
            "count": self.count,
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the kept weights and the counters of ``state``."""
        self._kept = _on_cpu(state["kept"])
        self.step = state["step"]
        self.count = int(state["count"])
        self._in_a_row = int(state["in_a_row"])

    def _keep(self, step: int) -> None:
        """Keep copies of the present weights and states as those of this step."""
        self.step = step
        self._in_a_row = 0
        self._kept = {
            "tensors": _on_cpu(dict(_tensors(self.model))),
            "others": [_on_cpu(other.state_dict()) for other in self.others],
        }

    def _restore(self) -> None:
        """Write the kept weights into the model, in place, and the kept states into the others."""
        tensors = self._kept["tensors"]
        with torch.no_grad():
            for name, tensor in _tensors(self.model):
                tensor.copy_(tensors[name])
        for parameter in self.model.parameters():
            parameter.grad = None
        for other, state in zip(self.others, self._kept["others"], strict=True):
            # a copy, because an optimizer continues with the very tensors that it is given
            other.load_state_dict(_on_cpu(state))
        self.count += 1
        self._in_a_row += 1


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # not state_dict(): it leaves out the buffers that are not persistent
    yield from model.named_parameters()
    yield from model.named_buffers()


def _on_cpu(value: Any) -> Any:
    """A deep copy whose tensors lie on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on_cpu(item) for item in value)
    return copy.deepcopy(value)


def _findings(record: Record) -> str:
    """The step and the reasons of all failed checks, in one line."""
    found = []
    for result in record.report.results:
        if result.verdict.failed:
            found.append(f"{result.name}: {result.reason}")
    return f"step {record.step}: {'; '.join(found) or record.report.verdict.label}"

"""What may be done about an audit inside a training run: warn, stop, store activations, steer, or go back."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from inn_guard.audits import AuditReport, Verdict
from inn_guard.memory_saving import MemorySaving
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
    """An audit inside a training run has found something."""


class StabilityError(RuntimeError):
    """An audit inside a training run has found something that ends it.

    Attributes:
        report: what was found.
    """

    def __init__(self, message: str, report: AuditReport) -> None:
        super().__init__(message, report)
        self.report = report

    def __str__(self) -> str:
        return str(self.args[0])


def failed(record: Record) -> bool:
    """Whether any check of the audit found the model unstable or not finite."""
    return record.report.verdict.failed


@dataclass(frozen=True)
class EmitWarning:
    """Issues a StabilityWarning with the findings of an audit.

    Args:
        when: which audits; those with findings unless given.
    """

    when: Condition = failed

    def __call__(self, record: Record) -> None:
        """Warn, if it is time."""
        if self.when(record):
            warnings.warn(_findings(record), StabilityWarning, stacklevel=3)


@dataclass(frozen=True)
class RaiseError:
    """Raises a StabilityError that carries the report of an audit.

    Args:
        when: which audits; those with findings unless given.
    """

    when: Condition = failed

    def __call__(self, record: Record) -> None:
        """Raise, if it is time.

        Raises:
            StabilityError: with the report.
        """
        if self.when(record):
            raise StabilityError(_findings(record), record.report)


@dataclass(frozen=True)
class DisableMemorySaving:
    """Switches memory saving off: from then on gradients come from stored activations, right whatever the inverse does.

    It stays off; set ``saving.enabled = True`` to switch it on again.

    Args:
        saving: what ``memory_saving(model)`` returned.
        when: at which audits; those with findings unless given.
    """

    saving: MemorySaving
    when: Condition = failed

    def __call__(self, record: Record) -> None:
        """Switch off, if it is time, and warn that memory will be needed."""
        if self.saving.enabled and self.when(record):
            self.saving.enabled = False
            message = f"{_findings(record)}; memory saving is switched off: activations are stored from now on"
            warnings.warn(message, StabilityWarning, stacklevel=3)

    @property
    def values(self) -> dict[str, float]:
        """Whether memory is saved: 1 or 0."""
        return {"memory_saving": float(self.saving.enabled)}

    def state_dict(self) -> dict[str, Any]:
        """Whether memory is saved."""
        return {"enabled": self.saving.enabled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.saving.enabled = bool(state["enabled"])


def log10_condition_number(report: AuditReport) -> float:
    """log10 of the worst condition number that the check ``jacobian_spectrum`` measured; inf where it is not finite.

    Raises:
        ValueError: if the report has no such check, or the model has no such number.
    """
    if "jacobian_spectrum" not in report:
        raise ValueError(
            f"expected the check jacobian_spectrum in the report; it has {', '.join(report.names) or 'none'}: type "
            'AuditHook(..., checks=["jacobian_spectrum"])'
        )
    result = report["jacobian_spectrum"]
    if result.verdict is Verdict.NON_FINITE:
        return math.inf
    if "log10_condition_number" in result.values:
        return result.values["log10_condition_number"]
    plain = [value for name, value in result.values.items() if name.endswith("condition_number")]
    if not plain:
        raise ValueError(f"the condition number cannot be measured: {result.reason}")
    return max(math.log10(value) if value > 0 else math.inf for value in plain)


@dataclass(frozen=True)
class AdaptCoefficient:
    """Hands the condition number that was measured to an AdaptiveCoefficient.

    Args:
        coefficient: what is steered.
        measured: report -> log10 of the condition number; the worst of ``jacobian_spectrum`` unless given.
    """

    coefficient: AdaptiveCoefficient
    measured: Callable[[AuditReport], float] = log10_condition_number

    def __call__(self, record: Record) -> None:
        """Steer."""
        self.coefficient.update(self.measured(record.report))

    @property
    def values(self) -> dict[str, float]:
        """The coefficient in force."""
        return {"coefficient": self.coefficient.value}

    def state_dict(self) -> dict[str, Any]:
        """The coefficient's state."""
        return self.coefficient.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.coefficient.load_state_dict(state)


@runtime_checkable
class Restorable(Protocol):
    """An optimizer, a learning rate schedule, a gradient scaler: anything with a state."""

    def state_dict(self) -> dict[str, Any]:
        """Its state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Put a state back."""
        ...


class RollBack:
    """Keeps the last stable weights on the CPU and puts them back, bit for bit, when an audit has findings.

    Gradients of the lost weights are dropped. Call the hook after ``optimizer.step()``: a graph that was recorded
    before its weights went back cannot be differentiated any more.

    Args:
        model: whose parameters and buffers are kept; the whole module that is trained, not only its invertible part.
        others: the optimizer, and whatever else must go back with the weights.
        limit: so many rollbacks in a row, without a stable audit between them, end the run.

    Attributes:
        count: rollbacks so far.
        step: the training step whose weights are kept; None before the first stable audit.
    """

    def __init__(self, model: nn.Module, *others: Restorable, limit: int = 5) -> None:
        if limit < 1:
            raise ValueError(f"expected a limit of at least 1 rollback in a row; got {limit}")
        self.model, self.others, self.limit = model, others, limit
        self.count = 0
        self.step: int | None = None
        self._in_a_row = 0
        self._kept: dict[str, Any] = {}

    def __call__(self, record: Record) -> None:
        """Keep the weights after a stable audit, put them back after one with findings.

        Raises:
            StabilityError: if there are none to put back, or the limit is reached.
        """
        if not failed(record):
            self._keep(record.step)
            return
        if self.step is None or self._in_a_row >= self.limit:
            why = (
                "no stable weights are known"
                if self.step is None
                else f"{self.limit} rollbacks in a row did not help"
            )
            raise StabilityError(f"{_findings(record)}; {why}", record.report)
        self._put_back()
        message = f"{_findings(record)}; rolled back to the weights of step {self.step}"
        warnings.warn(message, StabilityWarning, stacklevel=3)

    @property
    def values(self) -> dict[str, float]:
        """The number of rollbacks so far."""
        return {"rollbacks": float(self.count)}

    def state_dict(self) -> dict[str, Any]:
        """The kept weights and the counters."""
        return {
            "kept": self._kept,
            "step": self.step,
            "count": self.count,
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self._kept, self.step = _on_cpu(state["kept"]), state["step"]
        self.count, self._in_a_row = int(state["count"]), int(state["in_a_row"])

    def _keep(self, step: int) -> None:
        self.step, self._in_a_row = step, 0
        self._kept = {
            "tensors": {name: _on_cpu(tensor) for name, tensor in _tensors(self.model)},
            "others": [_on_cpu(other.state_dict()) for other in self.others],
        }

    def _put_back(self) -> None:
        tensors = self._kept["tensors"]
        with torch.no_grad():
            for name, tensor in _tensors(self.model):
                tensor.copy_(tensors[name])
        for parameter in self.model.parameters():
            parameter.grad = None
        for other, state in zip(self.others, self._kept["others"], strict=True):
            # a copy: an optimizer goes on with the very tensors it is given
            other.load_state_dict(_on_cpu(state))
        self.count += 1
        self._in_a_row += 1


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
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
    found = [
        f"{result.name}: {result.reason}"
        for result in record.report.results
        if result.verdict.failed
    ]
    return f"step {record.step}: {'; '.join(found) or record.report.verdict.label}"

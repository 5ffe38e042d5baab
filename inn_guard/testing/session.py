"""What the pytest plug-in keeps of a test session: models that tests call, and their reports."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from inn_guard.adapters import is_known
from inn_guard.audits.run import audit
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.limits import Limits
from inn_guard.testing.assertions import Unfit, assert_stable

__all__ = ["Guard", "ModelCalls", "arguments_of_marker", "verdict_line"]

MODELS = 4  #: at most so many models of one test are audited
ROWS = 256  #: at most so many rows of the batch are kept
_ARGUMENTS = ("uses", "limits", "level", "checks", "seed", "skip")


def arguments_of_marker(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``pytest.mark.inn_guard`` as arguments of `assert_stable`.

    Raises:
        TypeError: if there is an argument that the marker does not have.
    """
    unknown = set(given) - set(_ARGUMENTS)
    if unknown:
        raise TypeError(
            f"expected pytest.mark.inn_guard with {', '.join(_ARGUMENTS)}; "
            f"got {', '.join(sorted(unknown))}"
        )
    arguments = dict(given)
    if isinstance(arguments.get("limits"), Mapping):
        arguments["limits"] = Limits(**arguments["limits"])
    return arguments


def verdict_line(report: AuditReport) -> str:
    """The verdict, the model and what fails in one line, as JUnit XML and the summary show it."""
    parts = [f"{report.verdict.label}: {report.subject}"]
    parts += [f"{use.use}: {use.reason}" for use in report.failed]
    return "; ".join(parts)


@dataclass
class Guard:
    """The fixture ``inn_guard``: `assert_stable` with the defaults of the test's marker.

    Attributes:
        keep: what is done with the verdict line of each report.
        defaults: arguments of the marker.
    """

    keep: Callable[[str], None]
    defaults: Mapping[str, Any]

    def __call__(self, model: Any, x: Any, **arguments: Any) -> AuditReport:
        """The model's report; see `assert_stable` for the arguments.

        Raises:
            AssertionError: if the model is not fit for its uses.
        """
        __tracebackhide__ = True
        defaults = {key: value for key, value in self.defaults.items() if key != "skip"}
        try:
            report = assert_stable(model, x, **{**defaults, **arguments})
        except Unfit as error:
            self.keep(verdict_line(error.report))
            raise
        self.keep(verdict_line(report))
        return report


class ModelCalls:
    """Records the invertible models that are called while a test runs, with their first batch.

    A module counts if `wrap` knows it. Modules that it calls in turn do not count. Models whose
    methods are called without ``model(x)`` are not seen.
    """

    def __init__(self) -> None:
        self.calls: dict[int, tuple[nn.Module, Tensor]] = {}
        self._inside: list[nn.Module] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record inside the block."""
        before = register_module_forward_pre_hook(self._enter)
        after = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            self._inside.clear()

    def audited(self, arguments: Mapping[str, Any]) -> Iterator[AuditReport]:
        """The reports of the recorded models; a model that does not take its batch has none."""
        for model, x in list(self.calls.values())[:MODELS]:
            try:
                yield audit(model, x, **{"level": "quick", "progress": False, **arguments})
            except (TypeError, ValueError) as error:
                warnings.warn(f"inn_guard: {type(model).__name__}: {error}", stacklevel=1)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if not is_known(module):
            return
        outermost = not self._inside
        self._inside.append(module)
        if outermost and isinstance(inputs, tuple) and len(inputs) == 1 and _is_batch(inputs[0]):
            self.calls.setdefault(id(module), (module, inputs[0][:ROWS].detach().clone()))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._inside and self._inside[-1] is module:
            self._inside.pop()


def _is_batch(given: Any) -> bool:
    if not isinstance(given, Tensor):
        return False
    return given.is_floating_point() and given.dim() > 1 and len(given) > 0

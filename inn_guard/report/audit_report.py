"""AuditReport: what audit() returns, as a table for people and as JSON, data frame or web page."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from inn_guard.execution.files import atomic_write
from inn_guard.report.result import AuditResult, Verdict

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["AuditReport"]

MARKS = {
    Verdict.STABLE: "+",
    Verdict.UNSTABLE: "!",
    Verdict.NON_FINITE: "!!",
    Verdict.NOT_APPLICABLE: "-",
}
KEY_FIGURES = 3  #: values of a result that the table shows: the first ones
WIDTH = 100


@dataclass(frozen=True)
class AuditReport:
    """All results of one audit of one model.

    Attributes:
        results: one per check, in the order in which they ran.
        model: the model's name.
        settings: what was audited: shape, dtype and device of x, number of samples, level, seconds.
    """

    results: tuple[AuditResult, ...]
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all results."""
        return Verdict.worst([result.verdict for result in self.results])

    @property
    def worst_layer(self) -> str | None:
        """The layer that loses most digits of the inverse, in words; None if no check blamed one."""
        named = [result for result in self.results if "worst_layer" in result.settings]
        return str(named[-1].settings["worst_layer"]) if named else None

    def __getitem__(self, name: str) -> AuditResult:
        """The result of the check of that name."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(f"no check {name!r} in this report; it has {', '.join(self.names)}")

    def __contains__(self, name: object) -> bool:
        """Whether a check of that name ran."""
        return name in self.names

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the checks, in the order in which they ran."""
        return tuple(result.name for result in self.results)

    def __str__(self) -> str:
        width = max([len(name) for name in self.names], default=0)
        subject = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        lines = [f"{self.model}: {self.verdict.label.upper()}", *_wrapped(subject, ""), ""]
        for result in self.results:
            verdict = (
                f"{MARKS[result.verdict]:>2} {result.name:<{width}}  {result.verdict.label:<14}"
            )
            lines.append(f"{verdict}  {_key(result)}".rstrip())
            lines += _wrapped(result.reason, "     ")
        if self.worst_layer is not None:
            lines += ["", *_wrapped(f"worst layer: {self.worst_layer}", "")]
        advice = dict.fromkeys(
            result.advice for result in self.results if result.verdict.failed and result.advice
        )
        if advice:
            lines += [
                "",
                "what to do:",
                *(line for text in advice for line in _wrapped(text, "  ")),
            ]
        return "\n".join(lines)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The whole report as JSON; NaN and Inf become the strings "nan", "inf" and "-inf"; images are left out.

        Args:
            path: file to write, atomically; its folder must exist. None writes nothing.

        Returns:
            the JSON text.
        """
        content = {
            "model": self.model,
            "verdict": self.verdict.label,
            "worst_layer": self.worst_layer,
            "settings": _plain(self.settings),
            "results": [_row(result) for result in self.results],
        }
        text = json.dumps(content, indent=2, allow_nan=False)
        if path is not None:
            with atomic_write(path) as partial:
                partial.write_text(text, encoding="utf-8")
        return text

    def to_frame(self) -> pd.DataFrame:
        """One row per named value of every result; needs the extra ``report``."""
        from inn_guard.report.data_frame import frame

        return frame(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """One self-contained page with tables and plots; needs the extra ``report``."""
        from inn_guard.report.html import write_html

        write_html(self, path)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _key(result: AuditResult) -> str:
    shown = list(result.values.items())[:KEY_FIGURES]
    return "  ".join(
        f"{name} {value:.3g} {result.units.get(name, '')}".rstrip() for name, value in shown
    )


def _row(result: AuditResult) -> dict[str, Any]:
    kept = (
        "name",
        "reason",
        "values",
        "units",
        "per_sample",
        "measured_mask",
        "per_layer",
        "tables",
        "settings",
        "advice",
    )
    return {"verdict": result.verdict.label, **{key: _plain(getattr(result, key)) for key in kept}}


def _plain(value: Any) -> Any:
    """``value`` in JSON's own types."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)

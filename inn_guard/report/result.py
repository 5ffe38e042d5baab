"""AuditResult: what one check returns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inn_guard.report.formatting import brief
from inn_guard.report.uses import Finding
from inn_guard.report.verdict import Verdict

__all__ = ["WIDTH", "AuditResult", "Verdict", "to_full_batch", "wrapped"]

WIDTH = 100  #: characters in a line of the printed report
_NAME, _VERDICT = 21, 14  #: widths of the first two columns of a printed result


@dataclass(frozen=True, eq=False)
class AuditResult:
    """One check's answer. Two results are equal if all their entries are, NaN included.

    Attributes:
        name: the check, as in AUDITS ("reconstruction").
        verdict: on the check's own question.
        reason: one sentence with the figures that decided the verdict.
        uses: use -> what this check found about it; empty for a check that explains but decides no
            use.
        headline: names of the values that decided the verdict; the printed report shows these.
        values: named numbers; NaN and Inf stay as they are.
        units: unit of each value that has one ("nats", "degrees", "x eps").
        per_sample: named tensors (B,), on the CPU.
        measured_mask: for quantities in per_sample that were taken from some samples only: which,
            (B,) bool; the others' entries are NaN and no finding.
        per_layer: one row per layer, first layer first; every row has the layer's ``index`` and
            ``name``.
        tables: further named tables, each a tuple of rows (name -> number or text): one row per
            dtype, family, attack.
        settings: everything needed to repeat the measurement: dtype, device, samples, limits,
            seeds.
        advice: what to do about it; empty if nothing is wrong.
        images: named tensors worth seeing, (n, C, H, W), on the CPU: original, reconstruction,
            difference.
    """

    name: str
    verdict: Verdict
    reason: str
    uses: Mapping[str, Finding] = field(default_factory=dict)
    headline: tuple[str, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    per_sample: Mapping[str, Tensor] = field(default_factory=dict)
    measured_mask: Mapping[str, Tensor] = field(default_factory=dict)
    per_layer: tuple[Mapping[str, Any], ...] = ()
    tables: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""
    images: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def not_applicable(cls, name: str, reason: str) -> AuditResult:
        """The result of a check whose question cannot be asked of this model."""
        return cls(name, Verdict.NOT_APPLICABLE, reason)

    def __getitem__(self, name: str) -> float:
        """The value of that name."""
        if name not in self.values:
            known = ", ".join(self.values)
            raise KeyError(f"no value {name!r} in {self.name}; it has {known or 'none'}")
        return self.values[name]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AuditResult):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in _FIELDS)

    def __hash__(self) -> int:
        return hash((self.name, self.verdict, self.reason))

    def __repr__(self) -> str:
        figures = [f"{name}={brief(self.values[name], digits=3)}" for name in self.shown]
        text = f"{self.name}: {self.verdict.label}"
        if figures:
            text += f" ({', '.join(figures)})"
        return text

    def __str__(self) -> str:
        """Verdict and deciding figures in one line, then the reason and what to do."""
        figures = []
        for name in self.shown:
            unit = self.units.get(name, "")
            figure = brief(self.values[name], digits=3)
            figures.append(f"{name.replace('_', ' ')} {figure} {unit}".rstrip())
        head = f"{self.name:<{_NAME}}  {self.verdict.label:<{_VERDICT}}  {', '.join(figures)}"
        lines = [head.rstrip(), *wrapped(self.reason, "    ")]
        if self.advice:
            lines += wrapped(f"What to do: {self.advice}", "    ")
        return "\n".join(lines)

    @property
    def shown(self) -> tuple[str, ...]:
        """Names of the values that a summary shows: the headline, else the first value."""
        named = self.headline or tuple(self.values)[:1]
        return tuple(name for name in named if name in self.values)


def wrapped(text: str, indent: str) -> list[str]:
    """The text in lines of the printed report."""
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


_FIELDS = tuple(AuditResult.__dataclass_fields__)


def _same(a: Any, b: Any) -> bool:
    """Whether two entries are equal; tensors are compared by entries, and NaN equals NaN."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and _same_tensor(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return bool(a == b)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and entries; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def to_full_batch(named: Mapping[str, Tensor], rows: Tensor, batch: int) -> dict[str, Any]:
    """The arguments per_sample and measured_mask of an AuditResult, measured at some rows of x.

    Args:
        named: tensors (len(rows),).
        rows: indices of the samples they belong to.
        batch: B.

    >>> full = to_full_batch({"error": torch.tensor([0.5])}, torch.tensor([1]), 3)
    >>> full["per_sample"]["error"].tolist()
    [nan, 0.5, nan]
    """
    measured_mask = torch.zeros(batch, dtype=torch.bool)
    measured_mask[rows.cpu()] = True
    whole = {}
    for name, values in named.items():
        whole[name] = torch.full((batch,), math.nan, dtype=torch.float64)
        whole[name][rows.cpu()] = values.to("cpu", torch.float64)
    masks = {}
    if not bool(measured_mask.all()):
        masks = dict.fromkeys(named, measured_mask)
    return {"per_sample": whole, "measured_mask": masks}

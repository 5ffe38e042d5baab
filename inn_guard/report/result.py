"""What an audit returns: Verdict and AuditResult."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["AuditResult", "Verdict", "to_full_batch"]


class Verdict(enum.Enum):
    """What an audit found. Each member's value is its sentence; the order is from good to bad."""

    NOT_APPLICABLE = "This question cannot be asked of this model."
    STABLE = "Errors stay within what rounding explains."
    UNSTABLE = "Errors exceed what a usable inverse, gradient or likelihood allows."
    NON_FINITE = "NaN or Inf came out of the model."

    @property
    def label(self) -> str:
        """Lower-case name for tables and JSON: stable, unstable, non_finite, not_applicable."""
        return self.name.lower()

    @property
    def failed(self) -> bool:
        """Whether this verdict is a finding: unstable or non_finite."""
        return self in (Verdict.UNSTABLE, Verdict.NON_FINITE)

    @classmethod
    def worst(cls, verdicts: list[Verdict]) -> Verdict:
        """The worst of several verdicts; NOT_APPLICABLE if there are none."""
        order = list(cls)
        return max(verdicts, key=order.index, default=cls.NOT_APPLICABLE)


@dataclass(frozen=True)
class AuditResult:
    """One audit's answer.

    Attributes:
        name: the audit, as in AUDITS ("reconstruction").
        verdict: stable, unstable, non_finite or not_applicable.
        reason: one sentence in plain words with the figures that decided the verdict.
        values: named numbers; NaN and Inf stay as they are.
        units: unit of each value that has one ("nats", "degrees", "x eps").
        per_sample: named tensors (B,), on the CPU.
        measured_mask: for quantities in per_sample that were taken from some samples only: which, (B,) bool; the others'
            entries are NaN and no finding.
        per_layer: one row (name -> number or text) per layer, first layer first.
        tables: further named tables, each a tuple of rows (name -> number or text): one row per dtype, probe, attack.
        settings: everything needed to repeat the measurement: dtype, device, samples, thresholds, seeds.
        advice: what to do about it; empty if nothing is wrong.
        images: named tensors worth looking at, (n, C, H, W), on the CPU: original, reconstruction, difference.
    """

    name: str
    verdict: Verdict
    reason: str
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
        """The answer to a question that this model cannot be asked."""
        return cls(name, Verdict.NOT_APPLICABLE, reason)


def to_full_batch(named: Mapping[str, Tensor], rows: Tensor, batch: int) -> dict[str, Any]:
    """The arguments per_sample and measured_mask of an AuditResult, for quantities of these rows of x only.

    Args:
        named: tensors (len(rows),).
        rows: indices of the samples they belong to.
        batch: B.

    >>> scattered({"error": torch.tensor([0.5])}, torch.tensor([1]), 3)["per_sample"]["error"].tolist()
    [nan, 0.5, nan]
    """
    measured_mask = torch.zeros(batch, dtype=torch.bool)
    measured_mask[rows.cpu()] = True
    whole = {name: torch.full((batch,), math.nan, dtype=torch.float64) for name in named}
    for name, values in named.items():
        whole[name][rows.cpu()] = values.to("cpu", torch.float64)
    return {
        "per_sample": whole,
        "measured_mask": {} if bool(measured_mask.all()) else dict.fromkeys(named, measured_mask),
    }

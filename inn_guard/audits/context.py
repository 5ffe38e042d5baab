"""AuditContext: everything that a check may use, with the results that several checks share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.audited_model import AuditedModel, ModelError
from inn_guard.audits.level import Level
from inn_guard.core.base import BaseDistribution
from inn_guard.core.composition import Composition, compare_layers
from inn_guard.core.float64 import is_float64_throughout
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable
from inn_guard.core.tensors import finite_rows
from inn_guard.execution.memory import Footprint, forward_footprint, linearized_footprint
from inn_guard.execution.parallel import SERIAL, WorkSharing
from inn_guard.execution.state import StateSnapshot, preserve_state
from inn_guard.jacobian.chain import Linearization
from inn_guard.report.limits import Limits

__all__ = ["AuditContext", "audited_model", "same_up_to_rounding", "uncompared_model"]


@dataclass(frozen=True)
class AuditContext:
    """What a check measures, and with what.

    Attributes:
        model: the map under audit; its inputs are cloned and its exceptions named.
        x: data, (B, *data), checked; NaN and Inf in it are allowed.
        limits: up to which figure the model is fit for a use.
        base: where latents are drawn from; ``declared`` tells whether the model or the caller named
            it.
        domain: x (B, *data) -> which samples lie where data can lie, (B,) bool; None: everywhere.
        loss: z -> scalar, for the check that needs one; None: its default.
        seed: of everything random.
        parallel: with which processes samples are shared, and within how much memory.
        level: how much is measured.
        starts: from where iterations begin: what they left here at the last look at this model.
        shared: results that several checks use, by name; filled by the methods below.
    """

    model: AuditedModel
    x: Tensor
    base: BaseDistribution
    limits: Limits = field(default_factory=Limits)
    domain: Callable[[Tensor], Tensor] | None = None
    loss: Callable[..., Tensor] | None = None
    seed: int = 0
    parallel: WorkSharing = SERIAL
    level: Level = Level.STANDARD
    shared: dict[Any, Any] = field(default_factory=dict)
    starts: dict[str, Any] = field(default_factory=dict)

    def within(self, parallel: WorkSharing) -> AuditContext:
        """The same audit with its work shared by other processes."""
        return dataclasses.replace(self, parallel=parallel)

    def generator(self) -> torch.Generator:
        """A new generator on the CPU with this audit's seed."""
        return torch.Generator().manual_seed(self.seed)

    def at(self, rows: Tensor) -> tuple[AuditedModel, Tensor]:
        """The model with the context of these rows, and these rows of x."""
        return self.model.select(rows), self.x[rows]

    def max_batch(self, footprint: Callable[[float], Footprint]) -> float | int:
        """How many samples a measurement may take at once; inf where memory has no bound."""
        return self.parallel.max_batch(footprint)

    def max_linearized(self, vectors: int) -> float | int:
        """How many samples may be linearized at once, with this many vectors held for each."""
        model, x = self.model, self.x
        return self.max_batch(
            lambda within: linearized_footprint(model, x, within=within, vectors=vectors)
        )

    def max_forward(self) -> float | int:
        """How many samples a forward pass may take at once."""
        model, x = self.model, self.x
        return self.max_batch(lambda within: forward_footprint(model, x, within=within))

    def finite_rows(self) -> Tensor:
        """Indices of the samples of x without NaN or Inf."""
        return self.once("finite rows", lambda: finite_rows(self.x).nonzero()[:, 0])

    def usable_rows(self) -> Tensor:
        """Indices of the samples that are finite and have finite latents."""
        return self.once("usable rows", self._usable_rows)

    def in_dtype(self, dtype: torch.dtype) -> AuditedModel:
        """A copy of the model in this dtype, which all checks share and find as it was made.

        Raises:
            NotApplicable, ModelError: if it cannot be copied.
        """
        if self.parallel.memory is not None:
            # a copy that is kept would count against every later check
            return self.model.to_dtype(dtype)
        key = self._key(f"copy in {dtype}")
        if key not in self.shared:
            try:
                self.shared[key] = self.model.to_dtype(dtype)
            except (ModelError, NotApplicable) as error:
                self.shared[key] = error
        copy = self.shared[key]
        if isinstance(copy, Exception):
            raise copy
        self.shared.setdefault("lent", {})[key] = copy
        return copy

    def in_float64(self) -> AuditedModel:
        """The copy in float64 that others are held against, which computes nothing in float32.

        What the model's code computes in float32 although its weights are in float64 is computed in
        float64, so that the copy neither raises because of mixed dtypes nor shares that rounding.

        Raises:
            NotApplicable, ModelError: if it cannot be copied.
        """
        plain = self.in_dtype(torch.float64)
        if not self.once("float32 within", lambda: self._has_float32_within(plain)):
            return plain
        return plain.in_float64_throughout()

    def _has_float32_within(self, plain: AuditedModel) -> bool:
        """Whether a float64 copy computes something in float32, and needs not."""
        row = self.finite_rows()[:1]
        if not len(row):
            return False
        x = self.x[row].double()

        def encode(model: AuditedModel) -> None:
            with torch.no_grad():
                model(x)
                with contextlib.suppress(NotApplicable):
                    model.forward_and_log_det(x)

        # the forward alone, since an inverse may take very long
        with preserve_state(plain):
            one = plain.select(row)
            if is_float64_throughout(lambda: encode(one)):
                return False
            try:
                encode(one.in_float64_throughout())
            except (ModelError, NotApplicable):
                return False
        return True

    def take_back_copies(self) -> None:
        """Restore the copies that a check has used, for the next check."""
        for copy in self.shared.pop("lent", {}).values():
            if copy.state is not None:
                copy.state.restore()

    def linearization(self, rows: Tensor) -> Linearization:
        """The model linearized at these rows, shared by all checks that ask for the same rows."""
        if self.parallel.memory is not None:
            # a graph that is kept would count against every later check
            return Linearization(*self.at(rows))
        known = self.shared.get(self._key("linearization"))
        if known is not None and known[0].tolist() == rows.tolist():
            if isinstance(known[1], Exception):
                raise known[1]
            return known[1]
        try:
            made = Linearization(*self.at(rows))
        except (ModelError, NotApplicable) as error:
            # the next check need not find out again
            self.shared[self._key("linearization")] = (rows, error)
            raise
        self.shared[self._key("linearization")] = (rows, made)
        return made

    def _usable_rows(self) -> Tensor:
        rows = self.finite_rows()
        if not len(rows):
            return rows

        def measure(part: Tensor) -> tuple[Tensor]:
            model, x = self.at(part)
            with torch.no_grad():
                return (finite_rows(model(x)),)

        (finite,) = self.parallel.map(rows, measure, at_most=self.max_forward())
        return rows[finite]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made when it is first asked for under this name."""
        key = self._key(name)
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def _key(self, name: str) -> tuple[str, int]:
        """Of a result: processes that share their work must all compute it, or none."""
        return name, self.parallel.size


def audited_model(
    model: Invertible, x: Tensor, *, known: Composition | None = None
) -> AuditedModel:
    """The model as checks see it: with its layers if these are the same map, else opaque.

    Args:
        model: the map.
        x: data, (B, *data).
        known: how layers and model differ, where they have been compared before.
    """
    state = StateSnapshot(model)
    audited = AuditedModel(model)
    audited.data_shape = x.shape[1:]
    audited.state = state
    if known is not None:
        audited.trained = _in_training_mode(model)
        audited.composition = known
        return audited
    with torch.no_grad(), state.preserved() as recover:
        # inside the block no audit in another thread has set its mode
        audited.trained = _in_training_mode(model)
        audited.eval()

        def restore() -> None:
            recover()
            audited.eval()

        audited.composition = compare_layers(audited, x, restore=restore)
    return audited


def _in_training_mode(model: Invertible) -> tuple[str, ...]:
    return tuple(name for name, part in model.named_modules() if part.training)


def uncompared_model(model: Invertible, x: Tensor) -> AuditedModel:
    """The same for a dry run, which takes the layers as they are; they are not compared with it."""
    audited = AuditedModel(model)
    audited.data_shape = x.shape[1:]
    return audited


def same_up_to_rounding(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal up to ``tolerance`` times the largest entry; NaN equals NaN."""
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return False
    finite = a.isfinite()
    if not bool(finite.any()):
        return True
    gap = (a[finite].double() - b[finite].double()).abs().max().item()
    return gap <= tolerance * a[finite].abs().max().double().item()

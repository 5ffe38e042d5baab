"""Recognised: a model whose convention was measured, as an Invertible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.adapters.callables import Functions
from inn_guard.adapters.captured_modules import Closure
from inn_guard.adapters.conventions.calls import Call, Shapes
from inn_guard.adapters.conventions.readings import Path, State, pick
from inn_guard.core.base import BaseDistribution
from inn_guard.core.context import select_rows
from inn_guard.core.invertible import Context, as_log_det
from inn_guard.core.tensors import concatenate_flat

__all__ = ["Alone", "Decode", "Encode", "LogDet", "Recognised", "RecognisedOfSeveral"]


@dataclass(frozen=True)
class LogDet:
    """Where a log-determinant lies in a result.

    Attributes:
        path: keys that lead to it, or to a list of which it is the sum.
        sign: -1 if the result holds minus the log-determinant.
    """

    path: Path
    sign: int = 1

    def of(self, result: Any, like: Tensor) -> Tensor:
        """The log-determinant, (B,)."""
        part = pick(result, self.path)
        if not isinstance(part, (list, tuple)):
            return self.sign * as_log_det(part, like)
        total = as_log_det(part[0], like)
        for further in part[1:]:
            total = total + as_log_det(further, like)
        return self.sign * total


@dataclass(frozen=True)
class Encode:
    """x -> z, or x -> (z, log_det) if the same result holds a log-determinant."""

    call: Call
    state: State
    log_det: LogDet | None = None

    def __call__(self, x: Tensor, *context: Context) -> Any:
        """The latent, (B, *latent), and the log-determinant, (B,), if there is one."""
        result = self.call(x, *context)
        z = self.state.joined(result)
        return z if self.log_det is None else (z, self.log_det.of(result, x))


@dataclass(frozen=True)
class Decode:
    """z -> x, or z -> (x, log_det of the inverse)."""

    call: Call
    state: State
    back: State
    log_det: LogDet | None = None

    def __call__(self, z: Tensor, *context: Context) -> Any:
        """The data, (B, *data), and the log-determinant of the inverse, (B,), if there is one."""
        result = self.call(self.state.split(z), *context)
        x = self.back.joined(result)
        return x if self.log_det is None else (x, self.log_det.of(result, z))


@dataclass(frozen=True)
class Alone:
    """x -> log_det by a call of its own.

    Attributes:
        call: of x, or of (x, z) if ``encode`` is given.
        log_det: where it lies in the result.
        by_row: whether the result is one number for the whole batch, so that every row is a call.
        encode: makes z.
    """

    call: Call
    log_det: LogDet
    by_row: bool = False
    encode: Encode | None = None

    def __call__(self, x: Tensor, *context: Context) -> Tensor:
        """The log-determinants, (B,)."""
        if not self.by_row:
            return self._of(x, *context)
        values = []
        for row in torch.arange(len(x), device=x.device).split(1):
            values.append(self._of(x[row], *(select_rows(one, row) for one in context)))
        return torch.cat(values)

    def _of(self, x: Tensor, *context: Context) -> Tensor:
        given: Any = x
        if self.encode is not None:
            given = [x, self.encode(x, *context)]
        return self.log_det.of(self.call(given, *context), x)


class Recognised(Functions):
    """A model called as measurements on a batch have shown it to be called.

    Args:
        subject: the model, for its name.
        encode: x -> z or (z, log_det).
        decode: z -> x or (x, log_det).
        log_det: x -> log_det, if ``encode`` does not return it.
        context: passed to every call.
        latent_shape: of one sample.
        convention: how the model is called, as code, with what was measured.
        log_prob: the model's own log p(x), if it was measured to be that of a standard normal base.
    """

    def __init__(  # noqa: PLR0913
        self,
        subject: Any,
        *,
        encode: Encode,
        decode: Decode,
        log_det: Alone | None = None,
        context: Context = None,
        latent_shape: Sequence[int] = (),
        convention: str = "",
        log_prob: Call | None = None,
    ) -> None:
        super().__init__(encode, decode, log_det=log_det, context=context)
        self._name = getattr(subject, "__name__", type(subject).__name__)
        self._is_module = isinstance(subject, nn.Module)
        self._log_prob = None if log_prob is None else Closure(log_prob)
        self._latent_shape = tuple(latent_shape)
        self._state = encode.state
        self.convention = convention
        if self._is_module:
            self.training = subject.training

    def latents(self, z: Tensor) -> tuple[Tensor, ...]:
        """The latent (B, ...) as the tensors that the model itself returns."""
        parts = self._state.split(z)
        return (parts,) if isinstance(parts, Tensor) else tuple(parts)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (B,), by the model's own method if it was measured, else of a normal z."""
        if self._log_prob is None:
            return super().log_prob(x)
        given = () if self.context is None else (self.context,)
        return as_log_det(self._log_prob(x.clone(), *given), x)

    def base(self) -> BaseDistribution | None:
        """N(0, I) if the model's own log_prob was measured to be that of such a base, else None."""
        if self._log_prob is None:
            return None
        like = self._like()

        def draw(n: int, context: Context) -> Tensor:
            return torch.randn(n, *self._latent_shape, dtype=like.dtype, device=like.device)

        return BaseDistribution(
            draw,
            like,
            context=self.context,
            exact_deviation=torch.ones(()),
            description="N(0, I), which its log_prob was measured to use",
        )

    def to_dtype(self, dtype: torch.dtype) -> Recognised:
        """A copy in ``dtype``, without what its modules keep from calls in evaluation mode."""
        copied = super().to_dtype(dtype)
        modes = {module: module.training for module in copied.modules()}
        copied.train()  # by which modules drop weights that they have computed and kept
        for module, mode in modes.items():
            module.training = mode
        return copied

    @property
    def block(self) -> nn.Module:
        """The model itself, if it is a module."""
        return next(iter(self.module.children())) if self._is_module else self

    @property
    def name(self) -> str:
        """The class name of the model, or the name of the function."""
        return self._name


class RecognisedOfSeveral(Recognised):
    """A recognised model whose data are several tensors, which are joined in one, (B, D)."""

    inputs: Shapes = ()  #: of one sample of each tensor

    def pack(self, *tensors: Tensor) -> Tensor:
        """The tensors (B, ...) as the one that every function takes, (B, D).

        Raises:
            ValueError: if their number or shapes are not the model's.
        """
        got = tuple(tuple(tensor.shape[1:]) for tensor in tensors)
        if got != self.inputs:
            raise ValueError(
                f"expected {len(self.inputs)} tensors for {self.name} with shapes (B, ...) = "
                f"{self.inputs}; got {got}"
            )
        return concatenate_flat(tensors)

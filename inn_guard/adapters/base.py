"""Adapted: the base of what wraps a foreign module."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from inn_guard.adapters.structured_jacobians import is_jacobian_of, known_jacobian
from inn_guard.core.invertible import Context, Invertible, as_log_det
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.core.missing import MissingContextError, NotApplicable

__all__ = ["Adapted"]

Result = TypeVar("Result")


class Adapted(Invertible):
    """A foreign module as an Invertible. Subclasses write ``_encode`` and ``_decode``.

    Attributes:
        module: the wrapped module itself, not a copy; its parameters and modes are shared.
        context: passed to the module in every call, one row per sample; None if it takes none.
    """

    missing_log_det = "the library returned no log-determinant (None)"

    def __init__(self, module: nn.Module, context: Context = None) -> None:
        super().__init__()
        self.module = module
        self.context = context
        self.training = module.training

    @abc.abstractmethod
    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        """z, and log|det dz/dx| in the library's own format; None if there is none."""

    @abc.abstractmethod
    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        """x, and log|det dx/dz| in the library's own format; None if there is none."""

    def _expects_context(self) -> bool:
        """Whether the module shows that it is conditional. Asked only after a call has failed."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        """z = F(x) by the module's own code."""
        z, _ = self._call(self._encode, x)
        return z

    def inverse(self, z: Tensor) -> Tensor:
        """x = F^-1(z) by the module's own code."""
        x, _ = self._call(self._decode, z)
        return x

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F(x) and log|det dF(x)/dx| of shape (B,) by the module's own code."""
        z, log_det = self._call(self._encode, x)
        return z, self._as_log_det(log_det, x)

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """F^-1(z) and log|det dF^-1(z)/dz| of shape (B,) by the module's own code."""
        x, log_det = self._call(self._decode, z)
        return x, self._as_log_det(log_det, z)

    def _call(self, direction: Callable[[Tensor], Result], x: Tensor) -> Result:
        """``direction(x)``; if it fails for want of a context, an error that says so."""
        try:
            # a clone, because libraries write into their inputs
            return direction(x.clone())
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, NotApplicable) or self.context is not None:
                raise
            if not self._expects_context():
                raise
            raise MissingContextError(
                f"{self.name} is conditional and has no context; pass context=c with one row for "
                f"each of the {len(x)} samples, to audit(...) or to wrap(...)"
            ) from error

    def _as_log_det(self, log_det: Any, like: Tensor) -> Tensor:
        if log_det is None:
            raise NotApplicable(f"{self.name}: {self.missing_log_det}")
        return as_log_det(log_det, like)

    def _in_context(self, layers: Iterable[Invertible]) -> tuple[Invertible, ...]:
        return tuple(layer.with_context(self.context) for layer in layers)

    def _like(self) -> Tensor:
        """An empty tensor with the dtype and device of the module's parameters."""
        for parameter in self.module.parameters():
            if parameter.is_floating_point():
                return parameter.detach().new_empty(0)
        return torch.empty(0)

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The Jacobian at x: of the known structure if a check confirms it, else by autograd."""
        with torch.no_grad():
            known = known_jacobian(self.module, x.detach(), self.context)
        if known is not None and is_jacobian_of(known, self.forward, x):
            return known
        return super().linearize(x)

    @property
    def block(self) -> nn.Module:
        """The wrapped module, whose class and parameters say what the map is."""
        return self.module

    @property
    def name(self) -> str:
        """The class name of the block; of a compiled module, that of the original module."""
        original = getattr(self.block, "_orig_mod", self.block)
        return type(original).__name__

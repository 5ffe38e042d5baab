"""Adapted: the base of what wraps a foreign module."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.adapters.structured_jacobians import agrees, known_jacobian
from inn_guard.core.invertible import Context, Invertible, NotApplicable, as_log_det
from inn_guard.core.layer_jacobian import LayerJacobian

__all__ = ["Adapted"]


class Adapted(Invertible):
    """A foreign module seen as an Invertible. Subclasses write ``_encode`` and ``_decode``; the rest follows.

    Attributes:
        module: the wrapped module itself, not a copy; its parameters and modes are shared.
        context: what every call hands to the module, row-aligned with x; None if nothing.
    """

    def __init__(self, module: nn.Module, context: Context = None) -> None:
        super().__init__()
        self.module = module
        self.context = context
        self.training = module.training

    missing_log_det = "the library returned no log-determinant (None)"

    @abc.abstractmethod
    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        """(z, log|det dz/dx| in whatever shape or type the library has, None where there is none)."""

    @abc.abstractmethod
    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        """(x, log|det dx/dz| in whatever shape or type the library has, None where there is none)."""

    def forward(self, x: Tensor) -> Tensor:
        """z = F(x) by the module's own code."""
        return self._encode(x.clone())[0]  # libraries write into their inputs

    def inverse(self, z: Tensor) -> Tensor:
        """x = F^-1(z) by the module's own code."""
        return self._decode(z.clone())[0]

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F(x) and log|det dF(x)/dx| of shape (B,) by the module's own code."""
        z, log_det = self._encode(x.clone())
        return z, self._as_log_det(log_det, x)

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """F^-1(z) and log|det dF^-1(z)/dz| of shape (B,) by the module's own code."""
        x, log_det = self._decode(z.clone())
        return x, self._as_log_det(log_det, z)

    def _as_log_det(self, log_det: Any, like: Tensor) -> Tensor:
        if log_det is None:
            raise NotApplicable(f"{self.name}: {self.missing_log_det}")
        return as_log_det(log_det, like)

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The four products: by the known structure where that proves to be the derivative, else by autograd."""
        with torch.no_grad():
            fast = known_jacobian(self.module, x.detach(), self.context)
        proved = fast is not None and agrees(fast, self.forward, x)
        return fast if fast is not None and proved else super().linearize(x)

    @property
    def block(self) -> nn.Module:
        """The wrapped module."""
        return self.module

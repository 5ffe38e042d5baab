"""AuditedModel: the model under audit, with its inputs cloned and its exceptions named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible, InvertibleWrapper
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.core.missing import NotApplicable
from inn_guard.core.tensors import dtype_name

__all__ = ["AuditedModel", "InputRejected", "ModelError"]

Answer = TypeVar("Answer")


class ModelError(RuntimeError):
    """The audited model raised an exception of its own: a finding, not a failure of the audit."""


class InputRejected(ValueError):
    """The model takes no batch of this shape and dtype: these are not its data."""


class AuditedModel(InvertibleWrapper):
    """``inner`` as a check sees it: calls get clones of their input, exceptions say whose they are.

    Args:
        inner: the map.
        label: what exceptions call it ("the model", "layer 3 (Coupling)").
        trained: names of its modules that were in training mode before the audit.

    Attributes:
        data_shape: what the inverse must return, per sample; None where it is not known.
        is_opaque: whether ``layers()`` is hidden, because the layers were measured to compose to
            another map.
    """

    data_shape: torch.Size | None = None
    is_opaque: bool = False

    def __init__(
        self, inner: Invertible, label: str = "the model", *, trained: tuple[str, ...] = ()
    ) -> None:
        super().__init__(inner)
        self.label = label
        self.trained = trained

    def forward(self, x: Tensor) -> Tensor:
        """F(x) of the inner map."""
        return self._tensor("forward", x, lambda: self.inner(x.clone()))

    def inverse(self, z: Tensor) -> Tensor:
        """F^-1(z) of the inner map."""
        x = self._tensor("inverse", z, lambda: self.inner.inverse(z.clone()))
        if self.data_shape is not None and x.shape[1:] != self.data_shape:
            expected = (len(z), *self.data_shape)
            raise ModelError(
                f"inverse of {self.label} returns shape {tuple(x.shape)}, expected {expected}, "
                "the shape of x"
            )
        return x

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F(x) and log|det J| of the inner map."""
        return self._named("forward", lambda: self.inner.forward_and_log_det(x.clone()))

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """F^-1(z) and log|det J^-1| of the inner map."""
        return self._named("inverse", lambda: self.inner.inverse_and_log_det(z.clone()))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of the inner map."""
        return self._named("log_prob", lambda: self.inner.log_prob(x.clone()))

    def layers(self) -> tuple[Invertible, ...]:
        """The inner map's layers, audited alike; () if they compose to another map."""
        if self.is_opaque:
            return ()
        layers = self._named("layers()", self.inner.layers)
        return tuple(
            AuditedModel(layer, f"layer {k} ({layer.name})") for k, layer in enumerate(layers)
        )

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The inner map's Jacobian products, audited alike."""
        return _AuditedJacobian(
            self, self._named("forward", lambda: self.inner.linearize(x.clone()))
        )

    def overwrites(self, t: Tensor, *, inverse: bool = False) -> bool:
        """Whether a call writes into the tensor it is given, or frees its memory."""
        given = t.clone()
        if inverse:
            self._named("inverse", lambda: self.inner.inverse(given))
        else:
            self._named("forward", lambda: self.inner(given))
        if given.shape != t.shape or given.untyped_storage().nbytes() == 0:
            # a tensor whose memory is gone must not even be read
            return True
        return not torch.equal(given, t)

    def with_cached_conditioner(self, state: Tensor) -> AuditedModel:
        """The inner map with its conditioner evaluated once, audited alike."""
        cached = self._named("forward", lambda: self.inner.with_cached_conditioner(state))
        return self.rewrapped(cached)

    def to_dtype(self, dtype: torch.dtype) -> AuditedModel:
        """A copy in another dtype, audited alike."""
        what = f"conversion to {dtype_name(dtype)}"
        return self.rewrapped(self._named(what, lambda: self.inner.to_dtype(dtype)))

    def _tensor(self, what: str, given: Tensor, call: Callable[[], Any]) -> Tensor:
        value = self._named(what, call)
        returns = f"{what} of {self.label} returns"
        if not isinstance(value, Tensor):
            raise ModelError(f"{returns} {type(value).__name__}, expected one tensor (B, ...)")
        if value.dim() < 2 or len(value) != len(given):
            shapes = f"{tuple(value.shape)} for {tuple(given.shape)}"
            raise ModelError(f"{returns} shape {shapes}, expected (B, ...)")
        if not value.is_floating_point():
            raise ModelError(f"{returns} {value.dtype}, expected real floating-point numbers")
        if value.device != given.device:
            raise ModelError(f"{returns} a tensor on {value.device} for one on {given.device}")
        return value

    def _named(self, what: str, call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except (NotApplicable, ModelError):
            raise
        except NotImplementedError as error:
            if "not implemented for" in str(error):
                # torch has no such operation for this dtype: the model has the method, and it fails
                message = f"{what} of {self.label} raises {_described(error)}"
                raise ModelError(message) from error
            raise NotApplicable(f"{self.label} has no {what}: {_described(error)}") from error
        except Exception as error:  # whatever a foreign library raises is a finding about the model
            raise ModelError(f"{what} of {self.label} raises {_described(error)}") from error


class _AuditedJacobian:
    """Jacobian products whose exceptions say which layer they come from."""

    def __init__(self, owner: AuditedModel, jacobian: LayerJacobian) -> None:
        self._owner = owner
        self._jacobian = jacobian
        self.output = jacobian.output

    def jvp(self, v: Tensor) -> Tensor:
        return self._owner._named("the derivative J v", lambda: self._jacobian.jvp(v))

    def vjp(self, u: Tensor) -> Tensor:
        return self._owner._named("the derivative J^T u", lambda: self._jacobian.vjp(u))

    def inverse_jvp(self, u: Tensor) -> Tensor:
        return self._owner._named("the derivative J^-1 u", lambda: self._jacobian.inverse_jvp(u))

    def inverse_vjp(self, v: Tensor) -> Tensor:
        return self._owner._named("the derivative J^-T v", lambda: self._jacobian.inverse_vjp(v))


def _described(error: BaseException) -> str:
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__

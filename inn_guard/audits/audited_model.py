"""AuditedModel: the model under audit, with its inputs cloned and its exceptions named."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from inn_guard.core.composition import Composition
from inn_guard.core.float64 import float64_throughout
from inn_guard.core.invertible import Invertible, InvertibleWrapper
from inn_guard.core.layer_jacobian import AutogradJacobian, LayerJacobian
from inn_guard.core.missing import NotApplicable
from inn_guard.core.tensors import dtype_name
from inn_guard.execution.state import StateSnapshot

__all__ = ["AuditedModel", "InputRejected", "ModelError"]

Answer = TypeVar("Answer")


class ModelError(RuntimeError):
    """The audited model raised an exception of its own: a finding, not a failure of the audit."""


class InputRejected(ValueError):
    """The model takes no batch of this shape and dtype: these are not its data."""


class Recovery:
    """Restores a model after a call that raised, which may have left flags and caches behind.

    Attributes:
        action: what restores it; None: nothing does.
    """

    # without a dictionary: what restores the model's attributes must not restore this one
    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None] | None = None) -> None:
        self.action = action

    def __call__(self) -> None:
        if self.action is not None:
            self.action()


class AuditedModel(InvertibleWrapper):
    """``inner`` as a check sees it: calls get clones of their input, exceptions say whose they are.

    Args:
        inner: the map.
        label: what exceptions call it ("the model", "layer 3 (Coupling)").
        trained: names of its modules that were in training mode before the audit.

    Attributes:
        data_shape: what the inverse must return, per sample; None where it is not known.
        composition: how the layers were measured to differ from the map. Where they are another
            map, ``layers()`` is hidden.
        recovery: what runs after a call that raised; shared with the layers.
        state: of the inner map, as checks find it; None where nobody has taken it.
        throughout: whether its calls compute in float64 also where its code says float32.
    """

    data_shape: torch.Size | None = None
    composition: Composition = Composition()
    state: StateSnapshot | None = None
    throughout: bool = False

    def __init__(
        self, inner: Invertible, label: str = "the model", *, trained: tuple[str, ...] = ()
    ) -> None:
        super().__init__(inner)
        self.label = label
        self.trained = trained
        self.recovery = Recovery()

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
        if self.composition.other_map:
            return ()
        layers = self._named("layers()", self.inner.layers)
        audited = [
            AuditedModel(layer, f"layer {k} ({layer.name})") for k, layer in enumerate(layers)
        ]
        for layer in audited:
            layer.recovery, layer.throughout = self.recovery, self.throughout
        return tuple(audited)

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The inner map's Jacobian products, audited alike; by autograd where its own ones fail."""
        try:
            return _AuditedJacobian(self, x, self.inner.linearize(x.clone()))
        except Exception:  # what is faster than autograd is ours, and no finding about the model
            self.recovery()
        return _AuditedJacobian(self, x, AutogradJacobian(self.forward, self.inverse, x))

    def call_on(self, given: Tensor, *, inverse: bool = False) -> tuple[Tensor, bool]:
        """The value of a call on this tensor itself, and whether it was written into or freed."""
        before = given.clone()
        if inverse:
            value = self._named("inverse", lambda: self.inner.inverse(given))
        else:
            value = self._named("forward", lambda: self.inner(given))
        if given.shape != before.shape or given.untyped_storage().nbytes() == 0:
            # a tensor whose memory is gone must not even be read
            return value, True
        return value, not torch.equal(given, before)

    def with_cached_conditioner(self, state: Tensor) -> AuditedModel:
        """The inner map with its conditioner evaluated once, audited alike."""
        cached = self._named("forward", lambda: self.inner.with_cached_conditioner(state))
        return self.rewrapped(cached)

    def to_dtype(self, dtype: torch.dtype) -> AuditedModel:
        """A copy in another dtype, audited alike."""
        what = f"conversion to {dtype_name(dtype)}"
        converted = self.rewrapped(self._named(what, lambda: self.inner.to_dtype(dtype)))
        if converted is not self:
            converted.state = StateSnapshot(converted.inner)
            converted.recovery = Recovery(converted.state.restore_written)
        return converted

    def in_float64_throughout(self) -> AuditedModel:
        """This copy in float64, whose calls compute in float64 also where its code says float32."""
        clone = copy.copy(self)
        clone.throughout = True
        return clone

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
            if not self.throughout:
                return call()
            with float64_throughout():
                return call()
        except BaseException as error:  # also a time limit
            self.recovery()
            if isinstance(error, (NotApplicable, ModelError)) or not isinstance(error, Exception):
                raise
            raised = error
        lacks = isinstance(raised, NotImplementedError)
        if lacks and "not implemented for" not in str(raised):
            raise NotApplicable(f"{self.label} has no {what}: {_described(raised)}") from raised
        # whatever a foreign library raises is a finding about the model; so is an operation that
        # torch does not have for this dtype, since the model has the method
        raise ModelError(f"{what} of {self.label} raises {_described(raised)}") from raised


class _AuditedJacobian:
    """Jacobian products whose exceptions say which layer they come from.

    Products of our own that raise are replaced by autograd's through the model. What the products
    can do beyond the four maps (select samples, multiply matrices, check themselves) is passed on.
    """

    def __init__(self, owner: AuditedModel, x: Tensor, jacobian: LayerJacobian) -> None:
        self._owner, self._x, self._jacobian = owner, x, jacobian
        self.output = jacobian.output
        # attributes of the instance, since protocols look for these
        for name in ("multiply", "forward_transposes", "inverse_transposes"):
            if hasattr(jacobian, name):
                setattr(self, name, functools.partial(self._passed_on, name))
        if hasattr(jacobian, "select"):
            self.select = self._selected

    def jvp(self, v: Tensor) -> Tensor:
        return self._product("J v", "jvp", v)

    def vjp(self, u: Tensor) -> Tensor:
        return self._product("J^T u", "vjp", u)

    def inverse_jvp(self, u: Tensor) -> Tensor:
        return self._product("J^-1 u", "inverse_jvp", u)

    def inverse_vjp(self, v: Tensor) -> Tensor:
        return self._product("J^-T v", "inverse_vjp", v)

    def _product(self, what: str, name: str, vector: Tensor) -> Tensor:
        if not isinstance(self._jacobian, AutogradJacobian):
            try:
                return getattr(self._jacobian, name)(vector)
            except Exception:  # ours, and no finding about the model
                self._owner.recovery()
            owner = self._owner
            self._jacobian = AutogradJacobian(owner.forward, owner.inverse, self._x)
        call = getattr(self._jacobian, name)
        return self._owner._named(f"the derivative {what}", lambda: call(vector))

    def _passed_on(self, name: str, *given: Any) -> Any:
        return getattr(self._jacobian, name)(*given)

    def _selected(self, rows: Tensor) -> _AuditedJacobian | None:
        part = self._jacobian.select(rows)  # type: ignore[attr-defined]
        if part is None:
            return None
        return _AuditedJacobian(self._owner.select(rows), self._x[rows], part)


def _described(error: BaseException) -> str:
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__

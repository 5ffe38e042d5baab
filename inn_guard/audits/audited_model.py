"""AuditedModel(model): the same map, its inputs cloned, its exceptions named; and the decorator every audit runs under."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from inn_guard.core.invertible import Context, Invertible
from inn_guard.core.layer_jacobian import LayerJacobian, NotApplicable
from inn_guard.execution.parallel import SERIAL, WorkSharing
from inn_guard.execution.state import preserve_state
from inn_guard.report.result import AuditResult, Verdict

__all__ = [
    "AuditedModel",
    "InputRejected",
    "ModelError",
    "checked_batch",
    "is_shared",
    "polite",
    "shares_of",
    "shares_samples",
    "shares_work",
]

Answer = TypeVar("Answer")
Audit = Callable[..., AuditResult]


class ModelError(RuntimeError):
    """The audited model raised an exception of its own: a finding, not a failure of the audit."""


class InputRejected(ValueError):
    """The model takes no batch of this shape and dtype: the audit was asked about the wrong data."""


def polite(audit: Callable[..., AuditResult]) -> Callable[..., AuditResult]:
    """Make an audit leave no trace: checked input, eval mode, model and random state restored, exceptions named.

    What surrounds the call (no_grad, inference_mode, autocast) is set aside meanwhile: the model itself is measured.

    The audit sees a ``AuditedModel`` model. A question that the model cannot answer becomes ``not_applicable``; an
    exception out of the model becomes a finding that names it; an exception out of the audit itself is raised.
    ``shares``, with which processes its samples are shared and how much memory it may take, it finds by `shares_of`.
    """
    if isinstance(audit, functools.partial):
        return functools.partial(polite(audit.func), *audit.args, **audit.keywords)
    if getattr(audit, "polite", False):
        return audit

    @functools.wraps(audit)
    def run(
        model: Invertible, x: Tensor, *, shares: WorkSharing = SERIAL, **settings: Any
    ) -> AuditResult:
        x = checked_batch(model, x)
        plain = torch.autocast(x.device.type, enabled=False)
        with torch.inference_mode(mode=False), torch.enable_grad(), plain, preserve_state(model):
            watched = AuditedModel(
                model, trained=tuple(name for name, part in model.named_modules() if part.training)
            )
            watched.data_shape, watched.shares = x.shape[1:], shares
            watched.eval()
            try:
                return audit(watched, x.detach().clone(), **settings)
            except NotApplicable as reason:
                return AuditResult.not_applicable(audit.__name__, str(reason))
            except ModelError as finding:
                advice = (
                    "Call the model on this batch outside the audit to see the whole traceback."
                )
                return AuditResult(audit.__name__, Verdict.UNSTABLE, str(finding), advice=advice)

    run.polite = True  # type: ignore[attr-defined]
    return run


def shares_work(*, where: Callable[[Mapping[str, Any]], bool]) -> Callable[[Audit], Audit]:
    """Mark an audit that shares its work by the `WorkSharing` of its model, so that all processes run it together.

    An audit without this mark is run whole by one of the processes.

    Args:
        where: whether it does, by the settings it is given.
    """

    def marked(audit: Audit) -> Audit:
        audit.shares_work = where  # type: ignore[attr-defined]
        return audit

    return marked


def shares_samples(audit: Audit) -> Audit:
    """Mark an audit that always shares its samples: see `shares_work`."""
    return shares_work(where=lambda settings: True)(audit)


def is_shared(audit: Audit) -> bool:
    """Whether all processes run this audit, or a partial of it, together."""
    function, settings = (
        (audit.func, audit.keywords) if isinstance(audit, functools.partial) else (audit, {})
    )
    where = getattr(function, "shares_work", None)
    return where is not None and where(settings)


def shares_of(model: nn.Module) -> WorkSharing:
    """With which processes an audit of this model shares its samples, and within how much memory."""
    return getattr(model, "shares", SERIAL)


def checked_batch(model: nn.Module, x: Any) -> Tensor:
    """``x`` if it can be a batch for ``model``.

    Raises:
        TypeError: if x is not a real floating-point tensor.
        ValueError: if x has no samples, no data dimension, or another dtype or device than the model.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"expected x as a tensor (B, *data), got {type(x).__name__}: type torch.as_tensor(x)"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"expected a real floating-point x, got {x.dtype}: type x.to(torch.get_default_dtype())"
        )
    if x.is_nested or x.layout is not torch.strided:
        raise TypeError(
            "expected a dense x (B, *data), got a sparse or nested one: type x.to_dense()"
        )
    if torch.finfo(x.dtype).bits < 16:
        raise TypeError(
            f"expected x of 16 bits at least, got {x.dtype}: type x.to(torch.get_default_dtype())"
        )
    if x.dim() < 2:
        raise ValueError(
            f"expected x of shape (B, *data), got {tuple(x.shape)}: type x.reshape(B, -1)"
        )
    if x.numel() == 0:
        raise ValueError(
            f"expected at least one sample with at least one value, got x of shape {tuple(x.shape)}"
        )
    _check_values(model, x)
    weights = [p for p in model.parameters() if p.is_floating_point()]
    dtypes, devices = {p.dtype for p in weights}, {p.device for p in weights}
    if weights and x.dtype not in dtypes:
        wanted = (
            str(next(iter(dtypes)))
            if len(dtypes) == 1
            else "one of " + ", ".join(sorted(map(str, dtypes)))
        )
        raise ValueError(
            f"expected x in the dtype of the model's parameters, {wanted}; got {x.dtype}: x.to({wanted})"
        )
    if weights and x.device not in devices:
        where = next(iter(devices))
        raise ValueError(
            f"expected x on the model's device, {where}; got {x.device}: type x.to('{where}')"
        )
    return x


def _check_values(model: nn.Module, x: Tensor) -> None:
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "expected a model with values; some of its parameters are on the meta device, which has none: type "
            "model.to_empty(device=...) and load its weights"
        )
    if x.is_meta:
        raise ValueError(
            "expected x with values; got one on the meta device, which has none: load data and weights"
        )


class AuditedModel(Invertible):
    """``model`` seen by an audit: every call gets a clone of its input, every exception says whose it is.

    Args:
        model: the map.
        label: what exceptions call it ("the model", "layer 3 (Coupling)").
        trained: names of its modules that were in training mode before the audit.

    Attributes:
        data_shape: what the inverse must return, per sample; None where it is not known.
        shares: with which processes an audit shares its samples.
    """

    data_shape: torch.Size | None = None
    shares: WorkSharing = SERIAL

    def __init__(
        self, model: Invertible, label: str = "the model", *, trained: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.model, self.label, self.trained = model, label, trained
        self.bijective, self.context = model.bijective, model.context
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """F(x) of the watched model."""
        return self._tensor("forward", x, lambda: self.model(x.clone()))

    def inverse(self, z: Tensor) -> Tensor:
        """F^-1(z) of the watched model."""
        x = self._tensor("inverse", z, lambda: self.model.inverse(z.clone()))
        if self.data_shape is not None and x.shape[1:] != self.data_shape:
            shapes = f"{tuple(x.shape)}, expected {(len(z), *self.data_shape)}, the shape of x"
            raise ModelError(f"inverse of {self.label} returns shape {shapes}")
        return x

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F(x) and log|det J| of the watched model."""
        return self._named("forward", lambda: self.model.forward_and_log_det(x.clone()))

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """F^-1(z) and log|det J^-1| of the watched model."""
        return self._named("inverse", lambda: self.model.inverse_and_log_det(z.clone()))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of the watched model."""
        return self._named("log_prob", lambda: self.model.log_prob(x.clone()))

    def layers(self) -> tuple[Invertible, ...]:
        """The watched model's layers, watched."""
        layers = self._named("layers()", self.model.layers)
        return tuple(
            AuditedModel(layer, f"layer {k} ({layer.name})") for k, layer in enumerate(layers)
        )

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The watched model's tangent, watched."""
        return _WatchedTangent(
            self, self._named("forward", lambda: self.model.linearize(x.clone()))
        )

    def overwrites(self, t: Tensor, *, inverse: bool = False) -> bool:
        """Whether a call writes into the tensor it is given, or frees its memory."""
        given = t.clone()
        self._named(
            "inverse" if inverse else "forward",
            lambda: (self.model.inverse if inverse else self.model)(given),
        )
        # a tensor whose memory is gone must not even be read
        return (
            given.shape != t.shape
            or given.untyped_storage().nbytes() == 0
            or not torch.equal(given, t)
        )

    def with_cached_conditioner(self, state: Tensor) -> AuditedModel:
        """The watched model, primed, watched."""
        with_cached_conditioner = self._named(
            "forward", lambda: self.model.with_cached_conditioner(state)
        )
        return self if with_cached_conditioner is self.model else self._of(with_cached_conditioner)

    def with_context(self, context: Context) -> AuditedModel:
        """The same map with another context, watched."""
        return self._of(self.model.with_context(context))

    def select(self, rows: Tensor) -> AuditedModel:
        """The same map for some rows of the batch, watched."""
        return self._of(self.model.select(rows))

    def to_dtype(self, dtype: torch.dtype) -> AuditedModel:
        """A copy in another dtype, watched."""
        what = f"conversion to {str(dtype).removeprefix('torch.')}"
        return self._of(self._named(what, lambda: self.model.to_dtype(dtype)))

    @property
    def block(self) -> nn.Module:
        """The block of the watched model."""
        return self.model.block

    @property
    def name(self) -> str:
        """The name of the watched model."""
        return self.model.name

    def _of(self, model: Invertible) -> AuditedModel:
        """A variant of the watched model, watched alike."""
        twin = AuditedModel(model, self.label, trained=self.trained)
        twin.data_shape, twin.shares = self.data_shape, self.shares
        return twin

    def _tensor(self, what: str, given: Tensor, call: Callable[[], Any]) -> Tensor:
        value = self._named(what, call)
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{what} of {self.label} returns {type(value).__name__}, expected one tensor (B, ...)"
            )
        if value.dim() < 2 or len(value) != len(given):
            shapes = f"{tuple(value.shape)} for {tuple(given.shape)}"
            raise ModelError(f"{what} of {self.label} returns shape {shapes}, expected (B, ...)")
        if not value.is_floating_point():
            raise ModelError(
                f"{what} of {self.label} returns {value.dtype}, expected real floating-point numbers"
            )
        if value.device != given.device:
            raise ModelError(
                f"{what} of {self.label} returns a tensor on {value.device} for one on {given.device}"
            )
        return value

    def _named(self, what: str, call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except (NotApplicable, ModelError):
            raise
        except NotImplementedError as error:
            raise NotApplicable(f"{self.label} has no {what}: {_described(error)}") from error
        except Exception as error:  # whatever a foreign library raises is a finding about the model
            raise ModelError(f"{what} of {self.label} raises {_described(error)}") from error


class _WatchedTangent:
    """A tangent whose exceptions say which layer's derivative they come from."""

    def __init__(self, owner: AuditedModel, tangent: LayerJacobian) -> None:
        self._owner, self._tangent = owner, tangent
        self.output = tangent.output

    def jvp(self, v: Tensor) -> Tensor:
        return self._owner._named("the derivative J v", lambda: self._tangent.jvp(v))

    def vjp(self, u: Tensor) -> Tensor:
        return self._owner._named("the derivative J^T u", lambda: self._tangent.vjp(u))

    def inverse_jvp(self, u: Tensor) -> Tensor:
        return self._owner._named("the derivative J^-1 u", lambda: self._tangent.inverse_jvp(u))

    def inverse_vjp(self, v: Tensor) -> Tensor:
        return self._owner._named("the derivative J^-T v", lambda: self._tangent.inverse_vjp(v))


def _described(error: BaseException) -> str:
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__

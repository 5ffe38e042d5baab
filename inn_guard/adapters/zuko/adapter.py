"""zuko: lazy transformations and flows as Invertibles. Its forward is data -> latent, as ours.

A lazy object builds its transformation anew from the context at every call, so that is what is wrapped, never the
transformation that it built.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from zuko.flows.continuous import FFJTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.lazy import Flow, LazyComposedTransform, LazyInverse, LazyTransform
from zuko.transforms import ComposedTransform

from inn_guard.adapters import torch_transforms as distributions
from inn_guard.adapters.base import Adapted
from inn_guard.adapters.cached_network import CachedNetwork
from inn_guard.adapters.zuko import jacobians  # noqa: F401 - registers them
from inn_guard.core.invertible import Context, Invertible, map_tensors
from inn_guard.layers.chain import Chain
from inn_guard.layers.inverted import InverseLayer

__all__ = ["ZukoFlow", "ZukoTransform", "adapt"]


def adapt(model: Any, context: Context = None) -> Invertible:
    """A Flow, a lazy transformation or a context-free transformation of zuko as an Invertible.

    Args:
        model: the lazy object itself, not what ``model(c)`` returns.
        context: c, (B, C).

    Raises:
        TypeError: if the model is none of these.
    """
    if isinstance(model, Flow):
        return ZukoFlow(model, context)
    if isinstance(model, LazyTransform):
        return (
            ZukoOde(model, context)
            if isinstance(model, FFJTransform)
            else ZukoTransform(model, context)
        )
    if isinstance(model, Transform) and not _closes_over_networks(model):
        return _plain(model, context)
    built = isinstance(model, (Transform, Distribution))
    reason = "which was built from a lazy object" if built else "which transforms nothing"
    raise TypeError(
        f"expected a Flow or LazyTransform of zuko, got {type(model).__name__}, {reason}; "
        "type wrap(flow, context=c) with the lazy flow itself instead"
    )


class ZukoTransform(Adapted):
    """One lazy transformation; composed and inverse ones are opened by ``layers()``."""

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if _solves_odes(self.module):
            return _solved(self.layers() or (self,), x)
        return self._transform().call_and_ladj(x)  # type: ignore[attr-defined]

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if _solves_odes(self.module):
            return _solved([InverseLayer(layer) for layer in reversed(self.layers() or (self,))], z)
        return self._transform().inv.call_and_ladj(z)  # type: ignore[attr-defined]

    def layers(self) -> tuple[Invertible, ...]:
        """The lazy transformations inside composed ones, flat, in this map's context; () for one that is single."""
        if not isinstance(self.module, (LazyComposedTransform, LazyInverse)):
            return ()
        return tuple(layer.with_context(self.context) for layer in _chain(self.module))

    def with_cached_conditioner(self, state: Tensor) -> ZukoTransform:
        """A coupling with its network evaluated once, at the features of ``state`` that it leaves as they are."""
        coupling = self.module
        if not isinstance(coupling, GeneralCouplingTransform):
            return self
        kept = state[..., coupling.mask]
        joined = kept if self.context is None else torch.cat([kept, self.context], dim=-1)
        twin = copy.copy(coupling)
        known = CachedNetwork(coupling.hyper, coupling.hyper(joined))
        vars(twin)["_modules"] = {**coupling._modules, "hyper": known}
        return ZukoTransform(twin, self.context)

    def _transform(self) -> Transform:
        return self.module(self.context)


class ZukoFlow(ZukoTransform):
    """A Flow: its lazy transformation and its base distribution, both in the context."""

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,), by the flow's own base distribution."""
        z, log_det = self.forward_and_log_det(x)
        return self.module.base(self.context).log_prob(z) + log_det  # type: ignore[operator]

    def layers(self) -> tuple[Invertible, ...]:
        """The flow's lazy transformations, flat, in its context."""
        return tuple(layer.with_context(self.context) for layer in _chain(self.module.transform))  # type: ignore[arg-type]

    def _transform(self) -> Transform:
        return self.module.transform(self.context)  # type: ignore[operator]


class ZukoOde(ZukoTransform):
    """A free-form Jacobian transformation. The library's solver never returns from NaN or Inf; here they become NaN."""

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._guarded(lambda part, rows: rows.call_and_ladj(part), x)

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._guarded(lambda part, rows: rows.inv.call_and_ladj(part), z)

    def _guarded(
        self, solve: Callable[[Tensor, Any], tuple[Tensor, Tensor]], x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The solution of the finite samples; NaN for the others, and for all if the field itself is not finite."""
        finite = x.flatten(1).isfinite().all(1)
        inputs = x[finite]
        y, log_det = x * torch.nan, x[:, 0] * torch.nan
        if not len(inputs):
            return y, log_det
        context = (
            self.context if bool(finite.all()) else map_tensors(self.context, lambda c: c[finite])
        )
        transform = self.module(context)
        transform.f = _finite_only(transform.f)
        try:
            solution, inner = solve(inputs, transform)
        except _NotFiniteError:
            return y, log_det
        if bool(finite.all()):
            return solution, inner
        return y.index_put((finite,), solution), log_det.index_put((finite,), inner)


class _NotFiniteError(ArithmeticError):
    """The field of an ODE is NaN or Inf."""


def _finite_only(field: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def checked(*arguments: Tensor) -> Tensor:
        value = field(*arguments)
        if not bool(value.isfinite().all()):
            raise _NotFiniteError
        return value

    return checked


def _solved(layers: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Layer by layer, because a solver inside the library's own composition would not return from NaN."""
    total = x.new_zeros(len(x))
    for layer in layers:
        x, log_det = layer.forward_and_log_det(x)
        total = total + log_det
    return x, total


def _chain(transform: nn.Module) -> tuple[Invertible, ...]:
    if isinstance(transform, LazyComposedTransform):
        return tuple(layer for part in transform.transforms for layer in _chain(part))
    if isinstance(transform, LazyInverse):
        return tuple(InverseLayer(layer) for layer in reversed(_chain(transform.transform)))
    return (
        ZukoOde(transform) if isinstance(transform, FFJTransform) else ZukoTransform(transform),
    )


def _solves_odes(module: nn.Module) -> bool:
    return any(isinstance(part, FFJTransform) for part in module.modules())


def _closes_over_networks(transform: Any) -> bool:
    """Whether a transformation holds functions, whose modules nobody could see, copy or convert."""
    parts = [
        *getattr(transform, "transforms", ()),
        *(vars(transform).get(name) for name in ("base", "_inv")),
    ]
    if any(isinstance(part, Transform) and _closes_over_networks(part) for part in parts):
        return True
    return any(callable(vars(transform).get(name)) for name in ("meta", "f", "g"))


def _plain(transform: Transform, context: Context) -> Invertible:
    if isinstance(transform, ComposedTransform):
        return Chain(*[_plain(part, context) for part in transform.transforms])
    return distributions.adapt(transform, context)

"""zuko: lazy transformations and flows as Invertibles. Its forward is data -> latent, as here.

A lazy object builds its transformation anew from the context at every call. So the lazy object is
wrapped, never the transformation that it built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.continuous import FFJTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.lazy import Flow, LazyComposedTransform, LazyInverse, LazyTransform
from zuko.transforms import ComposedTransform

from inn_guard.adapters import torch_transforms
from inn_guard.adapters.base import Adapted
from inn_guard.adapters.cached_network import CachedNetwork, with_modules
from inn_guard.adapters.zuko import jacobians  # noqa: F401 - registers them
from inn_guard.core.base import BaseDistribution
from inn_guard.core.invertible import Context, Invertible, map_tensors
from inn_guard.core.readable import is_plain, runs_code_of
from inn_guard.core.tensors import finite_rows
from inn_guard.layers.chain import Chain
from inn_guard.layers.inverted import inverse_chain

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
    if isinstance(model, FFJTransform):
        return ZukoOde(model, context)
    if isinstance(model, LazyTransform):
        return ZukoTransform(model, context)
    if isinstance(model, Transform) and not _closes_over_networks(model):
        return _plain(model, context)
    reason = "which transforms nothing"
    if isinstance(model, (Transform, Distribution)):
        reason = "which was built from a lazy object"
    raise TypeError(
        f"expected a Flow or LazyTransform of zuko, got {type(model).__name__}, {reason}; "
        "call wrap(flow, context=c) with the lazy flow itself"
    )


class ZukoTransform(Adapted):
    """One lazy transformation; ``layers()`` opens composed and inverse ones."""

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if _solves_odes(self.module):
            return _by_layer(self._own_layers(), x)
        return self._transform().call_and_ladj(x)  # type: ignore[attr-defined]

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if _solves_odes(self.module):
            return _by_layer(inverse_chain(self._own_layers()), z)
        return self._transform().inv.call_and_ladj(z)  # type: ignore[attr-defined]

    def _expects_context(self) -> bool:
        return any(_has_context_inputs(part) for part in self.module.modules())

    def layers(self) -> tuple[Invertible, ...]:
        """The transformations inside a composed one, flat, in this context; () for a single one."""
        if not _is_container(self.module):
            return ()
        return self._in_context(_chain(self.module))

    def _own_layers(self) -> tuple[Invertible, ...]:
        return self.layers() or (self,)

    def with_cached_conditioner(self, state: Tensor) -> ZukoTransform:
        """A coupling with its network evaluated once, at the identity features of ``state``."""
        coupling: Any = self.module
        if not is_plain(coupling, GeneralCouplingTransform):
            return self
        inputs = state[..., coupling.mask]
        if self.context is not None:
            inputs = torch.cat([inputs, self.context], dim=-1)
        network = CachedNetwork(coupling.hyper, coupling.hyper(inputs))
        return ZukoTransform(with_modules(coupling, {"hyper": network}), self.context)

    def _transform(self) -> Transform:
        return self.module(self.context)


class ZukoFlow(ZukoTransform):
    """A Flow: its lazy transformation and its base distribution, both in the context."""

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,), with the flow's own base distribution in its own context."""
        z, log_det = self.forward_and_log_det(x)
        return self._base_log_prob(z) + log_det

    def _base_log_prob(self, z: Tensor) -> Tensor:
        return self._distribution(self.context).base.log_prob(z)

    def base(self) -> BaseDistribution:
        """The flow's own distribution of z, in its own context."""

        def sampler(n: int, context: Context) -> Tensor:
            distribution = self._distribution(context).base
            shape = (n,) if context is None else ()
            if distribution.has_rsample:
                # as the library itself samples: its sample() may round differently
                return distribution.rsample(shape)
            return distribution.sample(shape)

        own = self._distribution(self.context).base
        return BaseDistribution(
            sampler,
            like=self._like(),
            context=self.context,
            exact_deviation=_common_deviation(own),
            description=f"{type(own).__name__} of zuko",
            log_density=self._base_log_prob,
        )

    def layers(self) -> tuple[Invertible, ...]:
        """The flow's lazy transformations, flat, in its context."""
        flow: Any = self.module
        return self._in_context(_chain(flow.transform))

    def _transform(self) -> Transform:
        flow: Any = self.module
        return flow.transform(self.context)

    def _distribution(self, context: Context) -> Any:
        return self.module(context)


class ZukoOde(ZukoTransform):
    """A free-form Jacobian transformation.

    The library's solver never returns from NaN or Inf. Here such samples become NaN without being
    solved.
    """

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._solve(lambda rows, transform: transform.call_and_ladj(rows), x)

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._solve(lambda rows, transform: transform.inv.call_and_ladj(rows), z)

    def _solve(
        self, solve: Callable[[Tensor, Any], tuple[Tensor, Tensor]], x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The solution of the finite samples; NaN for the others, or for all."""
        finite = finite_rows(x)
        inputs = x[finite]
        # products with x: the result has a gradient even if nothing is solved
        y, log_det = x * torch.nan, x[:, 0] * torch.nan
        if not len(inputs):
            return y, log_det
        all_finite = bool(finite.all())
        context = self.context
        if not all_finite:
            context = map_tensors(context, lambda c: c[finite])
        transform = self.module(context)
        transform.f = _finite_only(transform.f)
        try:
            solution, inner = solve(inputs, transform)
        except _NotFiniteError:
            return y, log_det
        if all_finite:
            return solution, inner
        return y.index_put((finite,), solution), log_det.index_put((finite,), inner)


class _NotFiniteError(ArithmeticError):
    """The field of an ODE is NaN or Inf."""


def _finite_only(field: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The field of an ODE, which raises where it is not finite: the solver would never return."""

    def checked(*arguments: Tensor) -> Tensor:
        value = field(*arguments)
        if not bool(value.isfinite().all()):
            raise _NotFiniteError
        return value

    return checked


def _by_layer(layers: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """z and log_det, layer by layer: a solver inside the library's composition may never return."""
    total = x.new_zeros(len(x))
    for layer in layers:
        x, log_det = layer.forward_and_log_det(x)
        total = total + log_det
    return x, total


def _is_container(transform: nn.Module) -> bool:
    """Whether it is a composed or inverse transformation with the library's own code."""
    for kind in (LazyComposedTransform, LazyInverse):
        if runs_code_of(transform, kind, ("__call__", "forward")):
            return True
    return False


def _chain(transform: nn.Module) -> tuple[Invertible, ...]:
    """The layers of a lazy transformation, containers of the library opened."""
    if not _is_container(transform):
        if isinstance(transform, FFJTransform):
            return (ZukoOde(transform),)
        return (ZukoTransform(transform),)
    if isinstance(transform, LazyComposedTransform):
        layers: list[Invertible] = []
        for part in transform.transforms:
            layers += _chain(part)
        return tuple(layers)
    inverse: Any = transform
    return inverse_chain(_chain(inverse.transform))


def _solves_odes(module: nn.Module) -> bool:
    return any(isinstance(part, FFJTransform) for part in module.modules())


def _has_context_inputs(part: Any) -> bool:
    """Whether a transformation's network has more inputs than there are features for it."""
    network = getattr(part, "hyper", None)
    if not isinstance(network, nn.Module):
        return False
    # zuko's own linear maps are no nn.Linear
    widths: list[int] = []
    for layer in network.modules():
        if hasattr(layer, "in_features"):
            widths.append(layer.in_features)  # type: ignore[arg-type]
    if not widths:
        return False
    inputs = widths[0]
    if isinstance(part, GeneralCouplingTransform):
        return inputs > int(part.mask.sum())
    if isinstance(part, MaskedAutoregressiveTransform):
        return part.order is not None and inputs > len(part.order)
    # what is transformed elementwise has a network only if it has a context
    return True


def _common_deviation(base: Distribution) -> Tensor | None:
    """Standard deviation of one draw, (*latent), if it is the same in every row of the context."""
    deviation = torch_transforms.exact_deviation(base)
    if deviation is None:
        return None
    rows = deviation.reshape(-1, *base.event_shape)
    if not bool((rows == rows[:1]).all()):
        return None
    return rows[0]


def _closes_over_networks(transform: Any) -> bool:
    """Whether a transformation holds functions, whose modules could not be copied."""
    attributes = vars(transform)
    parts = [*getattr(transform, "transforms", ()), attributes.get("base"), attributes.get("_inv")]
    for part in parts:
        if isinstance(part, Transform) and _closes_over_networks(part):
            return True
    # where zuko's transformations keep the functions that they are built from
    return any(callable(vars(transform).get(name)) for name in ("meta", "f", "g"))


def _plain(transform: Transform, context: Context) -> Invertible:
    """A transformation that needs no context, opened if it is composed."""
    if isinstance(transform, ComposedTransform):
        return Chain(*[_plain(part, context) for part in transform.transforms])
    return torch_transforms.adapt(transform, context)

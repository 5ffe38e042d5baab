"""normflows' flow layers as Invertibles: the library's inverse, data -> latent, is forward here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from normflows.flows import AffineCouplingBlock, Composite, GlowBlock, MaskedAffineFlow, Reverse
from torch import Tensor, nn

from inn_guard.adapters.base import Adapted
from inn_guard.adapters.cached_network import CachedNetwork, with_modules
from inn_guard.adapters.normflows import jacobians  # noqa: F401 - registers them
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable
from inn_guard.core.readable import is_of_library, runs_code_of
from inn_guard.layers.inverted import inverse_chain

__all__ = ["NormflowsLayer", "chain_of", "chain_of_flows", "named_errors"]


class NormflowsLayer(Adapted):
    """One Flow of normflows; ``layers()`` opens Composite, Reverse and GlowBlock."""

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        flow: Any = self.module
        with named_errors(self.name):
            return flow.inverse(x, *self._condition())

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        with named_errors(self.name):
            return self.module(z, *self._condition())

    def layers(self) -> tuple[Invertible, ...]:
        """The flows inside a container, flat, from data to latent; () for a single flow."""
        if _is_container(self.module):
            return chain_of(self.module)
        return ()

    def with_cached_conditioner(self, state: Tensor) -> NormflowsLayer:
        """A coupling with its networks evaluated once, at the identity part of ``state``."""
        if not is_of_library(self.module, "normflows"):
            return self
        module = _with_cached_networks(self.module, state)
        if module is self.module:
            return self
        return NormflowsLayer(module, self.context)

    def _condition(self) -> tuple[Any, ...]:
        if self.context is None:
            return ()
        if len(inspect.signature(self.module.forward).parameters) < 2:
            raise TypeError(f"{self.name} takes no context, but one was given; leave it out")
        return (self.context,)


def chain_of(flow: Any) -> tuple[Invertible, ...]:
    """The layers of one flow from data to latent, containers opened."""
    if not _is_container(flow):
        return (NormflowsLayer(flow),)
    if isinstance(flow, Reverse):
        return inverse_chain(chain_of(flow.flow))
    if isinstance(flow, Composite):
        return chain_of_flows(flow._flows)
    return chain_of_flows(flow.flows)


def _is_container(flow: nn.Module) -> bool:
    """Whether it is a container with the library's own code in both directions."""
    for kind in (Composite, Reverse, GlowBlock):
        if runs_code_of(flow, kind, ("__call__", "forward", "inverse")):
            return True
    return False


def chain_of_flows(flows: Any) -> tuple[Invertible, ...]:
    """The layers of flows that are listed from latent to data, in the order data to latent."""
    layers: list[Invertible] = []
    for flow in reversed(list(flows)):
        layers += chain_of(flow)
    return tuple(layers)


def _with_cached_networks(flow: Any, state: Tensor) -> Any:
    """A coupling whose networks know their outputs; the flow itself if it is no such coupling."""
    if isinstance(flow, AffineCouplingBlock):
        split, coupling, merge = flow.flows
        (identity, _), _ = split(state)  # type: ignore[operator]
        cached = _evaluated(coupling, ("param_map",), identity)
        return with_modules(flow, {"flows": nn.ModuleList([split, cached, merge])})
    if isinstance(flow, MaskedAffineFlow):
        return _evaluated(flow, ("s", "t"), flow.b * state)
    return flow


def _evaluated(flow: Any, names: tuple[str, ...], identity: Tensor) -> Any:
    """The flow with its networks of these names evaluated at the identity part."""
    cached: dict[str, nn.Module] = {}
    for name in names:
        if name in flow._modules:
            network = flow._modules[name]
            cached[name] = CachedNetwork(network, network(identity))
    return with_modules(flow, cached)


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Give errors of the library that do not tell which flow raised them its name."""
    try:
        yield
    except NotImplementedError as error:
        reason = str(error) or "the library has not implemented this direction"
        raise NotApplicable(f"{name}: {reason}") from error
    except AssertionError as error:
        raise ValueError(
            f"{name}: an assertion of the library failed (a spline without a real root)"
        ) from error

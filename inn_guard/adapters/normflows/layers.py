"""normflows' flow layers as Invertibles, data -> latent: the library's inverse is our forward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from normflows.flows import AffineCouplingBlock, Composite, GlowBlock, MaskedAffineFlow, Reverse
from torch import Tensor, nn

from inn_guard.adapters.base import Adapted
from inn_guard.adapters.cached_network import CachedNetwork
from inn_guard.adapters.normflows import jacobians as tangents_normflows  # noqa: F401 - register bound rules and tangents
from inn_guard.core.invertible import Invertible, NotApplicable
from inn_guard.layers.inverted import InverseLayer

__all__ = ["NormflowsLayer", "chain_of", "named_errors"]


class NormflowsLayer(Adapted):
    """One Flow of normflows; Composite, Reverse and GlowBlock are opened by ``layers()``."""

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        with named_errors(self.name):
            return self.module.inverse(x, *self._condition())  # type: ignore[operator]

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        with named_errors(self.name):
            return self.module(z, *self._condition())

    def layers(self) -> tuple[Invertible, ...]:
        """The flows inside a container, flat, from data to latent; () for a flow that is none."""
        return (
            chain_of(self.module)
            if isinstance(self.module, (Composite, Reverse, GlowBlock))
            else ()
        )

    def with_cached_conditioner(self, state: Tensor) -> NormflowsLayer:
        """A coupling with its networks evaluated once, at the part of ``state`` that it leaves as it is."""
        module = _primed(self.module, state)
        return self if module is self.module else NormflowsLayer(module, self.context)

    def _condition(self) -> tuple[Any, ...]:
        if self.context is None:
            return ()
        if not _takes_context(self.module):
            raise TypeError(f"{self.name} takes no context, but one was given; leave it out")
        return (self.context,)


def chain_of(flow: Any) -> tuple[Invertible, ...]:
    """The layers of one flow from data to latent, containers opened."""
    if isinstance(flow, Reverse):
        return tuple(InverseLayer(layer) for layer in reversed(chain_of(flow.flow)))
    if isinstance(flow, (Composite, GlowBlock)):
        parts: Any = flow._flows if isinstance(flow, Composite) else flow.flows
        return tuple(layer for part in reversed(list(parts)) for layer in chain_of(part))
    return (NormflowsLayer(flow),)


def _takes_context(flow: nn.Module) -> bool:
    return len(inspect.signature(flow.forward).parameters) > 1


def _primed(flow: Any, state: Tensor) -> Any:
    """A shallow copy of a coupling whose networks know their outputs; the flow itself if it is no such coupling."""
    if isinstance(flow, AffineCouplingBlock):
        split, coupling, merge = flow.flows
        (kept, _), _ = split(state)  # type: ignore[operator]
        return _with_modules(
            flow, flows=nn.ModuleList([split, _evaluated(coupling, ("param_map",), kept), merge])
        )
    if isinstance(flow, MaskedAffineFlow):
        return _evaluated(flow, ("s", "t"), flow.b * state)
    return flow


def _evaluated(flow: Any, names: tuple[str, ...], kept: Tensor) -> Any:
    """The flow with the networks of these names evaluated at the kept part."""
    networks = {name: flow._modules[name] for name in names if name in flow._modules}
    return _with_modules(
        flow, **{name: CachedNetwork(network, network(kept)) for name, network in networks.items()}
    )


def _with_modules(flow: nn.Module, **modules: nn.Module) -> nn.Module:
    twin = copy.copy(flow)
    vars(twin)["_modules"] = {**flow._modules, **modules}
    return twin


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Errors that the library raises without saying of which flow get its name."""
    try:
        yield
    except NotImplementedError as error:
        raise NotApplicable(
            f"{name}: {str(error) or 'the library has not implemented this direction'}"
        ) from error
    except AssertionError as error:
        raise ValueError(
            f"{name}: an assertion of the library failed (a spline without a real root)"
        ) from error

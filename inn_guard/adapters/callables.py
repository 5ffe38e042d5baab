"""Pairs of callables and modules with forward and inverse methods as Invertibles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from inn_guard.adapters.base import Adapted
from inn_guard.adapters.captured_modules import Closure
from inn_guard.core.invertible import Context, Invertible
from inn_guard.layers.chain import Chain

__all__ = ["ForwardAndInverse", "Functions", "adapt"]


def adapt(model: nn.Module, context: Context = None) -> Invertible:
    """A module whose ``forward`` and ``inverse`` return a tensor or (tensor, log_det) as an Invertible."""
    return ForwardAndInverse(model, context)


class ForwardAndInverse(Adapted):
    """A module with ``forward(x)`` and ``inverse(z)``; with a context, ``forward(x, context)`` and so on."""

    missing_log_det = "forward and inverse of the module return no log-determinant"

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        return _split(self.module(*_arguments(x, self.context)), "forward")

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        return _split(self.module.inverse(*_arguments(z, self.context)), "inverse")  # type: ignore[operator]


class Functions(Adapted):
    """z = encode(x) and x = decode(z); every module that the callables use is registered.

    Args:
        encode: x -> z or x -> (z, log_det).
        decode: z -> x or z -> (x, log_det of the inverse).
        layers: the chain whose composition is ``encode``; () if it is not known.
        log_det: x -> log|det d encode(x)/dx|, where ``encode`` does not return it.
        context: handed to every callable as a second argument, unless None.
    """

    missing_log_det = (
        "the callables return no log-determinant: return (z, log_det) or give log_det=... to wrap"
    )

    def __init__(
        self,
        encode: Callable[..., Any],
        decode: Callable[..., Any],
        *,
        layers: Sequence[Invertible] = (),
        log_det: Callable[..., Any] | None = None,
        context: Context = None,
    ) -> None:
        closures = [
            Closure(function) for function in (encode, decode, log_det) if function is not None
        ]
        super().__init__(_registered(closures), context)
        self._encoder, self._decoder, *rest = closures
        self._log_det = rest[0] if rest else None
        self._chain = Chain(*layers)

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        return _split(self._encoder(*_arguments(x, self.context)), "encode")

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        return _split(self._decoder(*_arguments(z, self.context)), "decode")

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and its log-determinant (B,): what ``encode`` returns with z, else what ``log_det`` returns."""
        if self._log_det is None:
            return super().forward_and_log_det(x)
        return self.forward(x), self._as_log_det(
            self._log_det(*_arguments(x.clone(), self.context)), x
        )

    def layers(self) -> tuple[Invertible, ...]:
        """The chain given, flat, in this map's context; () if none was given."""
        return (
            self._chain.layers()
            if self.context is None
            else self._chain.with_context(self.context).layers()
        )

    @property
    def block(self) -> nn.Module:
        """Itself: the callables are all there is."""
        return self


def _arguments(x: Tensor, context: Context) -> tuple[Any, ...]:
    return (x,) if context is None else (x, context)


def _split(result: Any, name: str) -> tuple[Tensor, Any]:
    """A callable's result as (tensor, log_det or None)."""
    if isinstance(result, Tensor):
        return result, None
    if isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[0], Tensor):
        return result[0], result[1]
    got = type(result).__name__ + (
        f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
    )
    raise TypeError(
        f"expected {name} to return one tensor or (tensor, log_det), got a {got}; "
        f"type wrap(encode=lambda x: ..., decode=lambda z: ...) that picks those out instead"
    )


def _registered(closures: Sequence[Closure]) -> nn.ModuleList:
    found = {id(module): module for closure in closures for module in closure.modules()}
    modules = nn.ModuleList(found.values())
    modules.training = any(module.training for module in found.values())
    return modules

"""Pairs of callables and modules with forward and inverse methods as Invertibles."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from inn_guard.adapters.base import Adapted
from inn_guard.adapters.captured_modules import Closure
from inn_guard.core.invertible import Context, Invertible
from inn_guard.layers.chain import Chain

__all__ = [
    "TIMES",
    "ForwardAndInverse",
    "Functions",
    "adapt",
    "is_called_like_a_velocity",
    "value_and_log_det",
    "velocity_within",
]

#: what arguments for the time are called
TIMES = ("t", "time", "times", "timestep", "timesteps", "ts")
#: attributes in which solvers and neural differential equations hold a velocity
VELOCITIES = ("vf", "velocity_model", "vector_field", "velocity", "odefunc", "ode_func")


def adapt(model: nn.Module, context: Context = None) -> Invertible:
    """A module whose ``forward`` and ``inverse`` return a tensor or (tensor, log_det)."""
    return ForwardAndInverse(model, context)


class ForwardAndInverse(Adapted):
    """A module with ``forward(x)`` and ``inverse(z)``; with a context, ``forward(x, context)``."""

    missing_log_det = "forward and inverse of the module return no log-determinant"

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        result = self.module(*_arguments(x, self.context))
        return value_and_log_det(result, "forward")

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        inverse: Any = self.module.inverse
        result = inverse(*_arguments(z, self.context))
        return value_and_log_det(result, "inverse")


class Functions(Adapted):
    """z = encode(x) and x = decode(z); every module that the callables use is registered.

    Args:
        encode: x -> z or x -> (z, log_det).
        decode: z -> x or z -> (x, log_det of the inverse).
        layers: the chain whose composition is ``encode``; () if it is not known.
        log_det: x -> log|det d encode(x)/dx|, if ``encode`` does not return it.
        context: passed to every callable as a second argument. Default: none is passed.
    """

    missing_log_det = (
        "the callables return no log-determinant: return (z, log_det) or pass log_det=... to wrap"
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
        encoder, decoder = Closure(encode), Closure(decode)
        closures = [encoder, decoder]
        log_det_closure = None
        if log_det is not None:
            log_det_closure = Closure(log_det)
            closures.append(log_det_closure)
        super().__init__(_registered(closures), context)
        self._encoder = encoder
        self._decoder = decoder
        self._log_det = log_det_closure
        self._chain = Chain(*layers)

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        return value_and_log_det(self._encoder(*_arguments(x, self.context)), "encode")

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        return value_and_log_det(self._decoder(*_arguments(z, self.context)), "decode")

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and its log-determinant, (B,): by ``log_det`` if it was given, else by ``encode``."""
        if self._log_det is None:
            return super().forward_and_log_det(x)
        log_det = self._log_det(*_arguments(x.clone(), self.context))
        return self.forward(x), self._as_log_det(log_det, x)

    def layers(self) -> tuple[Invertible, ...]:
        """The given chain, flat, in this map's context; () if none was given."""
        if self.context is None:
            return self._chain.layers()
        return self._chain.with_context(self.context).layers()

    @property
    def block(self) -> nn.Module:
        """Itself: there is no foreign module."""
        return self


def value_and_log_det(result: Any, direction: str) -> tuple[Tensor, Any]:
    """A callable's result as (tensor, log_det or None).

    Raises:
        TypeError: if it is neither a tensor nor (tensor, log_det) with one number per sample.
    """
    if isinstance(result, Tensor):
        return result, None
    if isinstance(result, (tuple, list)):
        if _looks_like_several_latents(result):
            shapes = ", ".join(str(tuple(part.shape)) for part in result)
            raise TypeError(
                f"expected {direction} to return one tensor or (tensor, log_det) with log_det of "
                f"shape (B,), got tensors of shapes {shapes}: it looks like several latents: "
                "concatenate them, torch.cat([z.flatten(1) for z in latents], dim=1), and split "
                "them again in the inverse"
            )
        if len(result) == 2 and isinstance(result[0], Tensor):
            return result[0], result[1]
    got = type(result).__name__
    if isinstance(result, (tuple, list)):
        got += f" of {len(result)}"
    raise TypeError(
        f"expected {direction} to return one tensor or (tensor, log_det), got a {got}; "
        "pass wrap(encode=..., decode=...) two functions that return only those"
    )


def velocity_within(model: Any) -> str | None:
    """The attribute of a solver or a neural differential equation that holds its velocity."""
    return next((name for name in VELOCITIES if callable(getattr(model, name, None))), None)


def is_called_like_a_velocity(model: Any) -> bool:
    """Whether one of the first two arguments of a module's call is a time."""
    try:
        names = list(inspect.signature(model.forward).parameters)[:2]
    except (AttributeError, TypeError, ValueError):
        return False
    return len(names) == 2 and any(name in TIMES for name in names)


def _looks_like_several_latents(result: Sequence[Any]) -> bool:
    """Whether these are tensors with several numbers per sample; a log-determinant has one."""
    if len(result) < 2 or not all(isinstance(part, Tensor) for part in result):
        return False
    return any(part.dim() > 1 and part.shape[1:].numel() > 1 for part in result[1:])


def _arguments(x: Tensor, context: Context) -> tuple[Any, ...]:
    if context is None:
        return (x,)
    return (x, context)


def _registered(closures: Sequence[Closure]) -> nn.ModuleList:
    """All modules that the callables use, each once; in training mode if one of them is."""
    found: dict[int, nn.Module] = {}
    for closure in closures:
        for module in closure.modules():
            found[id(module)] = module
    modules = nn.ModuleList(found.values())
    modules.training = any(module.training for module in found.values())
    return modules

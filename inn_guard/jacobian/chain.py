"""Linearization: one forward pass with every layer's state kept, then Jacobian products chained at those states.

J = J_n ... J_1 and J^-1 = J_1^-1 ... J_n^-1 with every factor taken where the *forward* pass was. The numerical
inverse of the whole chain is never run, so J^-1 v stays right where F^-1(F(x)) is already NaN. Products of many
layers leave the range of floats; each is therefore carried as a unit vector and the logarithm of its length.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import AutogradJacobian, LayerJacobian, Selectable, random_vectors
from inn_guard.jacobian.allocator import retain_freed_memory
from inn_guard.jacobian.checks import check_inverse, check_inverse_jvp, check_jvp
from inn_guard.jacobian.network import is_unpatched

__all__ = ["Linearization", "LogScaledVector"]

Step = Callable[[Tensor], Tensor]
Check = Callable[
    ..., LayerJacobian
]  #: (tangent, x, name, *, draw) -> the tangent itself, or a better one

FEW = 4  #: samples whose products are compared for a layer that treats every sample alike


@dataclass(frozen=True)
class LogScaledVector:
    """vector * exp(log_scale) per sample: vector (B, *) of unit or zero length, log_scale (B,) float64, in nats."""

    vector: Tensor
    log_scale: Tensor

    @classmethod
    def from_vector(cls, vector: Tensor) -> LogScaledVector:
        """``vector`` (B, *) split into direction and logarithm of its length."""
        return cls(
            vector, torch.zeros(len(vector), dtype=torch.float64, device=vector.device)
        ).normalized()

    def renormalized(self) -> LogScaledVector:
        """The same vectors with entries far inside the range of their dtype, what was beyond moved into the logarithm.

        Nothing is done where all largest entries are in range already, which costs one pass. Zero and non-finite
        vectors stay as they are.
        """
        peak = torch.linalg.vector_norm(
            self.vector, ord=torch.inf, dim=tuple(range(1, self.vector.dim()))
        )
        if bool(_in_range(peak).all()):
            return self
        peak = torch.where((peak > 0) & peak.isfinite(), peak, torch.ones_like(peak))
        return LogScaledVector(
            self.vector / _broadcast(peak, self.vector), self.log_scale + peak.double().log()
        )

    def normalized(self) -> LogScaledVector:
        """The same vectors, lengths moved into the logarithm; zero and non-finite vectors stay as they are."""
        # the largest entry first: the square of a float32 above 1e19 is infinite
        scaled = self.renormalized()
        length = scaled.vector.flatten(1).norm(dim=1)
        length = torch.where((length > 0) & length.isfinite(), length, torch.ones_like(length))
        vector = scaled.vector / _broadcast(length, scaled.vector)
        return LogScaledVector(vector, scaled.log_scale + length.double().log())

    def log_norm(self) -> Tensor:
        """Natural logarithm of the length, (B,) float64: -inf for a zero vector, nan for a non-finite one."""
        return self.log_scale + self.vector.flatten(1).double().norm(dim=1).log()

    def value(self) -> Tensor:
        """The vectors themselves, in float64; entries beyond its range are 0 or inf."""
        return self.vector.double() * _broadcast(self.log_scale.exp(), self.vector)


class Linearization:
    """The layers of a model linearised along one forward pass over x.

    Args:
        model: the map; a model without layers() is one layer.
        x: data, (B, *data).

    Attributes:
        layers: the layers, first one first.
        states: the layers' inputs and last the output, n + 1 tensors, detached.
        tangents: the layers' linear maps at ``states``.
    """

    def __init__(self, model: Invertible, x: Tensor) -> None:
        retain_freed_memory()
        self.layers = model.layers() or (model,)
        self.states = [x.detach()]
        self.tangents: list[LayerJacobian] = []
        self._leaves_range = False
        self._drawn: dict[Any, list[Tensor]] = {}
        self._forward_checked: set[int] = set()
        self._returning_checked: set[int] = set()
        self._inverse_checked: set[int] = set()
        for layer in self.layers:
            x = self.states[-1]
            tangent = (
                layer.linearize(x)
                if is_unpatched(layer.block)
                else AutogradJacobian(layer, layer.inverse, x)
            )
            self.tangents.append(tangent)
            self.states.append(tangent.output)

    @property
    def output(self) -> Tensor:
        """z = F(x), (B, *latent)."""
        return self.states[-1]

    def jvp(self, v: Tensor | LogScaledVector) -> LogScaledVector:
        """J v for one v (B, *data) per sample.

        Raises:
            NotApplicable: if a layer has no correct forward-mode derivative and is too large to do without.
        """
        return self._chain(v, [self.forward_checked(k).jvp for k in range(len(self.tangents))])

    def vjp(self, u: Tensor | LogScaledVector) -> LogScaledVector:
        """J^T u for one u (B, *latent) per sample."""
        return self._chain(u, [tangent.vjp for tangent in reversed(self.tangents)])

    def inverse_jvp(self, u: Tensor | LogScaledVector) -> LogScaledVector:
        """J^-1 u for one u (B, *latent) per sample.

        Raises:
            NotApplicable: if a layer's inverse has no correct derivative (measured: J^-1 J v is not v).
        """
        return self._chain(
            u, [self.inverse_checked(k).inverse_jvp for k in reversed(range(len(self.tangents)))]
        )

    def inverse_vjp(self, v: Tensor | LogScaledVector) -> LogScaledVector:
        """J^-T v for one v (B, *data) per sample.

        Raises:
            NotApplicable: if a layer's inverse has no correct derivative (measured: J^-1 J v is not v).
        """
        return self._chain(
            v, [self.inverse_checked(k).inverse_vjp for k in range(len(self.tangents))]
        )

    def forward_checked(self, k: int) -> LayerJacobian:
        """Layer k's tangent, its J v having been checked once against its J^T u."""
        if k not in self._forward_checked:
            self.tangents[k] = self._checked(k, check_jvp)
            self._forward_checked.add(k)
        return self.tangents[k]

    def inverse_jvp_checked(self, k: int) -> LayerJacobian:
        """Layer k's tangent, its J^-1 u having been checked once against its J v; its J^-T v is not looked at."""
        if k not in self._returning_checked:
            self.forward_checked(k)
            self.tangents[k] = self._checked(k, check_inverse_jvp)
            self._returning_checked.add(k)
        return self.tangents[k]

    def inverse_product(self, k: int) -> Step:
        """u -> J^-1 u of layer k, checked once."""
        return self.inverse_jvp_checked(k).inverse_jvp

    def inverse_checked(self, k: int) -> LayerJacobian:
        """Layer k's tangent, its inverse maps having been checked once against its forward maps."""
        if k not in self._inverse_checked:
            self.forward_checked(k)
            self.tangents[k] = self._checked(k, check_inverse)
            self._inverse_checked.add(k)
            self._returning_checked.add(k)
        return self.tangents[k]

    def select(self, rows: Tensor) -> Linearization | None:
        """The same linearization of these samples only; None where a layer's tangent cannot be taken apart."""
        tangents = [
            tangent.select(rows) if isinstance(tangent, Selectable) else None
            for tangent in self.tangents
        ]
        chosen = [tangent for tangent in tangents if tangent is not None]
        if len(chosen) < len(tangents):
            return None
        twin = copy.copy(self)
        twin.tangents, twin.states = chosen, [state[rows] for state in self.states]
        # what was checked for all samples was checked for these
        twin._forward_checked, twin._returning_checked = (
            set(self._forward_checked),
            set(self._returning_checked),
        )
        twin._inverse_checked = set(self._inverse_checked)
        return twin

    def _checked(self, k: int, check: Check) -> LayerJacobian:
        """What ``check`` makes of layer k's tangent; of one that can be taken apart a few samples speak for all."""
        tangent, x, name = self.tangents[k], self.states[k], self._label(k)
        few = (
            tangent.select(self._few) if isinstance(tangent, Selectable) and len(x) > FEW else None
        )
        if few is not None and check(few, x[self._few], name, draw=self._probes) is few:
            return tangent
        return check(tangent, x, name, draw=self._probes)

    @functools.cached_property
    def _few(self) -> Tensor:
        """Samples from all over the batch, of those that stay finite if there are any."""
        finite = self.output.flatten(1).isfinite().all(1)
        rows = (finite if bool(finite.any()) else torch.ones_like(finite)).nonzero()[:, 0]
        return rows[torch.linspace(0, len(rows) - 1, FEW, device=rows.device).round().long()]

    def _chain(self, v: Tensor | LogScaledVector, steps: Sequence[Step]) -> LogScaledVector:
        scaled = v if isinstance(v, LogScaledVector) else LogScaledVector.from_vector(v)
        if not self._leaves_range:
            vector, lengths = scaled.vector, []
            for step in steps:
                vector = step(vector)
                lengths.append(torch.linalg.vector_norm(vector, dim=tuple(range(1, vector.dim()))))
            if bool(_in_range(torch.stack(lengths)).all()):
                return LogScaledVector(vector, scaled.log_scale).normalized()
            self._leaves_range = True
        for step in steps:
            scaled = LogScaledVector(step(scaled.vector), scaled.log_scale).renormalized()
        return scaled.normalized()

    def _probes(self, *like: Tensor) -> list[Tensor]:
        """Those of `probes`, drawn once for all layers of the same shapes."""
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in like)
        if key not in self._drawn:
            self._drawn[key] = probes(*like)
        return self._drawn[key]

    def _label(self, k: int) -> str:
        return f"layer {k} ({self.layers[k].name})"


def _in_range(size: Tensor) -> Tensor:
    """Whether vectors of this length, or largest entry, are far from the ends of their dtype's range."""
    far = torch.finfo(size.dtype).max ** 0.25
    return (size > 1 / far) & (size < far)


def _broadcast(per_sample: Tensor, like: Tensor) -> Tensor:
    return per_sample.to(like.device).reshape(-1, *[1] * (like.dim() - 1))

"""Invertible: the one protocol that every adapter produces, every layer and model is, and every audit sees."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inn_guard.core.layer_jacobian import AutogradJacobian, LayerJacobian
from inn_guard.core.missing import NotApplicable

__all__ = [
    "Context",
    "Invertible",
    "NotApplicable",
    "as_log_det",
    "map_tensors",
    "standard_normal_log_prob",
]

Context = Any  #: a tensor (B, ...) or a (nested) tuple, list or dict of tensors, row-aligned with x, or None
Self = TypeVar("Self", bound="Invertible")


class Invertible(nn.Module, abc.ABC):
    """A differentiable map with an inverse. forward: data x -> latent z, always; inverse: z -> x.

    x has shape (B, *data), z has shape (B, *latent), one tensor each, batch first; shape, dtype and device are those
    of the tensors. Several latents are flattened and concatenated. log_det is log|det d forward(x)/dx|, shape (B,),
    in nats.

    ``bijective``: inverse(forward(x)) = x and forward(inverse(z)) = z. A map that is injective only (dim z < dim x)
    sets it to False: then forward(inverse(z)) = z, and inverse(forward(x)) is a projection onto the image.

    How to implement one: inherit, write ``forward`` and ``inverse``; where there is a log-determinant, write
    ``forward_and_log_det`` (and ``inverse_and_log_det``); where it is a chain, return the chain from ``layers``.
    Anything that cannot be had raises NotApplicable with the reason.
    """

    bijective: bool = True
    context: Context = None

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """z = F(x): (B, *data) -> (B, *latent)."""

    @abc.abstractmethod
    def inverse(self, z: Tensor) -> Tensor:
        """x = F^-1(z): (B, *latent) -> (B, *data)."""

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F(x) and log|det dF(x)/dx| of shape (B,).

        Raises:
            NotApplicable: if the map has no log-determinant.
        """
        raise NotApplicable(f"{self.name} has no log-determinant")

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """F^-1(z) and log|det dF^-1(z)/dz| of shape (B,), as the model's own inverse computes it.

        Raises:
            NotApplicable: if the inverse has no log-determinant of its own.
        """
        raise NotApplicable(f"the inverse of {self.name} has no log-determinant of its own")

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) = log p(z) + log|det dF(x)/dx| in nats, shape (B,); a standard normal base unless overridden.

        Raises:
            NotApplicable: if the map has no log-determinant.
        """
        z, log_det = self.forward_and_log_det(x)
        return standard_normal_log_prob(z) + log_det

    def layers(self) -> tuple[Invertible, ...]:
        """The flat chain of layers whose composition, first one first, is ``forward``; () if the map is opaque."""
        return ()

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The four linear maps of this one layer at x: J v, J^T u, J^-1 v, J^-T u, by autograd unless overridden."""
        return AutogradJacobian(self.forward, self.inverse, x)

    def with_cached_conditioner(self: Self, state: Tensor) -> Self:
        """This layer with all that depends only on what it leaves unchanged computed once, at ``state``: x or z alike.

        ``with_cached_conditioner(x)`` maps x, and ``with_cached_conditioner(F(x))`` inverts F(x), as the layer itself does, without computing that again;
        itself unless overridden. Memory-saving backpropagation inverts and differentiates a primed layer with the one
        evaluation, which must be the layer's only one that draws random numbers or moves running statistics.
        """
        return self

    def with_context(self: Self, context: Context) -> Self:
        """The same map, sharing every parameter, with ``context`` (row-aligned with x) in place of its own."""
        twin = copy.copy(self)
        twin.context = context
        return twin

    def select(self: Self, rows: Tensor) -> Self:
        """The same map for those rows of the batch only: ``context`` is indexed by ``rows``, nothing else changes."""
        return self if self.context is None else self.with_context(select_rows(self.context, rows))

    def to_dtype(self: Self, dtype: torch.dtype) -> Self:
        """A copy whose parameters, buffers and context are of ``dtype``; the original is not touched."""
        # without its context: the output of an embedding net is no leaf of the graph and cannot be deep-copied
        twin = copy.deepcopy(self.with_context(None)).to(dtype)
        return (
            twin
            if self.context is None
            else twin.with_context(map_tensors(self.context, _caster(dtype)))
        )

    @property
    def block(self) -> nn.Module:
        """The module that is measured: self, or what an adapter wraps. Bound rules are looked up by its class."""
        return self

    @property
    def name(self) -> str:
        """What a report calls this map: the class name of its block."""
        return type(self.block).__name__


def as_log_det(value: Any, like: Tensor) -> Tensor:
    """A log-determinant of any shape or type as one number per sample, shape (B,), with the device of ``like``.

    A scalar (python, numpy, 0-dim or [1]) holds for every sample; [B] stays; [B, ...] is summed over the rest.

    Raises:
        NotApplicable: if ``value`` is None.
        ValueError: if its first dimension is neither 1 nor B.

    >>> as_log_det(0.5, torch.zeros(2, 3)).tolist()
    [0.5, 0.5]
    """
    if value is None:
        raise NotApplicable("the library returned no log-determinant (None)")
    batch = like.shape[0]
    if not isinstance(value, Tensor):
        value = torch.as_tensor(float(value), dtype=like.dtype, device=like.device)
    if value.numel() == 1:
        return value.reshape(1).expand(batch)
    if value.shape[0] != batch:
        raise ValueError(
            f"expected a log-determinant with {batch} entries, one per sample; got {tuple(value.shape)}"
        )
    return value.flatten(1).sum(1) if value.dim() > 1 else value


def standard_normal_log_prob(z: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch"]:
    """log N(z; 0, I) in nats, summed over all but the batch.

    >>> round(standard_normal_log_prob(torch.zeros(1, 2)).item(), 4)
    -1.8379
    """
    flat = z.flatten(1)
    return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))


def select_rows(context: Context, rows: Tensor) -> Context:
    """``context`` with every tensor in it indexed by ``rows`` along its first dimension."""
    return map_tensors(context, lambda tensor: tensor[rows.to(tensor.device)])


def _caster(dtype: torch.dtype) -> Any:
    return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor


def map_tensors(context: Context, function: Callable[[Tensor], Any]) -> Context:
    """``context`` with ``function`` of every tensor in its place."""
    if isinstance(context, Tensor):
        return function(context)
    if isinstance(context, dict):
        return {key: map_tensors(value, function) for key, value in context.items()}
    if isinstance(context, (list, tuple)):
        return type(context)([map_tensors(value, function) for value in context])
    return context

"""Invertible: what adapters produce, what layers and models are, and what audits see."""

from __future__ import annotations

import abc
import copy
import math
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inn_guard.core.base import BaseDistribution
from inn_guard.core.context import Context, cast_context, map_tensors, select_rows
from inn_guard.core.layer_jacobian import AutogradJacobian, LayerJacobian
from inn_guard.core.missing import NotApplicable

__all__ = [
    "Context",
    "DerivedMap",
    "Invertible",
    "InvertibleWrapper",
    "NotApplicable",
    "as_log_det",
    "copies_of_computed_tensors",
    "map_tensors",
    "standard_normal_log_prob",
]

Self = TypeVar("Self", bound="Invertible")
Derived = TypeVar("Derived", bound="DerivedMap")

_PLAIN_CONTAINERS = frozenset((dict, OrderedDict, list, set))
_WITHOUT_TENSORS = frozenset((type(None), bool, int, float, str))


class Invertible(nn.Module, abc.ABC):
    """A differentiable map with an inverse. forward: data x -> latent z; inverse: z -> x.

    x has shape (B, *data) and z has shape (B, *latent): one tensor each, batch first. Several
    latents are flattened and concatenated. log_det is log|det d forward(x)/dx| in nats, shape (B,).

    ``bijective``: inverse(forward(x)) = x and forward(inverse(z)) = z. A map that is only injective
    (dim z < dim x) sets it to False: then forward(inverse(z)) = z, and inverse(forward(x)) is a
    projection onto the image.

    How to implement one: inherit and write ``forward`` and ``inverse``. If there is a
    log-determinant, write ``forward_and_log_det`` and ``inverse_and_log_det``. If the map is a
    chain, return the chain from ``layers``. If it has a base distribution to sample from, return it
    from ``base`` and override ``log_prob``. What the map does not have raises NotApplicable with
    the reason.
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
        """log p(x) = log p(z) + log|det dF(x)/dx| in nats, (B,). Default: z is standard normal.

        Raises:
            NotApplicable: if the map has no log-determinant.
        """
        z, log_det = self.forward_and_log_det(x)
        return standard_normal_log_prob(z) + log_det

    def base(self) -> BaseDistribution | None:
        """The distribution of z that the library samples from. Default: None, it has none."""
        return None

    def layers(self) -> tuple[Invertible, ...]:
        """The layers whose composition, first layer first, is ``forward``; () if it is opaque."""
        return ()

    def linearize(self, x: Tensor) -> LayerJacobian:
        """J v, J^T u, J^-1 v, J^-T v of this one layer at x, as products. Default: by autograd."""
        return AutogradJacobian(self.forward, self.inverse, x)

    def with_cached_conditioner(self: Self, state: Tensor) -> Self:
        """This layer with its conditioner evaluated once, at ``state``, which may be x or z.

        The conditioner is everything that depends only on what the layer leaves unchanged. The
        result maps x, and inverts F(x), as the layer itself does, without evaluating the
        conditioner again. Default: the layer itself. Memory-saving backpropagation inverts and
        differentiates a layer with this one evaluation, so nothing else in the layer may draw
        random numbers or update running statistics.
        """
        return self

    def with_context(self: Self, context: Context) -> Self:
        """The same map and parameters with ``context`` (one row per sample) in place of its own."""
        clone = copy.copy(self)
        clone.context = context
        return clone

    def select(self: Self, rows: Tensor) -> Self:
        """The same map for these rows of the batch only: its context is indexed by ``rows``."""
        if self.context is None:
            return self
        return self.with_context(select_rows(self.context, rows))

    def to_dtype(self: Self, dtype: torch.dtype) -> Self:
        """A copy with parameters, buffers and context in ``dtype``; the original is unchanged."""
        # without its context: the output of an embedding net is no leaf and cannot be deep-copied
        bare = self.with_context(None)
        memo = {**_copies_of_empty_containers(bare), **copies_of_computed_tensors(bare)}
        clone = copy.deepcopy(bare, memo).to(dtype)
        if self.context is None:
            return clone
        return clone.with_context(cast_context(self.context, dtype))

    @property
    def block(self) -> nn.Module:
        """The module itself, or the one that an adapter wraps. Bound rules go by its class."""
        return self

    @property
    def name(self) -> str:
        """What a report calls this map: the class name of its block."""
        return type(self.block).__name__


class DerivedMap(Invertible):
    """A map made from another one, ``inner``: its inverse, or its action on a part of the state.

    Context, precision and name are the inner map's. A subclass writes ``forward``, ``inverse`` and
    their log-determinants. What else it keeps in attributes, ``rewrapped`` copies.

    Args:
        inner: the other map; its parameters are shared.
    """

    def __init__(self, inner: Invertible) -> None:
        super().__init__()
        self.inner = inner
        self.bijective = inner.bijective
        self.context = inner.context
        self.training = inner.training

    def rewrapped(self: Derived, inner: Invertible) -> Derived:
        """The same derivation of another inner map; ``self`` if it is the same one."""
        if inner is self.inner:
            return self
        clone = copy.copy(self)
        # a shallow copy shares the dictionary of submodules with the original
        vars(clone)["_modules"] = {**self._modules, "inner": inner}
        clone.bijective = inner.bijective
        clone.context = inner.context
        clone.training = inner.training
        return clone

    def with_context(self: Derived, context: Context) -> Derived:
        """The same derivation of the inner map in ``context``."""
        return self.rewrapped(self.inner.with_context(context))

    def select(self: Derived, rows: Tensor) -> Derived:
        """The same derivation of the inner map for these rows of the batch."""
        return self.rewrapped(self.inner.select(rows))

    def to_dtype(self: Derived, dtype: torch.dtype) -> Derived:
        """The same derivation of a copy of the inner map in ``dtype``."""
        return self.rewrapped(self.inner.to_dtype(dtype))

    @property
    def name(self) -> str:
        """What a report calls the inner map."""
        return self.inner.name


class InvertibleWrapper(DerivedMap):
    """The same map as ``inner``, with something added: override what differs.

    ``layers``, ``block`` and ``base`` are the inner map's, too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """F(x) of the inner map."""
        return self.inner(x)

    def inverse(self, z: Tensor) -> Tensor:
        """F^-1(z) of the inner map."""
        return self.inner.inverse(z)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F(x) and log|det dF(x)/dx|, (B,), of the inner map."""
        return self.inner.forward_and_log_det(x)

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """F^-1(z) and log|det dF^-1(z)/dz|, (B,), of the inner map."""
        return self.inner.inverse_and_log_det(z)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (B,), of the inner map."""
        return self.inner.log_prob(x)

    def base(self) -> BaseDistribution | None:
        """The base distribution of the inner map."""
        return self.inner.base()

    def layers(self) -> tuple[Invertible, ...]:
        """The layers of the inner map."""
        return self.inner.layers()

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The four linear maps of the inner map at x."""
        return self.inner.linearize(x)

    def with_cached_conditioner(self: Derived, state: Tensor) -> Derived:
        """The inner map with its conditioner evaluated once, at ``state``."""
        return self.rewrapped(self.inner.with_cached_conditioner(state))

    @property
    def block(self) -> nn.Module:
        """The module that the inner map stands for."""
        return self.inner.block


def copies_of_computed_tensors(model: nn.Module) -> dict[int, Any]:
    """Detached copies, by id, of the tensors that modules keep with their graph.

    Pass it to ``copy.deepcopy`` as its memo: deepcopy refuses such tensors.
    torch.nn.utils.weight_norm, for example, keeps its latest weight so, and transformers their keys
    and values, in lists or dicts.
    """
    copies: dict[int, Any] = {}

    def collect(value: Any) -> None:
        if isinstance(value, Tensor) and not value.is_leaf:
            copies[id(value)] = value.detach().clone()
        elif isinstance(value, (list, tuple)):
            for part in value:
                collect(part)
        elif isinstance(value, dict):
            collect(list(value.values()))

    for module in model.modules():
        for name, value in vars(module).items():
            # most attributes are flags and empty registries
            if type(value) in _WITHOUT_TENSORS or (type(value) in _PLAIN_CONTAINERS and not value):
                continue
            if name not in ("_modules", "_parameters"):
                collect(value)
    return copies


def _copies_of_empty_containers(model: nn.Module) -> dict[int, Any]:
    """Copies, by id, of the empty dictionaries and lists of all modules.

    Every module has a dozen registries of hooks, nearly all of them empty. ``copy.deepcopy`` spends
    most of its time on these.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in _PLAIN_CONTAINERS and not value:
                copies[id(value)] = type(value)()
    return copies


def as_log_det(value: Any, like: Tensor) -> Tensor:
    """A log-determinant in a library's format as one number per sample, (B,).

    A scalar (python, numpy, 0-dim or [1]) holds for every sample. Shape [B] stays. Shapes [B, 1,
    ..., 1] and [B, ...] are summed over all but the batch.

    Args:
        value: the library's log-determinant.
        like: a batch of B samples; the result is on its device.

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
    # some libraries return one number for layers whose log-determinant does not depend on x
    if value.numel() == 1:
        return value.reshape(1).expand(batch)
    if value.shape[0] != batch:
        raise ValueError(
            f"expected a log-determinant with {batch} entries, one per sample; "
            f"got shape {tuple(value.shape)}"
        )
    if value.dim() == 1:
        return value
    return value.flatten(1).sum(1)


def standard_normal_log_prob(z: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch"]:
    """log N(z; 0, I) in nats, summed over all but the batch.

    >>> round(standard_normal_log_prob(torch.zeros(1, 2)).item(), 4)
    -1.8379
    """
    flat = z.flatten(1)
    return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))

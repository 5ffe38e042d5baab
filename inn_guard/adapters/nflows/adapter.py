"""nflows: transforms and flows as Invertibles. Its forward is data -> noise, as here."""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nflows.distributions.normal import DiagonalNormal, StandardNormal
from nflows.flows.base import Flow
from nflows.transforms.base import (
    CompositeTransform,
    InputOutsideDomain,
    InverseNotAvailable,
    InverseTransform,
    MultiscaleCompositeTransform,
    Transform,
)
from nflows.transforms.coupling import CouplingTransform
from torch import Tensor, nn

from inn_guard.adapters.base import Adapted
from inn_guard.adapters.cached_network import CachedNetwork, with_modules
from inn_guard.adapters.nflows import jacobians  # noqa: F401 - registers them
from inn_guard.core.base import BaseDistribution
from inn_guard.core.invertible import Context, Invertible
from inn_guard.core.missing import NotApplicable
from inn_guard.core.readable import is_of_library, runs_code_of
from inn_guard.core.tensors import concatenate_flat, split_flat
from inn_guard.layers.inverted import InverseLayer, inverse_chain
from inn_guard.layers.multiscale import OnRemaining
from inn_guard.layers.reshape import Flatten, Rearrangement

__all__ = ["NflowsFlow", "NflowsTransform", "adapt"]

Shape = tuple[int, ...]


def adapt(model: nn.Module, context: Context = None) -> Invertible:
    """A Flow or a Transform of nflows as an Invertible.

    Args:
        model: the Flow or Transform.
        context: the raw context, before any embedding net.

    Raises:
        TypeError: if it is something else of nflows.
    """
    if isinstance(model, Flow):
        return NflowsFlow(model, context)
    if isinstance(model, Transform):
        return NflowsTransform(model, context)
    raise TypeError(
        f"expected a Flow or a Transform of nflows, got {type(model).__name__}; "
        "call wrap(flow) with the whole flow"
    )


class NflowsTransform(Adapted):
    """One transform; ``layers()`` opens composite, inverse and multiscale ones."""

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with _named_errors(self.name):
            return self.module(x, self.context)

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with _named_errors(self.name):
            return self.module.inverse(z, self.context)  # type: ignore[operator]

    def layers(self) -> tuple[Invertible, ...]:
        """The transforms inside a container, flat, in this map's context; () for a single one."""
        chain = _chain(self.module)
        if len(chain) == 1 and chain[0].block is self.module:
            return ()
        return self._in_context(chain)

    def _expects_context(self) -> bool:
        for part in self.module.modules():
            # residual networks store the number of context features, MADE has a layer for them
            if getattr(part, "context_features", None) is not None:
                return True
            if hasattr(part, "context_layer"):
                return True
        return False

    def with_cached_conditioner(self, state: Tensor) -> NflowsTransform:
        """A coupling with its network evaluated once, at the identity features of ``state``."""
        coupling: Any = self.module
        # a subclass of the user's own may do more with its network than its parent
        if not isinstance(coupling, CouplingTransform) or not is_of_library(coupling, "nflows"):
            return self
        if coupling.unconditional_transform is not None:
            return self
        parameters = coupling.transform_net(state[:, coupling.identity_features], self.context)
        network = CachedNetwork(coupling.transform_net, parameters)
        return NflowsTransform(with_modules(coupling, {"transform_net": network}), self.context)

    def to_dtype(self, dtype: torch.dtype) -> NflowsTransform:
        """A copy in ``dtype``, without the cache of Linear(using_cache=True)."""
        converted = super().to_dtype(dtype)
        for module in converted.modules():
            if hasattr(module, "use_cache"):
                # what is cached would stay in the old dtype
                module.use_cache(mode=False)  # type: ignore[operator]
        return converted

    def __deepcopy__(self, memo: dict[Any, Any]) -> NflowsTransform:
        # what Linear(using_cache=True) has cached can be neither copied nor converted
        for module in self.modules():
            cache = getattr(module, "cache", None)
            if hasattr(cache, "invalidate"):
                memo.setdefault(id(cache), type(cache)())
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


class NflowsFlow(NflowsTransform):
    """A Flow: its transform in the embedded context, and its base distribution."""

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._transform()._encode(x)

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._transform()._decode(z)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,), with the flow's own base distribution in its own context.

        By the library's own code where a subclass overrides it.
        """
        if not runs_code_of(self.module, Flow, ("log_prob", "_log_prob")):
            flow: Any = self.module
            return self._call(lambda x: flow.log_prob(x, context=self.context), x)
        z, log_det = self.forward_and_log_det(x)
        return self._base_log_prob(z) + log_det

    def _base_log_prob(self, z: Tensor) -> Tensor:
        flow: Any = self.module
        return flow._distribution.log_prob(z, flow._embedding_net(self.context))

    def base(self) -> BaseDistribution:
        """The flow's own distribution of the noise, in its own context."""
        flow: Any = self.module
        distribution = flow._distribution

        def sampler(n: int, context: Context) -> Tensor:
            embedded = flow._embedding_net(context)
            if embedded is None:
                return distribution.sample(n)
            # one draw for each row: (n, 1, *latent)
            return distribution.sample(1, context=embedded).flatten(0, 1)

        return BaseDistribution(
            sampler,
            like=self._like(),
            context=self.context,
            exact_deviation=_exact_deviation(distribution),
            description=f"{type(distribution).__name__} of nflows",
            log_density=self._base_log_prob,
        )

    def layers(self) -> tuple[Invertible, ...]:
        """The transform's layers, flat, in the embedded context."""
        transform = self._transform()
        return transform.layers() or (transform,)

    def _transform(self) -> NflowsTransform:
        flow: Any = self.module
        return NflowsTransform(flow._transform, flow._embedding_net(self.context))


class Chunk(Rearrangement):
    """x (B, *shape) -> [first chunk, second chunk], both flat.

    The first chunk is finished, the second remains.

    Args:
        shape: of one sample.
        dim: dimension of the batch along which it is cut. Of an odd size, the first chunk has one
            more.
    """

    def __init__(self, shape: Shape, dim: int) -> None:
        super().__init__()
        self.shape, self.dim = shape, dim

    def forward(self, x: Tensor) -> Tensor:
        """The flat vector [finished, remaining], (B, D)."""
        return concatenate_flat(x.chunk(2, self.dim))

    def inverse(self, z: Tensor) -> Tensor:
        """x with both chunks back in their place, (B, *shape)."""
        size = self.shape[self.dim - 1]
        first_shape = _resized(self.shape, self.dim, (size + 1) // 2)
        second_shape = _resized(self.shape, self.dim, size // 2)
        return torch.cat(split_flat(z, [first_shape, second_shape]), dim=self.dim)


def _exact_deviation(distribution: Any) -> Tensor | None:
    """Standard deviation of each entry, (*latent), if the class tells it, else None."""
    # by type, not by isinstance: a subclass may sample otherwise
    if type(distribution) is StandardNormal:
        return torch.ones(distribution._shape)
    if type(distribution) is DiagonalNormal:
        return distribution.log_std_.detach().exp().reshape(distribution._shape)
    return None


def _chain(transform: nn.Module) -> tuple[Invertible, ...]:
    """The layers of a transform, containers of the library opened."""
    if not _runs_library_code(transform):
        return (NflowsTransform(transform),)
    if isinstance(transform, CompositeTransform):
        layers: list[Invertible] = []
        for part in transform._transforms:
            layers += _chain(part)
        return tuple(layers)
    if isinstance(transform, InverseTransform):
        return inverse_chain(_chain(transform._transform))
    if isinstance(transform, MultiscaleCompositeTransform):
        return _scales(transform)
    return (NflowsTransform(transform),)


def _runs_library_code(container: nn.Module) -> bool:
    """Whether a container does what the library's class does; True for what is none."""
    for kind in (CompositeTransform, InverseTransform, MultiscaleCompositeTransform):
        if isinstance(container, kind):
            return runs_code_of(container, kind, ("__call__", "forward", "inverse"))
    return True


def _scales(multiscale: MultiscaleCompositeTransform) -> tuple[Invertible, ...]:
    """The layers of every scale; from the second on they act on the remaining part only."""
    dim = multiscale._split_dim
    latent_shapes = _latent_shapes(multiscale)
    layers: list[Invertible] = []
    for k, transform in enumerate(multiscale._transforms):
        latent = latent_shapes[k]
        is_last = k == len(latent_shapes) - 1
        cut = Flatten(latent) if is_last else Chunk(latent, dim)
        steps = (*_chain(transform), cut)
        if k == 0:
            layers += steps
            continue
        previous = latent_shapes[k - 1]
        shape = _resized(previous, dim, previous[dim - 1] // 2)
        lifted = _on_remaining(steps, shape)
        if not lifted:
            # shapes inside are not known: the whole transform is one layer
            inner = NflowsTransform(transform)
            flat = (math.prod(latent),)
            lifted = [
                OnRemaining(inner, shape=shape, latent_shape=latent),
                OnRemaining(cut, shape=latent, latent_shape=flat),
            ]
        layers += lifted
    return tuple(layers)


def _latent_shapes(multiscale: MultiscaleCompositeTransform) -> list[Shape]:
    """Shape of one sample of every transform's output, before it is cut.

    The library stores the shapes of the finished chunks only. What remains has as many entries as
    the outputs of all later transforms.
    """
    dim = multiscale._split_dim
    shapes: list[Shape] = []
    remaining = 0
    for stored in reversed(multiscale._output_shapes):
        shape = tuple(stored)
        others = math.prod(shape) // shape[dim - 1]
        shapes.insert(0, _resized(shape, dim, shape[dim - 1] + remaining // others))
        remaining = math.prod(shapes[0])
    return shapes


def _on_remaining(steps: tuple[Invertible, ...], shape: Shape) -> list[Invertible]:
    """The steps acting on the remaining part; [] if the shapes between them are not known."""
    lifted: list[Invertible] = []
    for step in steps:
        latent = _shape_after(step, shape)
        if latent is None or (isinstance(step, (Chunk, Flatten)) and step.shape != shape):
            return []
        lifted.append(OnRemaining(step, shape=shape, latent_shape=latent))
        shape = latent
    return lifted


def _shape_after(step: Invertible, shape: Shape) -> Shape | None:
    """Shape of one sample after a step; None if the step does not tell it."""
    if isinstance(step, (Chunk, Flatten, OnRemaining)):
        return (math.prod(shape),)
    if hasattr(step.block, "get_output_shape"):
        return tuple(step.block.get_output_shape(*shape))  # type: ignore[operator]
    # what the inner map makes of the shape does not tell what its inverse makes of it
    if isinstance(step, InverseLayer) and _shape_after(step.inner, shape) != shape:
        return None
    return shape


def _resized(shape: Shape, dim: int, size: int) -> Shape:
    """``shape`` with another size of the batch's dimension ``dim``."""
    return (*shape[: dim - 1], size, *shape[dim:])


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Give errors of nflows a message: which transform raised it, and what it expected."""
    try:
        yield
    except InverseNotAvailable as error:
        reason = str(error) or "the library has none"
        raise NotApplicable(
            f"{name}: no inverse of {_culprit(error)} (InverseNotAvailable): {reason}"
        ) from error
    except InputOutsideDomain as error:
        raise ValueError(
            f"{name}: input outside the domain of {_culprit(error)} (InputOutsideDomain)"
        ) from error
    except AssertionError as error:
        # most assertions of the library have no message: the failed line then says what was wrong
        failed_line = traceback.extract_tb(error.__traceback__)[-1].line
        reason = str(error) or f"`{failed_line}`"
        raise ValueError(f"{name}: failed inside {_culprit(error)}: {reason}") from error


def _culprit(error: Exception) -> str:
    """Class name of the innermost transform on the way to the error."""
    name = "a transform"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, Transform):
            name = type(owner).__name__
    return name

"""nflows: transforms and flows as Invertibles. Its forward is data -> noise, as ours."""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
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
from inn_guard.adapters.cached_network import CachedNetwork
from inn_guard.adapters.nflows import jacobians as tangents_nflows  # noqa: F401 - register bound rules and tangents
from inn_guard.core.invertible import Context, Invertible, NotApplicable
from inn_guard.layers.inverted import InverseLayer
from inn_guard.layers.multiscale import OnRemaining
from inn_guard.layers.reshape import Flatten, Rearrangement

__all__ = ["NflowsFlow", "NflowsTransform", "adapt"]

Shape = tuple[int, ...]


def adapt(model: nn.Module, context: Context = None) -> Invertible:
    """A Flow or a Transform of nflows as an Invertible; ``context`` is the raw one, before any embedding net.

    Raises:
        TypeError: if it is something else of nflows.
    """
    if isinstance(model, Flow):
        return NflowsFlow(model, context)
    if isinstance(model, Transform):
        return NflowsTransform(model, context)
    raise TypeError(
        f"expected a Flow or a Transform of nflows, got {type(model).__name__}; "
        "type wrap(flow) with the whole flow instead"
    )


class NflowsTransform(Adapted):
    """One nflows transform; Composite, Inverse and Multiscale nesting is opened by ``layers()``."""

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with _named_errors(self.name):
            return self.module(x, self.context)

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with _named_errors(self.name):
            return self.module.inverse(z, self.context)  # type: ignore[operator]

    def layers(self) -> tuple[Invertible, ...]:
        """The transforms inside containers, flat, in this map's context; () for a transform that is none."""
        chain = _chain(self.module)
        is_leaf = len(chain) == 1 and chain[0].block is self.module
        return () if is_leaf else tuple(layer.with_context(self.context) for layer in chain)

    def with_cached_conditioner(self, state: Tensor) -> NflowsTransform:
        """A coupling with its network evaluated once, at the features of ``state`` that it leaves as they are."""
        coupling: Any = self.module
        if (
            not isinstance(coupling, CouplingTransform)
            or coupling.unconditional_transform is not None
        ):
            return self
        parameters = coupling.transform_net(state[:, coupling.identity_features], self.context)
        twin = copy.copy(coupling)
        vars(twin)["_modules"] = {
            **coupling._modules,
            "transform_net": CachedNetwork(coupling.transform_net, parameters),
        }
        return NflowsTransform(twin, self.context)

    def to_dtype(self, dtype: torch.dtype) -> NflowsTransform:
        """A copy in ``dtype``; it computes what Linear(using_cache=True) keeps anew, which would stay in float32."""
        twin = super().to_dtype(dtype)
        for module in twin.modules():
            if hasattr(module, "use_cache"):
                module.use_cache(mode=False)  # type: ignore[operator]
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> NflowsTransform:
        # the weights that Linear(using_cache=True) keeps can neither be copied nor converted; a copy starts without
        for module in self.modules():
            cache = getattr(module, "cache", None)
            if hasattr(cache, "invalidate"):
                memo.setdefault(id(cache), type(cache)())
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin


class NflowsFlow(NflowsTransform):
    """A Flow: its transform in the context that its embedding net makes of the raw one, and its base distribution."""

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._transform()._encode(x)

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._transform()._decode(z)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,): the flow's own base distribution in its own context, and the log-determinant."""
        z, log_det = self.forward_and_log_det(x)
        embedded = self.module._embedding_net(self.context)  # type: ignore[operator]
        return self.module._distribution.log_prob(z, embedded) + log_det  # type: ignore[operator,union-attr]

    def layers(self) -> tuple[Invertible, ...]:
        """The transform's layers, flat, in the embedded context."""
        transform = self._transform()
        return transform.layers() or (transform,)

    def _transform(self) -> NflowsTransform:
        embedded = self.module._embedding_net(self.context)  # type: ignore[operator]
        return NflowsTransform(self.module._transform, embedded)  # type: ignore[arg-type]


class Chunk(Rearrangement):
    """x (B, *shape) -> [first chunk, second chunk], each flat: the first is finished, the second remains.

    Args:
        shape: of one sample.
        dim: dimension of the batch along which it is cut; of an odd size, the first chunk has one more.
    """

    def __init__(self, shape: Shape, dim: int) -> None:
        super().__init__()
        self.shape, self.dim = shape, dim

    def forward(self, x: Tensor) -> Tensor:
        """[finished, remaining], (B, D)."""
        return torch.cat([chunk.flatten(1) for chunk in x.chunk(2, self.dim)], dim=1)

    def inverse(self, z: Tensor) -> Tensor:
        """The chunks back in their place."""
        shapes = [_resized(self.shape, self.dim, size) for size in self._sizes()]
        parts = z.split([math.prod(shape) for shape in shapes], dim=1)
        return torch.cat(
            [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)],
            dim=self.dim,
        )

    def _sizes(self) -> tuple[int, int]:
        size = self.shape[self.dim - 1]
        return (size + 1) // 2, size // 2


def _chain(transform: nn.Module) -> tuple[Invertible, ...]:
    if isinstance(transform, CompositeTransform):
        return tuple(layer for part in transform._transforms for layer in _chain(part))
    if isinstance(transform, InverseTransform):
        return tuple(InverseLayer(layer) for layer in reversed(_chain(transform._transform)))
    if isinstance(transform, MultiscaleCompositeTransform):
        return _scales(transform)
    return (NflowsTransform(transform),)


def _scales(multiscale: MultiscaleCompositeTransform) -> tuple[Invertible, ...]:
    """The layers of every scale, from the second scale on acting on the remaining part of the state only."""
    dim = multiscale._split_dim
    latent_shapes = _latent_shapes(multiscale)
    layers: list[Invertible] = []
    for k, (transform, latent) in enumerate(
        zip(multiscale._transforms, latent_shapes, strict=True)
    ):
        cut = Chunk(latent, dim) if k < len(latent_shapes) - 1 else Flatten(latent)
        steps = (*_chain(transform), cut)
        if k == 0:
            layers += steps
            continue
        previous = latent_shapes[k - 1]
        shape = _resized(previous, dim, previous[dim - 1] // 2)
        layers += _on_remaining(steps, shape) or _whole(transform, shape, cut)
    return tuple(layers)


def _latent_shapes(multiscale: MultiscaleCompositeTransform) -> list[Shape]:
    """Shape of one sample of every transform's output, before it is cut.

    Only the shapes of the finished chunks are stored; what remains has as many entries as all later transforms put out.
    """
    dim, finished = multiscale._split_dim, [tuple(shape) for shape in multiscale._output_shapes]
    shapes: list[Shape] = []
    remaining = 0
    for shape in reversed(finished):
        others = math.prod(shape) // shape[dim - 1]
        shapes.insert(0, _resized(shape, dim, shape[dim - 1] + remaining // others))
        remaining = math.prod(shapes[0])
    return shapes


def _on_remaining(steps: tuple[Invertible, ...], shape: Shape) -> list[Invertible]:
    """The steps acting on the remaining part; [] if the shapes between them cannot be told without running them."""
    lifted: list[Invertible] = []
    for step in steps:
        latent = _shape_after(step, shape)
        if latent is None or (isinstance(step, (Chunk, Flatten)) and step.shape != shape):
            return []
        lifted.append(OnRemaining(step, shape=shape, latent_shape=latent))
        shape = latent
    return lifted


def _whole(transform: nn.Module, shape: Shape, cut: Chunk | Flatten) -> list[Invertible]:
    inner = OnRemaining(NflowsTransform(transform), shape=shape, latent_shape=cut.shape)
    return [inner, OnRemaining(cut, shape=cut.shape, latent_shape=(math.prod(cut.shape),))]


def _shape_after(step: Invertible, shape: Shape) -> Shape | None:
    if isinstance(step, (Chunk, Flatten, OnRemaining)):
        return (math.prod(shape),)
    if hasattr(step.block, "get_output_shape"):
        return tuple(step.block.get_output_shape(*shape))  # type: ignore[operator]
    flips_shape = isinstance(step, InverseLayer) and _shape_after(step.inner, shape) != shape
    return None if flips_shape else shape


def _resized(shape: Shape, dim: int, size: int) -> Shape:
    return (*shape[: dim - 1], size, *shape[dim:])


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Errors that nflows raises without a message get one: which transform, and what it asked for."""
    try:
        yield
    except InverseNotAvailable as error:
        reason = str(error) or "the library has none"
        raise NotApplicable(
            f"{name}: no inverse of {_culprit(error)} (InverseNotAvailable): {reason}"
        ) from error
    except InputOutsideDomain as error:
        raise ValueError(
            f"{name}: input outside the domain of {_culprit(error)} (InputOutsideDomain): expected "
            f"{_condition(error)} to be false"
        ) from error
    except AssertionError as error:
        raise ValueError(
            f"{name}: failed inside {_culprit(error)}: {str(error) or _condition(error)}"
        ) from error


def _culprit(error: Exception) -> str:
    """Class name of the innermost transform on the way to the error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    owners = [frame.f_locals.get("self") for frame in frames]
    names = [type(owner).__name__ for owner in owners if isinstance(owner, Transform)]
    return names[-1] if names else "a transform"


def _condition(error: Exception) -> str:
    """The source line that was checked: an assertion itself, or the ``if`` before a ``raise``."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"`{last.line}`"
        if isinstance(error, AssertionError)
        else "its check of the range of values"
    )

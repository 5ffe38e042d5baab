"""torch.distributions: transforms and transformed distributions as Invertibles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, TransformedDistribution
from torch.distributions import transforms as T

from inn_guard.adapters.base import Adapted
from inn_guard.core.base import BaseDistribution
from inn_guard.core.invertible import Context, Invertible, InvertibleWrapper, as_log_det
from inn_guard.layers.chain import Chain
from inn_guard.layers.inverted import InverseLayer, inverse_chain

__all__ = ["TorchDistribution", "TorchTransform", "adapt", "exact_deviation"]


def adapt(model: T.Transform | Distribution, context: Context = None) -> Invertible:
    """A transform, or a TransformedDistribution, of torch.distributions as an Invertible.

    A ComposeTransform gives a chain, ``t.inv`` the inverse map. The forward map of a distribution
    is data x -> base z, the inverse of its transforms.

    Raises:
        TypeError: if it is not a bijection of tensors, or a context is given.
    """
    if context is not None:
        raise TypeError(
            "expected no context: transforms of torch.distributions take none; "
            "call wrap(transform) without it"
        )
    if isinstance(model, TransformedDistribution):
        return TorchDistribution(model)
    if isinstance(model, T._InverseTransform):
        return InverseLayer(adapt(model.inv))
    if isinstance(model, T.ComposeTransform):
        return Chain(*map(adapt, model.parts))
    return TorchTransform(model)  # type: ignore[arg-type]


class TorchTransform(Adapted):
    """One transform, called without its cache: with cache_size=1 its inverse returns the stored x.

    Raises:
        TypeError: if the transform is not bijective.
    """

    def __init__(self, transform: T.Transform) -> None:
        if not transform.bijective:
            raise TypeError(_refusal(transform, "is not bijective"))
        super().__init__(_Holder(transform))

    @property
    def transform(self) -> T.Transform:
        """A view of the transform that shares its tensors and has no cache."""
        return self.module.held  # type: ignore[return-value]

    @property
    def block(self) -> nn.Module:
        """Itself: a torch transform is not a module."""
        return self

    @property
    def name(self) -> str:
        """The transform's class name."""
        return type(self.transform).__name__

    def forward(self, x: Tensor) -> Tensor:
        """z = transform(x), (B, *latent)."""
        z = self.transform(self._checked(x.clone()))
        return _same_size(z, x, self.transform)

    def inverse(self, z: Tensor) -> Tensor:
        """x = transform.inv(z), (B, *data)."""
        x = self.transform.inv(self._checked(z.clone()))
        return _same_size(x, z, self.transform)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.forward(x)
        return z, self.transform.log_abs_det_jacobian(x, z)

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = self.inverse(z)
        return x, -self.transform.log_abs_det_jacobian(x, z)

    def _checked(self, x: Tensor) -> Tensor:
        """x, if it has a batch: the library would take the first event dimension for it."""
        needed = self.transform.domain.event_dim + 1
        if x.dim() < needed:
            raise ValueError(
                f"expected a batch of at least {needed} dimensions, got shape {tuple(x.shape)}: "
                f"{self.name} has event_dim {needed - 1}; pass x.unsqueeze(0) for a single sample"
            )
        return x


class TorchDistribution(InvertibleWrapper):
    """A TransformedDistribution: data x -> base z by the inverses of its transforms.

    ``log_prob`` and samples of z are the distribution's own.
    """

    def __init__(self, distribution: TransformedDistribution) -> None:
        holder = _Holder(distribution)
        transforms: list[T.Transform] = holder.held.transforms
        super().__init__(Chain(*inverse_chain([adapt(part) for part in transforms])))
        self.holder = holder

    @property
    def distribution(self) -> TransformedDistribution:
        """A view of the distribution that shares its tensors; its transforms have no cache."""
        return self.holder.held

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (B,), by the distribution itself."""
        return as_log_det(self.distribution.log_prob(x), x)

    def base(self) -> BaseDistribution:
        """The distribution of z: the library's ``base_dist``."""
        base = self.distribution.base_dist
        return BaseDistribution(
            lambda n, context: base.sample((n,)),
            like=self._like(),
            exact_deviation=exact_deviation(base),
            description=f"{type(base).__name__} of torch.distributions",
            log_density=lambda z: as_log_det(base.log_prob(z), z),
        )

    def _like(self) -> Tensor:
        """An empty tensor with the dtype and device of the distribution's tensors."""
        for tensor in _tensors(self.distribution):
            if tensor.is_floating_point():
                return tensor.detach().new_empty(0)
        return torch.empty(0)

    def to_dtype(self, dtype: torch.dtype) -> TorchDistribution:
        """A copy of the distribution in ``dtype``."""
        return TorchDistribution(copy.deepcopy(self.holder).to(dtype).held)

    @property
    def block(self) -> nn.Module:
        """Itself: a torch distribution is not a module."""
        return self

    @property
    def name(self) -> str:
        """The distribution's class name."""
        return type(self.distribution).__name__


def exact_deviation(base: Distribution) -> Tensor | None:
    """Standard deviation of one draw of a distribution, (*latent).

    None if the distribution does not tell it, or if it differs between the rows of a batch of
    distributions.
    """
    try:
        deviation = base.stddev
    except (NotImplementedError, AttributeError):
        return None
    if not bool(deviation.isfinite().all()):
        return None
    return deviation


class _Holder(nn.Module):
    """Registers a transform's or distribution's parameters; ``.to`` moves its other tensors."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        if not isinstance(held, nn.Module):
            held = _view(held, lambda tensor: tensor)
        self.held = held
        parameters = [t for t in _tensors(held) if isinstance(t, nn.Parameter)]
        self.tensors = nn.ParameterList(parameters)

    # the signature is that of torch
    def _apply(self, fn: Any, recurse: bool = True) -> _Holder:  # noqa: FBT001, FBT002
        super()._apply(fn, recurse)
        if not isinstance(self.held, nn.Module):

            def moved(tensor: Tensor) -> Tensor:
                # torch has moved the parameters themselves already
                return tensor if isinstance(tensor, nn.Parameter) else fn(tensor)

            self.held = _view(self.held, moved)
        return self

    def __deepcopy__(self, memo: dict[Any, Any]) -> _Holder:
        if isinstance(self.held, nn.Module):
            return _Holder(copy.deepcopy(self.held, memo))

        def copied(tensor: Tensor) -> Tensor:
            if tensor.is_leaf:
                return copy.deepcopy(tensor, memo)
            return tensor.detach().clone()

        return _Holder(_view(self.held, copied))


def _view(value: Any, tensor_map: Callable[[Tensor], Tensor]) -> Any:
    """A shallow copy of a transform or distribution: tensors mapped, caches left out."""
    if isinstance(value, Tensor):
        return tensor_map(value)
    if type(value) in (list, tuple):
        return type(value)([_view(item, tensor_map) for item in value])
    if isinstance(value, nn.Module) or not isinstance(value, (T.Transform, Distribution)):
        return value
    clone = object.__new__(type(value))
    for key, part in vars(value).items():
        # for an inverse, ``_inv`` is what it inverts; for others, a weak reference to an inverse
        # that was built before
        if key == "_inv" and not isinstance(value, T._InverseTransform):
            continue
        if key == "_cached_x_y":
            continue
        vars(clone)[key] = _view(part, tensor_map)
    if isinstance(value, T.Transform):
        vars(clone)["_cache_size"] = 0
        vars(clone).setdefault("_inv", None)
    return clone


def _tensors(value: Any) -> list[Tensor]:
    """All tensors of a transform or distribution, each once."""
    found: dict[int, Tensor] = {}

    def collect(tensor: Tensor) -> Tensor:
        found[id(tensor)] = tensor
        return tensor

    _view(value, collect)
    return list(found.values())


def _same_size(result: Tensor, argument: Tensor, transform: T.Transform) -> Tensor:
    """``result``, if it has as many entries per sample as ``argument``."""
    if result.shape[:1] != argument.shape[:1] or result.numel() != argument.numel():
        reason = f"maps shape {tuple(argument.shape)} to {tuple(result.shape)}"
        raise TypeError(_refusal(transform, reason))
    return result


def _refusal(transform: T.Transform, reason: str) -> str:
    return (
        f"expected a bijective transform, got {type(transform).__name__}, which {reason}; "
        "pass wrap(encode=f, decode=g) with coordinates of its image"
    )

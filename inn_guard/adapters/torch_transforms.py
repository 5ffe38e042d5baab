"""Transforms of torch.distributions as Invertibles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions import transforms as T

from inn_guard.adapters.base import Adapted
from inn_guard.core.invertible import Context, Invertible
from inn_guard.layers.chain import Chain
from inn_guard.layers.inverted import InverseLayer

__all__ = ["TorchTransform", "adapt"]


def adapt(transform: T.Transform, context: Context = None) -> Invertible:
    """The transform; ComposeTransform gives a chain, ``t.inv`` the inverse map. Its own log-determinant is summed.

    Raises:
        TypeError: if the transform is not a bijection of tensors.
    """
    if context is not None:
        raise TypeError(
            "expected no context: a torch transform takes none; type wrap(transform) instead"
        )
    if isinstance(transform, T._InverseTransform):
        return InverseLayer(adapt(transform.inv))
    if isinstance(transform, T.ComposeTransform):
        return Chain(*[adapt(part) for part in transform.parts])
    return TorchTransform(transform)


class TorchTransform(Adapted):
    """One transform. It is called without its cache: with cache_size=1 the inverse would return the stored x."""

    def __init__(self, transform: T.Transform) -> None:
        _demand_bijection(transform)
        super().__init__(_Holder(transform))

    @property
    def transform(self) -> T.Transform:
        """A view of the transform that shares its tensors and has no cache; a transform that is a module, itself."""
        return self.module.transform  # type: ignore[return-value]

    @property
    def block(self) -> nn.Module:
        """Itself: a torch transform is no module."""
        return self

    @property
    def name(self) -> str:
        """The transform's class name."""
        return type(self.transform).__name__

    def forward(self, x: Tensor) -> Tensor:
        """z = transform(x)."""
        return _same_size(self.transform(self._event(x.clone())), x, self.transform)

    def inverse(self, z: Tensor) -> Tensor:
        """x = transform.inv(z)."""
        return _same_size(self.transform.inv(self._event(z.clone())), z, self.transform)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.forward(x)
        return z, self.transform.log_abs_det_jacobian(x, z)

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = self.inverse(z)
        return x, -self.transform.log_abs_det_jacobian(x, z)

    def _event(self, x: Tensor) -> Tensor:
        needed = self.transform.domain.event_dim + 1
        if x.dim() < needed:
            raise ValueError(
                f"expected a batch of at least {needed} dimensions, got shape {tuple(x.shape)}: {self.name} has "
                f"event_dim {needed - 1}; type x.unsqueeze(0) for a single sample instead"
            )
        return x


class _Holder(nn.Module):
    """Registers a transform's parameters and moves its other tensors along with ``.to``."""

    def __init__(self, transform: T.Transform) -> None:
        super().__init__()
        self.transform = (
            transform
            if isinstance(transform, nn.Module)
            else _view(transform, lambda tensor: tensor)
        )
        self.tensors = nn.ParameterList(
            p for p in _tensors(self.transform) if isinstance(p, nn.Parameter)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Holder:  # noqa: FBT001, FBT002
        super()._apply(fn, recurse)
        if not isinstance(self.transform, nn.Module):
            self.transform = _view(
                self.transform, lambda t: t if isinstance(t, nn.Parameter) else fn(t)
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Holder:
        if isinstance(self.transform, nn.Module):
            return _Holder(copy.deepcopy(self.transform, memo))  # type: ignore[arg-type]
        return _Holder(
            _view(
                self.transform,
                lambda t: copy.deepcopy(t, memo) if t.is_leaf else t.detach().clone(),
            )
        )


def _view(value: Any, tensor_map: Callable[[Tensor], Tensor]) -> Any:
    """A shallow copy of a transform or distribution and of those inside it, tensors mapped, caches left out."""
    if isinstance(value, Tensor):
        return tensor_map(value)
    if isinstance(value, (list, tuple)):
        return (
            type(value)([_view(item, tensor_map) for item in value])
            if type(value) in (list, tuple)
            else value
        )
    if isinstance(value, nn.Module) or not isinstance(value, (T.Transform, Distribution)):
        return value
    twin = object.__new__(type(value))
    vars(twin).update(
        {
            key: _view(part, tensor_map)
            for key, part in vars(value).items()
            if not _cached(value, key)
        }
    )
    if isinstance(value, T.Transform):
        vars(twin).update(_cache_size=0, _inv=vars(twin).get("_inv"))
    return twin


def _cached(owner: Any, key: str) -> bool:
    return key == "_cached_x_y" or (key == "_inv" and not isinstance(owner, T._InverseTransform))


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _view(value, collect)
    return list({id(tensor): tensor for tensor in found}.values())


def _demand_bijection(transform: T.Transform) -> None:
    if not transform.bijective:
        raise TypeError(_refusal(transform, "is not bijective"))


def _same_size(result: Tensor, argument: Tensor, transform: T.Transform) -> Tensor:
    if result.shape[:1] != argument.shape[:1] or result.numel() != argument.numel():
        raise TypeError(
            _refusal(transform, f"maps shape {tuple(argument.shape)} to {tuple(result.shape)}")
        )
    return result


def _refusal(transform: T.Transform, reason: str) -> str:
    return (
        f"expected a bijective transform, got {type(transform).__name__}, which {reason}; "
        "type wrap(encode=f, decode=g) with coordinates of its image instead"
    )

"""Transforms of torch.distributions as Invertibles."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions import transforms as T

from inn_guard.adapters.adapted import Adapted, Flipped
from inn_guard.invertible import Context, Invertible
from inn_guard.layers.chain import Chain

__all__ = ["TorchTransform", "adapt"]


def adapt(transform: T.Transform, context: Context = None) -> Invertible:
    """The transform; ComposeTransform gives a chain, ``t.inv`` the inverse map. Its own log-determinant is summed.

    Raises:
        TypeError: if the transform is not a bijection of tensors.
    """
    if context is not None:
        raise TypeError("expected no context: a torch transform takes none; type wrap(transform) instead")
    if isinstance(transform, T._InverseTransform):
        return Flipped(adapt(transform.inv))
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
        return self.transform(self._event(x.clone()))

    def inverse(self, z: Tensor) -> Tensor:
        """x = transform.inv(z)."""
        return self.transform.inv(self._event(z.clone()))

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.transform(self._event(x))
        return z, self.transform.log_abs_det_jacobian(x, z)

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = self.transform.inv(self._event(z))
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
        self.transform = transform if isinstance(transform, nn.Module) else _view(transform, lambda tensor: tensor)
        self.tensors = nn.ParameterList(p for p in _tensors(self.transform) if isinstance(p, nn.Parameter))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Holder:  # noqa: FBT001, FBT002
        super()._apply(fn, recurse)
        if not isinstance(self.transform, nn.Module):
            self.transform = _view(self.transform, lambda t: t if isinstance(t, nn.Parameter) else fn(t))
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Holder:
        if isinstance(self.transform, nn.Module):
            return _Holder(copy.deepcopy(self.transform, memo))  # type: ignore[arg-type]
        return _Holder(_view(self.transform, lambda t: copy.deepcopy(t, memo) if t.is_leaf else t.detach().clone()))


def _view(value: Any, tensor_map: Callable[[Tensor], Tensor]) -> Any:
    """A shallow copy of a transform or distribution and of those inside it, tensors mapped, caches left out."""
    if isinstance(value, Tensor):
        return tensor_map(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_view(item, tensor_map) for item in value]) if type(value) in (list, tuple) else value
    if isinstance(value, nn.Module) or not isinstance(value, (T.Transform, Distribution)):
        return value
    twin = object.__new__(type(value))
    vars(twin).update({key: _view(part, tensor_map) for key, part in vars(value).items() if not _cached(value, key)})
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
    if not isinstance(transform, T.Transform):
        raise TypeError(f"expected a torch.distributions transform, got {type(transform).__name__}")
    shape = (6,) * max(1, transform.domain.event_dim)
    try:
        keeps_size = math.prod(transform.forward_shape(shape)) == math.prod(shape)
    except ValueError:  # made for one particular shape, as ReshapeTransform is
        keeps_size = True
    if not transform.bijective or not keeps_size:
        reason = "is not bijective" if keeps_size else "changes the number of entries"
        raise TypeError(
            f"expected a bijective transform, got {type(transform).__name__}, which {reason}; "
            "type wrap(encode=f, decode=g) with coordinates of its image instead"
        )

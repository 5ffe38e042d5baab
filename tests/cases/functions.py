"""Cases of callables, of modules with both methods, and of torch.distributions transforms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.core.invertible import Invertible
from tests.cases.case import Case, seeded

BATCH, FEATURES = 4, 6


class Coupling(nn.Module):
    """A hand-written affine coupling: forward(x) -> (z, log_det), inverse(z) -> (x, log_det)."""

    def __init__(self) -> None:
        super().__init__()
        half = FEATURES // 2
        self.net = nn.Sequential(nn.Linear(half, 16), nn.Tanh(), nn.Linear(16, 2 * half))

    def _scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.net(kept).chunk(2, 1)
        return torch.tanh(raw), shift

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = x.chunk(2, 1)
        log_scale, shift = self._scale_and_shift(kept if context is None else kept + context)
        return torch.cat([moved * log_scale.exp() + shift, kept], 1), log_scale.sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        moved, kept = z.chunk(2, 1)
        log_scale, shift = self._scale_and_shift(kept if context is None else kept + context)
        return torch.cat([kept, (moved - shift) * (-log_scale).exp()], 1), -log_scale.sum(1)


class Directed(nn.Module):
    """The same with a flag: forward(x, reverse=False), tensors only, and no inverse method."""

    def __init__(self) -> None:
        super().__init__()
        self.coupling = Coupling()

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        return self.coupling.inverse(x)[0] if reverse else self.coupling(x)[0]


def _two_couplings() -> Invertible:
    first, second = Coupling(), Coupling()

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        x, one = first(x)
        z, two = second(x)
        return z, one + two

    def decode(z: Tensor) -> tuple[Tensor, Tensor]:
        z, two = second.inverse(z)
        x, one = first.inverse(z)
        return x, one + two

    return wrap(encode=encode, decode=decode, layers=[first, (second, second.inverse)])


def _log_det_apart() -> Invertible:
    net = Coupling()
    return wrap(
        encode=lambda x: net(x)[0],
        decode=lambda z: net.inverse(z)[0],
        log_det=lambda x: net(x)[1].unsqueeze(1),
    )


def _flagged() -> Invertible:
    net = Directed()
    return wrap(encode=net, decode=functools.partial(net, reverse=True))


def _chain_in_context() -> Invertible:
    return wrap(
        layers=[Coupling(), Coupling()],
        context=torch.randn(BATCH, FEATURES // 2, dtype=torch.float64),
    )


def _affine_transform() -> Invertible:
    scale = nn.Parameter(torch.rand(FEATURES) + 0.5)
    return wrap(torch.distributions.AffineTransform(torch.randn(FEATURES), scale, event_dim=1))


def _composed() -> Any:
    t = torch.distributions.transforms
    inner = t.ComposeTransform([t.AffineTransform(0.3, 1.7), t.SigmoidTransform()])
    return wrap(
        t.ComposeTransform(
            [t.AffineTransform(-0.2, 0.5), inner.inv.inv, t.TanhTransform(cache_size=1)]
        )
    )


def _transform(make: Callable[[], torch.distributions.Transform]) -> Callable[[], Invertible]:
    return lambda: wrap(make())


def _case(
    name: str, model: Callable[[], Invertible], data: Callable[[Tensor], Tensor], **abilities: Any
) -> Case:
    def make() -> tuple[Invertible, Tensor]:
        with seeded(dtype=torch.float32):
            return model().double().eval(), data(torch.randn(BATCH, FEATURES, dtype=torch.float64))

    return Case(name, make, **abilities)


def _as_is(x: Tensor) -> Tensor:
    return x


T = torch.distributions.transforms

CASES = [
    _case("module-forward-inverse", lambda: wrap(Coupling()), _as_is),
    _case(
        "module-in-context",
        lambda: wrap(Coupling(), context=torch.ones(BATCH, FEATURES // 2, dtype=torch.float64)),
        _as_is,
    ),
    _case("callables-closures-layers", _two_couplings, _as_is, has_layers=True),
    _case("callables-log-det-apart", _log_det_apart, _as_is, has_inverse_log_det=False),
    _case("callables-reverse-flag", _flagged, _as_is, has_log_det=False, has_inverse_log_det=False),
    _case("chain-in-context", _chain_in_context, _as_is, has_layers=True),
    _case("torch-affine", _affine_transform, _as_is),
    _case("torch-compose", _composed, _as_is, has_layers=True),
    _case("torch-exp", _transform(T.ExpTransform), _as_is),
    _case("torch-sigmoid", _transform(T.SigmoidTransform), _as_is),
    _case("torch-softplus", _transform(T.SoftplusTransform), _as_is),
    _case("torch-tanh-cached", _transform(lambda: T.TanhTransform(cache_size=1)), _as_is),
    _case("torch-power", _transform(lambda: T.PowerTransform(torch.tensor(1.5))), torch.exp),
    _case("torch-inverse-exp", _transform(lambda: T.ExpTransform().inv), torch.exp),
    _case(
        "torch-cumulative-distribution",
        _transform(
            lambda: T.CumulativeDistributionTransform(
                torch.distributions.Normal(torch.tensor(0.2), torch.tensor(1.3))
            )
        ),
        _as_is,
    ),
    _case(
        "torch-independent",
        _transform(
            lambda: T.IndependentTransform(T.AffineTransform(torch.randn(FEATURES), 2.0), 1)
        ),
        _as_is,
    ),
    _case("torch-reshape", _transform(lambda: T.ReshapeTransform((6,), (2, 3))), _as_is),
    _case(
        "torch-stack",
        _transform(
            lambda: T.StackTransform([T.ExpTransform(), T.TanhTransform(cache_size=1)] * 3, dim=-1)
        ),
        _as_is,
    ),
    _case(
        "torch-cat",
        _transform(lambda: T.CatTransform([T.ExpTransform(), T.TanhTransform()], -1, [2, 4])),
        _as_is,
    ),
    _case(
        "torch-compose-inverse",
        _transform(lambda: T.ComposeTransform([T.AffineTransform(1.0, 2.0), T.ExpTransform()]).inv),
        torch.exp,
        has_layers=True,
    ),
]

#: transforms of torch.distributions that wrap() refuses -> why
EXCEPTIONS = {
    "AbsTransform": "not injective",
    "SoftmaxTransform": "not injective: softmax(x + c) = softmax(x)",
    "StickBreakingTransform": "maps R^n onto a simplex in R^(n+1): forward is not onto the space "
    "its tensor lies in",
    "CorrCholeskyTransform": "maps R^n into matrices with more entries",
    "LowerCholeskyTransform": "maps n x n matrices onto triangular ones: the upper triangle is "
    "lost",
    "PositiveDefiniteTransform": "maps n x n matrices onto symmetric ones: the upper triangle is "
    "lost",
}

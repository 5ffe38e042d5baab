"""SPECIMENS: every model of the zoo, and its two directions as the library computes them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.libraries import LIBRARIES, D, Pair, built

BATCH = 8
Function = Callable[[Tensor], Pair]


@dataclass(frozen=True)
class Specimen:
    """One model at one batch.

    Attributes:
        id: name.
        make: dtype -> (what is handed to wrap, encode, decode); the same weights in either dtype.
        dtype: of the audit.
        scale: of x, a standard normal batch.
    broken_layer: number of the layer that is known to cost the inverse its digits, in wrap's
    ``layers=``.
    """

    id: str
    make: Callable[[torch.dtype], tuple[dict[str, Any], Function, Function]]
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    broken_layer: int | None = None

    @functools.cache  # noqa: B019 - a few megabytes for the whole zoo
    def made(self, dtype: torch.dtype) -> tuple[dict[str, Any], Function, Function]:
        """The model and its directions, made once."""
        return self.make(dtype)

    def x(self, dtype: torch.dtype) -> Tensor:
        """The batch, drawn in float32."""
        generator = torch.Generator().manual_seed(1)
        return (self.scale * torch.randn(BATCH, D, generator=generator, dtype=torch.float32)).to(
            dtype
        )


class Altered(nn.Module):
    """A model of a library in a user's own module, with something wrong in it.

    Args:
        name: of the library.
        log_det: what is made of the log-determinant.
        decoded: what is made of the inverse's value.
    """

    def __init__(
        self,
        name: str,
        *,
        log_det: Callable[[Tensor], Tensor] = lambda value: value,
        decoded: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        super().__init__()
        self.inner, self.library = built(name, 0.5), LIBRARIES[name]
        self.log_det, self.decoded = log_det, decoded

    def forward(self, x: Tensor) -> Pair:
        z, log_det = self.library.encode(self.inner, x)
        return z, self.log_det(log_det)

    def inverse(self, z: Tensor) -> Pair:
        x, log_det = self.library.decode(self.inner, z)
        return self.decoded(x), -self.log_det(-log_det)


def plain(name: str, strength: float, dtype: torch.dtype) -> Specimen:
    def make(dtype: torch.dtype) -> tuple[dict[str, Any], Function, Function]:
        module, library = built(name, strength).to(dtype), LIBRARIES[name]
        return (
            {"model": module},
            lambda x: library.encode(module, x),
            lambda z: library.decode(module, z),
        )

    return Specimen(f"{name} x{strength:g} {short(dtype)}", make, dtype)


def altered(name: str, what: str, **changes: Callable[[Tensor], Tensor]) -> Specimen:
    def make(dtype: torch.dtype) -> tuple[dict[str, Any], Function, Function]:
        module = Altered(name, **changes).to(dtype).eval()
        return {"model": module}, module.forward, module.inverse

    return Specimen(f"{name}, {what}", make)


def ill_conditioned(name: str, condition: float, dtype: torch.dtype) -> Specimen:
    """A net, then Q diag(1 ... 1/condition) P with rotations Q and P, then the net again."""
    generator = torch.Generator().manual_seed(3)
    Q, P = (
        torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    weight = (
        Q * torch.logspace(0, -torch.tensor(condition).log10().item(), D, dtype=torch.float64)
    ) @ P

    def make(dtype: torch.dtype) -> tuple[dict[str, Any], Function, Function]:
        module, library, W = built(name, 0.5).to(dtype), LIBRARIES[name], weight.float().to(dtype)

        def mixed(x: Tensor) -> Pair:
            return x @ W.T, torch.linalg.slogdet(W.double())[1].to(dtype).expand(len(x))

        def unmixed(z: Tensor) -> Pair:
            return torch.linalg.solve(W, z.T).T, -torch.linalg.slogdet(W.double())[1].to(
                dtype
            ).expand(len(z))

        def net(x: Tensor) -> Pair:
            return library.encode(module, x)

        def back(z: Tensor) -> Pair:
            return library.decode(module, z)

        layers = [(net, back), (mixed, unmixed), (net, back)]
        return {"layers": layers}, chained([net, mixed, net]), chained([back, unmixed, back])

    broken = 1 if condition > 1e6 else None
    return Specimen(
        f"{name} around cond {condition:g} {short(dtype)}", make, dtype, broken_layer=broken
    )


def chained(functions: list[Function]) -> Function:
    def chain(x: Tensor) -> Pair:
        total: Tensor | None = x.new_zeros(len(x))
        for function in functions:
            x, log_det = function(x)
            total = None if total is None or log_det is None else total + log_det
        return x, total

    return chain


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_log_det() -> list[str]:
    return [name for name in LIBRARIES if not name.startswith("MemCNN")]


def _specimens() -> Iterator[Specimen]:
    for name in LIBRARIES:
        for strength in (0.5, 3.0, 12.0):
            yield plain(name, strength, torch.float32)
        yield plain(name, 12.0, torch.float64)
    for name in with_log_det():
        yield altered(name, "log-det negated", log_det=lambda value: -value - 0.5)
        yield altered(name, "log-det off by 1", log_det=lambda value: value + 1.0)
    for name in with_log_det()[::3]:
        yield altered(name, "inverse off by 5 %", decoded=lambda value: value * 1.05)
        yield altered(name, "inverse off by 0.1 %", decoded=lambda value: value + 1e-3)
        yield altered(
            name, "inverse NaN where large", decoded=lambda value: value / (value.abs() < 1)
        )
    for name in ("nflows affine", "FrEIA GLOW", "normflows exp", "zuko NICE", "by hand"):
        for condition in (1e2, 1e9):
            yield ill_conditioned(name, condition, torch.float32)
        yield ill_conditioned(name, 1e9, torch.float64)


SPECIMENS = list(_specimens())

"""Where latents are drawn from: the model's own base, the caller's prior, or N(0, I)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from inn_guard.core.base import BaseDistribution
from inn_guard.core.context import Context
from inn_guard.core.invertible import Invertible
from inn_guard.core.tensors import finite_rows

__all__ = ["base_of"]


def base_of(model: Invertible, x: Tensor, *, prior: Any = None) -> BaseDistribution:
    """The distribution that latents are drawn from.

    Args:
        model: the map.
        x: data, (B, *data); tells shape, dtype and device of latents where nothing else does.
        prior: what the caller named: a `BaseDistribution`, an object with ``sample((n,))`` as
            torch's distributions have it or ``sample(n)``, or a function n -> latents (n, *latent).
            None: the model's own base, or N(0, I) where it has none.

    Raises:
        TypeError: if ``prior`` is none of these.
    """
    if prior is not None:
        return _from_caller(prior, x)
    own = model.base()
    if own is not None:
        return own
    return _standard_normal(model, x)


def _standard_normal(model: Invertible, x: Tensor) -> BaseDistribution:
    def sample(n: int, context: Context) -> Tensor:
        return torch.randn(n, *_latent_shape(model, x), dtype=x.dtype, device=x.device)

    return BaseDistribution(
        sample,
        x,
        context=model.context,
        exact_deviation=torch.ones(()),  # of every entry, whatever the shape of the latents is
        declared=False,
        description="N(0, I)",
    )


def _latent_shape(model: Invertible, x: Tensor) -> torch.Size:
    finite = finite_rows(x).nonzero()[:1, 0]
    rows = finite if len(finite) else torch.arange(1, device=x.device)
    with torch.no_grad():
        return model.select(rows)(x[rows]).shape[1:]


def _from_caller(prior: Any, x: Tensor) -> BaseDistribution:
    if isinstance(prior, BaseDistribution):
        return dataclasses.replace(prior, declared=True)
    draw = getattr(prior, "sample", prior)
    if not callable(draw) or isinstance(prior, type):
        raise TypeError(
            "expected prior as a distribution with sample((n,)), or as a function n -> latents "
            f"(n, *latent); got {_in_words(prior)}"
        )
    takes_shape = isinstance(prior, torch.distributions.Distribution)

    def sample(n: int, context: Context) -> Tensor:
        drawn = draw((n,)) if takes_shape else draw(n)
        drawn = drawn[0] if isinstance(drawn, tuple) else drawn
        if not isinstance(drawn, Tensor) or len(drawn) != n:
            got = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
            raise TypeError(f"expected prior to draw {n} latents (n, *latent); got {got}")
        return drawn

    name = getattr(prior, "__name__", type(prior).__name__)
    return BaseDistribution(sample, x, description=f"prior {name}")


def _in_words(prior: Any) -> str:
    if isinstance(prior, type):
        return f"the class {prior.__name__}: pass an instance of it"
    if isinstance(prior, Tensor):
        return (
            f"a tensor of shape {tuple(prior.shape)}: pass prior=lambda n: "
            "z[torch.randint(len(z), (n,))] to draw from its rows"
        )
    return f"{prior!r:.60}"

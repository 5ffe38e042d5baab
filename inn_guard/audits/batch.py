"""The batch that an audit measures: what may be handed in, and how it is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset

from inn_guard.core.invertible import Invertible
from inn_guard.core.mismatch import why_rejected
from inn_guard.core.tensors import finite_rows
from inn_guard.execution.state import preserve_state

__all__ = ["as_batch", "checked_batch", "checked_domain", "first_batch"]

MAX_SAMPLES = 256  #: taken from a DataLoader or a Dataset; a batch is used whole


def first_batch(model: Any, x: Any) -> Any:
    """One batch out of a DataLoader or a Dataset, on the model's device; anything else as it is.

    Args:
        model: whose data it is.
        x: a DataLoader or a Dataset, of which the first 256 samples are used; or a batch.

    Raises:
        TypeError: if items of x are no tensors.
        ValueError: if a DataLoader or Dataset is empty.
    """
    if isinstance(x, Dataset):
        x = DataLoader(x, batch_size=MAX_SAMPLES)
    if not isinstance(x, DataLoader):
        return x
    with preserve_state(nn.Module()):  # a DataLoader draws from the global generators
        return _from_batches(model, x)


def as_batch(model: Invertible, x: Any) -> Any:
    """One tensor (B, *data), also of several inputs.

    Args:
        model: whose data it is.
        x: a batch (B, *data), or a tuple of tensors for a model with several inputs.

    Raises:
        TypeError: if x is a tuple and the model takes one tensor.
    """
    if isinstance(x, (tuple, list)):
        return _packed(model, x)
    return x


def _packed(model: Invertible, x: tuple | list) -> Tensor:
    pack: Callable[..., Tensor] | None = getattr(model, "pack", None)
    if pack is None:
        what = "torch.stack(list(x))"
        if not all(isinstance(part, Tensor) for part in x):
            what = "torch.tensor(x)"
        raise TypeError(
            f"expected one tensor (B, *data) for {model.name}, got a {type(x).__name__} of "
            f"{len(x)}: pass {what} if its parts are samples"
        )
    tensors = all(isinstance(part, Tensor) for part in x)
    if not tensors or len({len(part) for part in x if part.dim()}) > 1:
        got = ", ".join(_shape_or_type(part) for part in x)
        raise TypeError(
            f"expected tensors with a row for every sample, got a {type(x).__name__} of {got}"
        )
    return pack(*x)


def _shape_or_type(part: Any) -> str:
    return str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__


def _from_batches(model: Any, loader: Iterable[Any]) -> Tensor:
    batches: list[Tensor] = []
    for item in loader:
        batch = item[0] if isinstance(item, (tuple, list)) and item else item
        if not isinstance(batch, Tensor):
            raise TypeError(
                "expected batches of tensors (B, *data), or tuples that begin with one; got a "
                f"{type(batch).__name__}: pass a tensor of your own choice out of it instead"
            )
        batches.append(batch)
        if sum(map(len, batches)) >= MAX_SAMPLES:
            break
    if not batches:
        raise ValueError("expected at least one batch of data, got none")
    x = torch.cat(batches)[:MAX_SAMPLES]
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return x if parameter is None else x.to(parameter.device)


def checked_batch(model: nn.Module, x: Any) -> Tensor:
    """``x`` if it can be a batch for ``model``.

    Raises:
        TypeError: if x is not a real floating-point tensor.
        ValueError: if x has no samples, no data dimension, or another dtype or device than the
            model.
    """
    usual = next(
        (p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype()
    )
    if not isinstance(x, Tensor):
        raise TypeError(f"expected x as a tensor (B, *data), got {_named(x)}{_advice(x, usual)}")
    if not x.is_floating_point():
        raise TypeError(f"expected a real floating-point x, got {x.dtype}: pass x.to({usual})")
    if x.is_nested or x.layout is not torch.strided:
        raise TypeError(
            "expected a dense x (B, *data), got a sparse or nested one: pass x.to_dense()"
        )
    if torch.finfo(x.dtype).bits < 16:
        raise TypeError(f"expected x of at least 16 bits, got {x.dtype}: pass x.to({usual})")
    if x.dim() < 2:
        what = "x.reshape(1, 1)"
        if x.dim() == 1:
            what = "x[None] if it is one sample, x[:, None] if it is samples of one number each"
        raise ValueError(f"expected x of shape (B, *data), got {tuple(x.shape)}: pass {what}")
    if x.numel() == 0:
        raise ValueError(
            f"expected at least one sample with at least one value, got x of shape {tuple(x.shape)}"
        )
    _check_values(model, x)
    why = why_rejected(model, x)
    if why:
        raise ValueError(why)
    return x


def checked_domain(domain: Any, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Where data can lie, as a function x (B, *data) -> (B,) bool; None stands for everywhere.

    Args:
        domain: None, a constraint of torch.distributions, or such a function.
        x: data, which must lie within.

    Raises:
        TypeError: if ``domain`` is none of these, or returns anything else.
        ValueError: if a finite sample of x lies outside.
    """
    if domain is None:
        return None
    check = domain.check if isinstance(domain, constraints.Constraint) else domain
    if not callable(check) or isinstance(check, type):
        raise TypeError(
            "expected domain as a constraint of torch.distributions or a function x -> (B,) bool; "
            f"got {domain!r}: pass domain=torch.distributions.constraints.simplex"
        )

    def within(t: Tensor) -> Tensor:
        inside = check(t)
        if not isinstance(inside, Tensor) or inside.dtype != torch.bool or len(inside) != len(t):
            got = inside.dtype if isinstance(inside, Tensor) else type(inside).__name__
            raise TypeError(f"expected domain to return {len(t)} bools, one per sample; got {got}")
        return inside.reshape(len(t), -1).all(1)

    finite = x[finite_rows(x)]
    outside = int((~within(finite)).sum()) if len(finite) else 0
    if outside:
        raise ValueError(
            f"expected data inside of the domain; got {outside} of {len(finite)} samples outside: "
            "pass a wider domain"
        )
    return within


def _named(x: Any) -> str:
    return "None" if x is None else f"a {type(x).__name__}"


def _advice(x: Any, dtype: torch.dtype) -> str:
    """How to make a batch of what was passed, if that is known."""
    if isinstance(x, nn.Module):
        return ": the model comes first, then the data"
    if hasattr(x, "to_numpy"):
        return f": pass torch.as_tensor(x.to_numpy(), dtype={dtype})"
    if hasattr(x, "__array__"):
        return f": pass torch.as_tensor(x, dtype={dtype})"
    return ": pass a batch of data, for example next(iter(loader))"


def _check_values(model: nn.Module, x: Tensor) -> None:
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "expected a model with values; some of its parameters are on the meta device, which "
            "has none: call model.to_empty(device=...) and load its weights"
        )
    if x.is_meta:
        raise ValueError(
            "expected x with values; got one on the meta device, which has none: load data and "
            "weights"
        )

"""What of a batch does not fit a model: dtype, device, rows of the context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.core.context import Context, map_tensors

__all__ = ["check_is_context", "check_rows", "shapes_of", "why_rejected"]


def why_rejected(model: nn.Module, x: Tensor, context: Context = None) -> str:
    """What of a batch does not fit the model, and what to pass instead; "" if all fits.

    A mixture of dtypes is no fault as long as the model accepts it. So this is asked after a model
    has raised, or where x is required to be like the parameters.
    """
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if weights:
        dtypes = {p.dtype for p in weights}
        usual = weights[0].dtype
        own = getattr(model, "dtype", None)
        if isinstance(own, torch.dtype):  # of its data, where layers compute in others
            dtypes.add(own)
        if x.dtype not in dtypes:
            wanted = ", ".join(sorted(map(str, dtypes)))
            wanted = wanted if len(dtypes) == 1 else f"one of {wanted}"
            return (
                f"expected x in the dtype of the model's parameters, {wanted}; got {x.dtype}: "
                f"pass x.to({usual})"
            )
        if x.device not in {p.device for p in weights}:
            where = weights[0].device
            return (
                f"expected x on the model's device, {where}; got {x.device}: pass x.to('{where}')"
            )
    reasons: list[str] = []
    map_tensors(context, lambda part: reasons.append(_why_no_context(part, x)))
    return next(filter(None, reasons), "")


def check_rows(context: Context, x: Tensor) -> None:
    """See to it that the context has one row for each sample of x.

    Raises:
        ValueError: if a tensor in it has another number of rows.
    """

    def check(part: Tensor) -> None:
        why = _why_other_rows(part, x)
        if why:
            raise ValueError(why)

    map_tensors(context, check)


def _why_no_context(part: Tensor, x: Tensor) -> str:
    why = _why_other_rows(part, x)
    if why:
        return why
    if part.is_floating_point() and part.dtype != x.dtype:
        return (
            f"expected a context in the dtype of x, {x.dtype}; got {part.dtype}: pass "
            f"context.to({x.dtype})"
        )
    return ""


def _why_other_rows(part: Tensor, x: Tensor) -> str:
    if part.dim() > 0 and len(part) == len(x):
        return ""
    what = ""
    if part.dim() > 0 and len(part) == 1:
        sizes = ", ".join([str(len(x)), *["-1"] * (part.dim() - 1)])
        what = f": pass context.expand({sizes})"
    return (
        f"expected a context with {len(x)} rows, one for each sample; got shape "
        f"{tuple(part.shape)}{what}"
    )


def check_is_context(context: Any) -> None:
    """Refuse what holds no tensor.

    Raises:
        TypeError: if it is neither None nor a tensor, and no tensor is inside it.
    """
    if context is None:
        return
    found: list[Tensor] = []
    map_tensors(context, found.append)
    if found:
        return
    what = ": pass None where there is none"
    if hasattr(context, "__array__") or (isinstance(context, (list, tuple)) and context):
        what = f": pass torch.as_tensor(context, dtype={torch.get_default_dtype()})"
    raise TypeError(
        "expected context as a tensor (B, ...), or a tuple, list or dict of such tensors; got "
        f"{type(context).__name__}{what}"
    )


def shapes_of(context: Context) -> str:
    """Shapes per row and dtypes of the tensors in a context, in words; "" without a context."""
    shapes: list[str] = []
    map_tensors(
        context, lambda part: shapes.append(f"{tuple(part.shape[1:])} per row in {part.dtype}")
    )
    return ", ".join(shapes)

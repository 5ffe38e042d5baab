"""The attacks as the paper states them: one sample, one step and one number at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible


def reconstruction_error(model: Invertible, x: Tensor) -> float:
    """|x - F^-1(F(x))|_2 of one sample."""
    with torch.no_grad():
        back = model.inverse(model.forward(x.unsqueeze(0)))[0]
    return (back.double() - x.double()).flatten().norm().item()


def projected_gradient(
    model: Invertible, start: Tensor, lower: Tensor, upper: Tensor, *, steps: int, step_size: float
) -> tuple[float, Tensor]:
    """The largest error met from ``start``, one sample after ``steps`` steps, and where it was met.

    x'_{k+1} = Proj(x'_k + alpha sign(grad L(x'_k))), L(x') = |x' - F^-1(F(x'))|_2.
    """
    x = start.clone()
    worst, where = -1.0, x
    for _ in range(steps + 1):
        error = reconstruction_error(model, x)
        if error > worst:
            worst, where = error, x
        leaf = x.clone().requires_grad_()
        batch = leaf.unsqueeze(0)
        loss = torch.sqrt(((batch - model.inverse(model.forward(batch))).double() ** 2).sum())
        (gradient,) = torch.autograd.grad(loss, leaf)
        x = torch.clamp(x + step_size * torch.sign(gradient), lower, upper)
    return worst, where

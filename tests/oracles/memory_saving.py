"""Memory-saving backpropagation written out, storing z (and x) alone, and the true gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible

Loss = Callable[..., Tensor]


def true_gradients(model: Invertible, x: Tensor, loss: Loss) -> list[Tensor]:
    """d loss / d parameters by plain backpropagation."""
    return list(torch.autograd.grad(loss(*model.forward_and_log_det(x)), list(model.parameters())))


def memory_saving_gradients(
    model: Invertible, x: Tensor, loss: Loss, *, first: Tensor | None = None
) -> list[Tensor]:
    """The same from z = F(x) alone: each layer's input by its inverse, each differentiated alone.

    ``first``, if given, is the input of the first layer, known instead of rebuilt.
    """
    with torch.no_grad():
        z, log_det = model.forward_and_log_det(x)
    z, log_det = z.requires_grad_(), log_det.requires_grad_()
    z_gradient, log_det_gradient = torch.autograd.grad(loss(z, log_det), [z, log_det])
    totals = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}
    state = z.detach()
    for k, layer in reversed(list(enumerate(model.layers()))):
        with torch.no_grad():
            below = layer.inverse(state) if k or first is None else first.clone()
        below.requires_grad_()
        output, layer_log_det = layer.forward_and_log_det(below)
        scalar = (output * z_gradient).sum() + (layer_log_det * log_det_gradient).sum()
        parameters = list(layer.parameters())
        below_gradient, *found = torch.autograd.grad(
            scalar, [below, *parameters], allow_unused=True
        )
        for parameter, gradient in zip(parameters, found, strict=True):
            totals[parameter] += 0 if gradient is None else gradient
        state, z_gradient = below.detach(), below_gradient
    return list(totals.values())

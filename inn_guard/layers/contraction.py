"""Linear maps and networks whose Lipschitz constant is certified to be below a coefficient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from inn_guard.core.tensors import same_tensor
from inn_guard.jacobian.network import linearize_elementwise, linearize_module
from inn_guard.layers.networks import Activation
from inn_guard.numerics.convolution_norm import riesz_norm
from inn_guard.numerics.spectral_norm import spectral_norm

__all__ = ["Contraction", "LipSwish", "contractive", "contractive_conv_net", "contractive_mlp"]

GRID = 32  #: frequencies per dimension at which the norm of a convolution is differentiated


class Contraction(nn.Module):
    """Parametrization of a weight: W -> W min(1, coefficient / bound(W)).

    bound(W) is never below the true norm. For a matrix the bound is a certified spectral norm; for
    a kernel it is a certified bound of the norm of the zero-padded convolution on images of every
    size. Power iterations are not used: their estimates lie below the norm. The bound is computed
    again only when W has changed. The gradient is that of coefficient / norm(W), with the norm that
    the bound bounds.

    This costs an eigenvalue problem of the smaller side of W per update, for a convolution one per
    frequency.

    Args:
        coefficient: upper bound of the norm of the result.

    Raises:
        ValueError: if the coefficient is not positive.
    """

    def __init__(self, coefficient: float) -> None:
        super().__init__()
        if coefficient <= 0:
            raise ValueError(f"expected a positive coefficient, got {coefficient}")
        self.coefficient = coefficient
        #: the last weight with its bound and its worst frequency
        self._known: tuple[Tensor, float, Tensor] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, scaled down if its norm may exceed the coefficient."""
        bound, frequency = self._bound(weight)
        # entries of the product are rounded: each by eps, together by sqrt(rank) eps of the norm
        rounding = (2 + math.sqrt(min(weight.flatten(1).shape))) * torch.finfo(weight.dtype).eps
        allowed = self.coefficient * (1 - rounding)
        if not bound > allowed:
            return weight
        factor = allowed / bound
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight * factor
        # its value is ``factor``: the norm gives it a gradient, which the certified bound has not
        norm = _norm_at(weight, frequency)
        return weight * (factor * (norm.detach() / norm))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself: what the module is initialised or assigned with."""
        return weight

    def _bound(self, weight: Tensor) -> tuple[float, Tensor]:
        """The certified bound, and the frequency at which a kernel's norm is largest."""
        weight = weight.detach()
        # by its entries: a version counter does not see what is written through ``.data``
        if self._known is None or not same_tensor(self._known[0], weight):
            kernel = weight.double().cpu()
            bound = spectral_norm(kernel) if kernel.dim() == 2 else riesz_norm(kernel, (1, 1))
            self._known = (weight.clone(), bound, _worst_frequency(kernel))
        return self._known[1:]


class LipSwish(nn.Module):
    """x sigmoid(b x) / 1.1 with b = softplus(raw); its slope is at most 0.99985 for every b.

    References:
        Residual Flows for Invertible Generative Modeling (Chen, Behrmann, Duvenaud,
        Jacobsen, 2019), section 3.3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """x sigmoid(b x) / 1.1."""
        return x * torch.sigmoid(functional.softplus(self.raw) * x) / 1.1


linearize_module.register(LipSwish, linearize_elementwise)


def contractive(module: nn.Module, *, coefficient: float) -> nn.Module:
    """``module`` with every linear map and convolution in it held below ``coefficient``.

    Raises:
        ValueError: for a convolution that is not of stride and dilation 1, ungrouped and
            zero-padded.
    """
    for part in list(module.modules()):
        if isinstance(part, nn.Conv2d):
            steps = {*part.stride, *part.dilation, part.groups}
            if steps != {1} or part.padding_mode != "zeros":
                raise ValueError(
                    "expected a zero-padded convolution of stride, dilation and groups 1, "
                    f"got {part}"
                )
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            parametrize.register_parametrization(part, "weight", Contraction(coefficient))
    return module


def contractive_mlp(
    sizes: Sequence[int], *, coefficient: float, activation: Activation = LipSwish
) -> nn.Sequential:
    """activation - Linear - ... - activation - Linear with a certified Lipschitz constant.

    The constant is at most coefficient ** (len(sizes) - 1).

    Args:
        sizes: widths from input to output; the first and the last must be equal for an invertible
            residual layer.
        coefficient: upper bound of the norm of every linear map, below 1.
        activation: makes a module of Lipschitz constant at most 1.
    """
    modules: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        modules += [activation(), nn.Linear(before, after)]
    return nn.Sequential(*(contractive(module, coefficient=coefficient) for module in modules))


def contractive_conv_net(
    channels: int, hidden: int, *, coefficient: float, activation: Activation = LipSwish
) -> nn.Sequential:
    """Three times activation - convolution (3x3, 1x1, 3x3) with a certified Lipschitz constant.

    The constant is at most coefficient ** 3.

    Args:
        channels: channels in and out.
        hidden: channels in between.
        coefficient: of every convolution, below 1.
        activation: makes a module of Lipschitz constant at most 1.
    """
    convolutions = [
        nn.Conv2d(channels, hidden, 3, padding=1),
        nn.Conv2d(hidden, hidden, 1),
        nn.Conv2d(hidden, channels, 3, padding=1),
    ]
    modules: list[nn.Module] = []
    for convolution in convolutions:
        modules += [activation(), contractive(convolution, coefficient=coefficient)]
    return nn.Sequential(*modules)


def _worst_frequency(kernel: Tensor) -> Tensor:
    """The grid frequency, (2,), at which the symbol of a kernel has its largest norm."""
    if kernel.dim() == 2:
        return kernel.new_empty(0)
    symbol = torch.fft.rfft2(kernel, s=(GRID, GRID)).permute(2, 3, 0, 1)
    if symbol.shape[2] > symbol.shape[3]:
        symbol = symbol.mH  # the Gram matrix of the smaller side has the same largest eigenvalue
    gram = symbol @ symbol.mH
    worst = int(torch.linalg.eigvalsh(gram)[..., -1].argmax())
    row, column = divmod(worst, gram.shape[1])
    return torch.tensor([row, column], dtype=kernel.dtype) * (2 * math.pi / GRID)


def _norm_at(weight: Tensor, frequency: Tensor) -> Tensor:
    """The norm of a matrix, or of the symbol sum_d K[d] exp(-i w.d) of a kernel at frequency w."""
    if weight.dim() == 2:
        return torch.linalg.matrix_norm(weight, 2)
    rows, columns = (torch.arange(n, device=weight.device) for n in weight.shape[2:])
    angle = (frequency[0] * rows[:, None] + frequency[1] * columns).to(weight)
    symbol = (weight * torch.polar(torch.ones_like(angle), -angle)).sum((2, 3))
    return torch.linalg.matrix_norm(symbol, 2)

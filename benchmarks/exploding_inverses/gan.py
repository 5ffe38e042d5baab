"""The adversary of FlowGAN: a spectrally normalised discriminator and its gradient penalty."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

__all__ = ["discriminator", "gradient_penalty"]


def discriminator(shape: Sequence[int], widths: Sequence[int]) -> nn.Sequential:
    """Images -> (B,): 3x3 convolutions of these widths with LeakyReLU.

    Every second one has stride 2 as long as the image is large enough.

    Every layer has spectral norm 1 as a matrix of (channels out, channels in x 9), as in the
    reference below.

    References:
        Spectral Normalization for Generative Adversarial Networks (Miyato, Kataoka, Koyama,
        Yoshida, 2018).
    """
    channels, height, width = shape
    layers: list[nn.Module] = []
    for k, (n, m) in enumerate(itertools.pairwise((channels, *widths))):
        stride = 1
        if k % 2 and min(height, width) > 1:
            stride = 2
        height, width = math.ceil(height / stride), math.ceil(width / stride)
        layers += [spectral_norm(nn.Conv2d(n, m, 3, stride=stride, padding=1)), nn.LeakyReLU(0.1)]
    last = spectral_norm(nn.Linear(widths[-1] * height * width, 1))
    return nn.Sequential(*layers, nn.Flatten(), last, nn.Flatten(0))


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, drawn: Tensor, *, generator: torch.Generator
) -> Tensor:
    """E (||grad D(x)|| - 1)^2 over x uniform on the segments between real and drawn images.

    References:
        Improved Training of Wasserstein GANs (Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville,
        2017), equation 3.

    >>> x = torch.zeros(4, 3)
    >>> gradient_penalty(lambda x: 3 * x[:, 0], x, x + 1, generator=torch.Generator()).item()
    4.0
    """
    share = torch.rand(len(real), *[1] * (real.dim() - 1), generator=generator)
    between = torch.lerp(real, drawn, share).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()

"""Encoders and decoders of autoencoders: a small convolutional pair, and a big one of bottleneck residual blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["AutoencoderNets", "BottleneckBlock", "big_nets", "small_nets"]


class AutoencoderNets(NamedTuple):
    """An encoder and a decoder.

    Attributes:
        encoder: images (B, C, H, W) -> (B, 2 d): first the mean g_m, then the raw values whose softplus is g_s.
        decoder: z (B, d) -> images (B, C, H, W): f.
    """

    encoder: nn.Module
    decoder: nn.Module


def small_nets(
    shape: Sequence[int], latent: int, *, channels: tuple[int, int] = (64, 128)
) -> AutoencoderNets:
    """Two 3x3 convolutions of stride 2 and two linear heads; a linear map and two transposed 4x4 convolutions.

    Args:
        shape: (C, H, W) of one image, H and W multiples of 4.
        latent: d.
        channels: of the two convolutions; (64, 128) in the paper, whose strides, not printed, follow from the numbers
            of parameters in its Table 3.

    References:
        Deterministic Training of Generative Autoencoders Using Invertible Layers (Silvestri, Roos, Ambrogioni, 2023),
        appendix D.1.

    >>> import torch
    >>> small_nets((1, 28, 28), 2).encoder(torch.zeros(5, 1, 28, 28)).shape
    torch.Size([5, 4])
    """
    colours, height, width = shape
    if height % 4 or width % 4:
        raise ValueError(
            f"expected a height and width that are multiples of 4, got {height} x {width}"
        )
    first, second = channels
    corner = (second, height // 4, width // 4)
    features = second * corner[1] * corner[2]
    encoder = nn.Sequential(
        nn.Conv2d(colours, first, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 2 * latent),  # both heads in one matrix
    )
    decoder = nn.Sequential(
        nn.Linear(latent, features),
        nn.ReLU(),
        nn.Unflatten(1, corner),
        nn.ConvTranspose2d(second, first, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(first, colours, 4, stride=2, padding=1),
    )
    return AutoencoderNets(encoder, decoder)


class BottleneckBlock(nn.Module):
    """h + 1x1 (3x3 (3x3 (1x1 (h)))), GELU before each, through a quarter of the channels; 1x1 in place of 3x3 below 3.

    Args:
        channels: in and out.
        size: height and width of the feature map.

    References:
        Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images (Child, 2021), figure 3.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        middle, kernel = max(1, channels // 4), 3 if size > 2 else 1
        self.branch = nn.Sequential(
            *(nn.GELU(), nn.Conv2d(channels, middle, 1)),
            *(nn.GELU(), nn.Conv2d(middle, middle, kernel, padding=kernel // 2)),
            *(nn.GELU(), nn.Conv2d(middle, middle, kernel, padding=kernel // 2)),
            *(nn.GELU(), nn.Conv2d(middle, channels, 1)),
        )

    def forward(self, h: Tensor) -> Tensor:
        """h and its branch."""
        return h + self.branch(h)


def big_nets(
    shape: Sequence[int],
    latent: int,
    *,
    width: int | None = None,
    blocks: int = 4,
    smallest: int = 4,
) -> AutoencoderNets:
    """Bottleneck residual blocks at every size of the feature map, halved by averaging and doubled by repetition.

    This differs from the paper in: what its text does not print. The width is the latent dimension, as the numbers of
    parameters in its Table 4 suggest; the heads follow an average over the smallest feature map.

    Args:
        shape: (C, H, W) of one image, H = W = smallest * 2^k.
        latent: d.
        width: channels of all feature maps; d unless given.
        blocks: at every size.
        smallest: height and width of the smallest feature map.

    References:
        Deterministic Training of Generative Autoencoders Using Invertible Layers (Silvestri, Roos, Ambrogioni, 2023),
        appendix D.1.
    """
    colours, height, right = shape
    width = latent if width is None else width
    sizes = [height]
    while sizes[-1] > smallest and sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    if height != right or sizes[-1] != smallest:
        raise ValueError(
            f"expected square images of {smallest} * 2^k pixels a side, got {height} x {right}"
        )
    down: list[nn.Module] = [nn.Conv2d(colours, width, 3, padding=1)]
    up: list[nn.Module] = [
        nn.Linear(latent, width * smallest**2),
        nn.Unflatten(1, (width, smallest, smallest)),
    ]
    for size in sizes:
        down += [BottleneckBlock(width, size) for _ in range(blocks)]
        down.append(nn.AvgPool2d(2 if size > smallest else smallest))
    for size in reversed(sizes):
        up += [BottleneckBlock(width, size) for _ in range(blocks)]
        up += [nn.Upsample(scale_factor=2)] if size < height else []
    down += [nn.GELU(), nn.Flatten(), nn.Linear(width, 2 * latent)]
    up += [nn.GELU(), nn.Conv2d(width, colours, 3, padding=1)]
    return AutoencoderNets(nn.Sequential(*down), nn.Sequential(*up))

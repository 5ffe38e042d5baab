"""Encoders and decoders: a small convolutional pair, and a big one of residual blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["AutoencoderNets", "BottleneckBlock", "big_nets", "small_nets"]


class AutoencoderNets(NamedTuple):
    """The two networks of an autoencoder.

    Attributes:
        encoder: images (B, C, H, W) -> (B, 2 d): first the mean g_m, then the raw values whose
            softplus is g_s.
        decoder: z (B, d) -> images (B, C, H, W): f.
    """

    encoder: nn.Module
    decoder: nn.Module


def small_nets(
    shape: Sequence[int], latent: int, *, channels: tuple[int, int] = (64, 128)
) -> AutoencoderNets:
    """An encoder of two 3x3 convolutions of stride 2, and a decoder of two transposed 4x4 ones.

    Args:
        shape: (C, H, W) of one image, H and W multiples of 4.
        latent: d.
        channels: of the two convolutions; (64, 128) in the paper, whose strides, not printed,
            follow from the numbers of parameters in its Table 3.

    References:
        Deterministic Training of Generative Autoencoders Using Invertible Layers (Silvestri, Roos,
        Ambrogioni, 2023), appendix D.1.

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
    """h + 1x1 (3x3 (3x3 (1x1 (h)))) with GELU before each, through a quarter of the channels.

    Feature maps smaller than 3 pixels get 1x1 convolutions in place of 3x3 ones.

    Args:
        channels: in and out.
        size: height and width of the feature map.

    References:
        Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images (Child,
        2021), figure 3.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        middle = max(1, channels // 4)
        kernel = 1
        if size > 2:
            kernel = 3
        self.branch = nn.Sequential(
            *(nn.GELU(), nn.Conv2d(channels, middle, 1)),
            *(nn.GELU(), nn.Conv2d(middle, middle, kernel, padding=kernel // 2)),
            *(nn.GELU(), nn.Conv2d(middle, middle, kernel, padding=kernel // 2)),
            *(nn.GELU(), nn.Conv2d(middle, channels, 1)),
        )

    def forward(self, h: Tensor) -> Tensor:
        """The sum of h and its branch."""
        return h + self.branch(h)


def big_nets(
    shape: Sequence[int],
    latent: int,
    *,
    width: int | None = None,
    blocks: int = 4,
    smallest: int = 4,
) -> AutoencoderNets:
    """Bottleneck residual blocks at every size of the feature map.

    The size is halved by averaging in the encoder and doubled by repetition in the decoder.

    This differs from the paper in: what its text does not print. The width is the latent dimension,
    as the numbers of parameters in its Table 4 suggest; the heads follow an average over the
    smallest feature map.

    Args:
        shape: (C, H, W) of one image, H = W = smallest * 2^k.
        latent: d.
        width: channels of all feature maps. Default: d.
        blocks: number of blocks at every size.
        smallest: height and width of the smallest feature map.

    References:
        Deterministic Training of Generative Autoencoders Using Invertible Layers (Silvestri, Roos,
        Ambrogioni, 2023), appendix D.1.
    """
    colours, height, right = shape
    if width is None:
        width = latent
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
        if size > smallest:
            down.append(nn.AvgPool2d(2))
        else:
            down.append(nn.AvgPool2d(smallest))
    for size in reversed(sizes):
        up += [BottleneckBlock(width, size) for _ in range(blocks)]
        if size < height:
            up.append(nn.Upsample(scale_factor=2))
    down += [nn.GELU(), nn.Flatten(), nn.Linear(width, 2 * latent)]
    up += [nn.GELU(), nn.Conv2d(width, colours, 3, padding=1)]
    return AutoencoderNets(nn.Sequential(*down), nn.Sequential(*up))

"""The encoder and decoder of InjFlow and its baselines: five (transposed) convolutions."""

from __future__ import annotations

from torch import nn

__all__ = ["conv_decoder", "conv_encoder"]

LAYERS = 5


def conv_encoder(shape: tuple[int, int, int], latent: int, *, width: int = 64) -> nn.Module:
    """(B, C, H, W) -> (B, latent): five 3x3 convolutions with BatchNorm and ELU, then linear.

    The image is halved as long as its side is even and above 4; the remaining convolutions keep its
    size.

    Args:
        shape: (C, H, W) of one image, square.
        latent: size of the output; twice d for a stochastic encoder.
        width: channels after the first convolution; they double with every halving.

    References:
        Regularized Autoencoders via Relaxed Injective Probability Flow (Kumar, Poole, Murphy,
        2020), section 4.
    """
    strides = _strides(shape)
    channels = _channels(shape[0], strides, width)
    layers: list[nn.Module] = []
    for k, stride in enumerate(strides):
        layers += [
            nn.Conv2d(channels[k], channels[k + 1], 3, stride=stride, padding=1),
            nn.BatchNorm2d(channels[k + 1]),
            nn.ELU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * _side(shape) ** 2, latent))


def conv_decoder(shape: tuple[int, int, int], latent: int, *, width: int = 64) -> nn.Module:
    """(B, latent) -> (B, C, H, W): a linear layer, then five transposed convolutions.

    It is the mirror image of ``conv_encoder``.

    Args:
        shape: (C, H, W) of one image, square.
        latent: d.
        width: the encoder's.
    """
    strides = _strides(shape)[::-1]
    channels = _channels(shape[0], _strides(shape), width)[::-1]
    side = _side(shape)
    layers: list[nn.Module] = [
        nn.Linear(latent, channels[0] * side**2),
        nn.Unflatten(1, (channels[0], side, side)),
    ]
    for k, stride in enumerate(strides):
        layers += [
            nn.BatchNorm2d(channels[k]),
            nn.ELU(),
            # output_padding: without it the image would be one pixel short of twice the size
            nn.ConvTranspose2d(
                channels[k], channels[k + 1], 3, stride=stride, padding=1, output_padding=stride - 1
            ),
        ]
    return nn.Sequential(*layers)


def _strides(shape: tuple[int, int, int]) -> list[int]:
    """The strides of the encoder's convolutions: 2 while the image can be halved, then 1."""
    if shape[1] != shape[2]:
        raise ValueError(f"expected square images (C, H, H), got {shape}")
    side = shape[1]
    strides: list[int] = []
    while side % 2 == 0 and side > 4 and len(strides) < LAYERS:
        side //= 2
        strides.append(2)
    return strides + [1] * (LAYERS - len(strides))


def _side(shape: tuple[int, int, int]) -> int:
    """Height and width of the image after all convolutions."""
    side = shape[1]
    for stride in _strides(shape):
        side //= stride
    return side


def _channels(first: int, strides: list[int], width: int) -> list[int]:
    """Channels before the first and after every convolution."""
    channels = [first]
    current = width
    for k, stride in enumerate(strides):
        if stride == 2 and k > 0:
            current *= 2
        channels.append(current)
    return channels

"""Autoencoders within flows (AEF): the core is a part of the data, or features added to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from inn_guard.core.tensors import draw_normal
from inn_guard.layers.chain import Chain
from inn_guard.layers.reshape import Rearrangement
from inn_guard.models.aef.expanded import ExpandedAutoencoder
from inn_guard.models.aef.flow import AutoencoderConfig, CoreShellFlow
from inn_guard.models.aef.importance_sampling import Proposal, tuned_width
from inn_guard.models.aef.networks import AutoencoderNets

__all__ = [
    "CoreLast",
    "LinearAEF",
    "PartitionAEF",
    "center_core",
    "corner_core",
    "random_core",
]

#: (image shape, d) -> boolean mask of the d core values
CoreMaker = Callable[[Sequence[int], int], Tensor]
WIDTHS = tuple(2.0**k for k in range(-10, 4))  #: of proposals that ``LinearAEF.tune`` tries


def center_core(shape: Sequence[int], latent: int) -> Bool[Tensor, "channels height width"]:
    """The d values nearest to the centre: the central sub-image, where d is one's size.

    >>> center_core((1, 4, 4), 4)[0].int().tolist()
    [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    # twice the distance from the centre, which is an integer for even sizes, too
    rows, columns = ((2 * torch.arange(size) - (size - 1)).abs() for size in shape[1:])
    return _nearest(rows[:, None], columns, shape, latent)


def corner_core(shape: Sequence[int], latent: int) -> Bool[Tensor, "channels height width"]:
    """The d values nearest to the upper left corner.

    >>> corner_core((1, 3, 3), 4)[0].int().tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    """
    rows, columns = (torch.arange(size) for size in shape[1:])
    return _nearest(rows[:, None], columns, shape, latent)


def random_core(
    shape: Sequence[int], latent: int, *, generator: torch.Generator
) -> Bool[Tensor, "channels height width"]:
    """The mask of d values that are chosen at random."""
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    mask[torch.randperm(len(mask), generator=generator)[:latent]] = True
    return mask.reshape(*shape)


def _nearest(rows: Tensor, columns: Tensor, shape: Sequence[int], latent: int) -> Tensor:
    """The first d values by the larger of the two distances, then by their sum, pixel by pixel."""
    channels, height, width = shape
    # one integer per pixel sorts by both: ``far`` exceeds every sum of two distances
    far = 1 + height + width + int(rows.max()) + int(columns.max())
    order = (torch.maximum(rows, columns) * far + rows + columns).flatten().argsort(stable=True)
    mask = torch.zeros(height * width, channels, dtype=torch.bool)
    chosen = torch.arange(latent)
    mask[order[chosen // channels], chosen % channels] = True
    return mask.T.reshape(*shape)


class CoreLast(Rearrangement):
    """(B, C, H, W) -> [shell, core], (B, D): the values of the mask come last; log|det J| = 0.

    Args:
        core: boolean, (C, H, W).
    """

    order: Tensor
    back: Tensor

    def __init__(self, core: Bool[Tensor, "channels height width"]) -> None:
        super().__init__()
        # stable: within the shell and within the core the values keep their order
        order = core.flatten().int().argsort(stable=True)
        self.shape = tuple(core.shape)
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    def forward(self, x: Tensor) -> Tensor:
        """The values as [shell, core], (B, D)."""
        return x.flatten(1).index_select(1, self.order)

    def inverse(self, z: Tensor) -> Tensor:
        """The image (B, C, H, W) of [shell, core]."""
        return z.index_select(1, self.back).reshape(-1, *self.shape)


class _ShellImages(nn.Module):
    """A shell (B, S) as images with zeros in place of the core."""

    back: Tensor

    def __init__(self, arrangement: CoreLast, latent: int) -> None:
        super().__init__()
        self.latent, self.shape = latent, arrangement.shape
        self.register_buffer("back", arrangement.back)

    def forward(self, shell: Tensor) -> Tensor:
        padded = nn.functional.pad(shell, (0, self.latent))
        return padded.index_select(1, self.back).reshape(-1, *self.shape)


class _ShellOf(nn.Module):
    """The shell (B, S) of images."""

    order: Tensor

    def __init__(self, arrangement: CoreLast, latent: int) -> None:
        super().__init__()
        self.register_buffer("order", arrangement.order[: len(arrangement.order) - latent])

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).index_select(1, self.order)


class PartitionAEF(Chain):
    """An AEF of the image itself: d of its values are the core, the others the shell.

    It is a bijection of R^D.

    Args:
        config: sizes, nets, flows and preprocessing.
        core: which values are the core: ``center_core``, ``corner_core``, or
            ``functools.partial(random_core, generator=...)``.

    References:
        Deterministic Training of Generative Autoencoders Using Invertible Layers (Silvestri, Roos,
        Ambrogioni, 2023), section 3.1, algorithm 2.
    """

    def __init__(self, config: AutoencoderConfig, core: CoreMaker = center_core) -> None:
        arrangement = CoreLast(core(config.shape, config.latent))
        encoder, decoder = config.nets(config.shape, config.latent)
        nets = AutoencoderNets(
            nn.Sequential(_ShellImages(arrangement, config.latent), encoder),
            nn.Sequential(decoder, _ShellOf(arrangement, config.latent)),
        )
        flow = config.flow(nets, shell=config.dims - config.latent)
        super().__init__(*config.preprocessing(config.shape[0]), arrangement, flow)
        self.config = config

    @property
    def flow(self) -> CoreShellFlow:
        """The autoencoder after the preprocessing."""
        return self.steps[-1]  # type: ignore[return-value]

    def loss(self, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """Mean of -log p(x) in nats, exact; the generator is not used."""
        return -self.log_prob(x).mean()

    def encode(self, x: Tensor) -> Float[Tensor, "batch latent"]:
        """The latent code z, (B, d), before the prior flow."""
        for step in self.steps[:-1]:
            x = step(x)
        return self.flow.encode(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        """The image with the same z and no residual; with the shell its core changes too."""
        residual, u = self(x).split([self.flow.shell, self.flow.latent], dim=1)
        return self.inverse(torch.cat([torch.zeros_like(residual), u], dim=1))

    def sample(
        self,
        count: int,
        *,
        temperature: float = 1.0,
        noise: float = 0.0,
        generator: torch.Generator,
    ) -> Float[Tensor, "count channels height width"]:
        """Images x = [n((z - g_m(f(z))) / g_s(f(z))), f(z)] with z ~ p_0.

        z is u ~ N(0, temperature^2 I) through the inverse of the prior flow.

        Args:
            count: number of images.
            temperature: 0.85 in the paper's figures; 1 is the trained model.
            noise: scale of the residuals that are added to f(z), in sigma: 0 in the paper, 1 is the
                trained model.
            generator: on the CPU.
        """
        latents = self.flow.draw(count, temperature=temperature, noise=noise, generator=generator)
        return self.inverse(latents)


class LinearAEF(ExpandedAutoencoder):
    """An AEF in the space expanded by linear features w = h(x) of the preprocessed image.

    Trained on log p(x, h(x)), a density on R^(D + d). That objective alone has no maximum: h / c
    with c n^-1 is the same autoencoder and gains d log c. ``spread`` > 0 trains on w ~ N(h(x),
    spread^2 I) instead, equation 15 before its limit, which is bounded.

    Args:
        config: sizes, nets, flows and preprocessing.
        spread: standard deviation of w around h(x) in training; 0 in the paper.

    Attributes:
        width: of the proposal for importance sampling; set it with ``tune``.

    References:
        Deterministic Training of Generative Autoencoders Using Invertible Layers (Silvestri, Roos,
        Ambrogioni, 2023), sections 3.2 and 3.3, algorithms 1 and 3.
    """

    width: Tensor

    def __init__(self, config: AutoencoderConfig, *, spread: float = 0.0) -> None:
        super().__init__(config)
        if not 0 <= spread < math.inf:
            raise ValueError(f"expected a finite spread >= 0, got {spread}")
        self.features = nn.Linear(config.dims, config.latent)
        self.spread = spread
        self.register_buffer("width", torch.tensor(0.1))

    def proposal(self, shell: Float[Tensor, "batch dims"]) -> Proposal:
        """The proposal N(h(x), width^2 I)."""
        return Proposal(self.features(shell), float(self.width))

    def loss(self, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """Mean of -log p(x, w) in nats, w = h(x) or around it."""
        expanded = self.expand(x)
        if self.spread:
            noise = draw_normal((len(x), self.config.latent), like=x, generator=generator)
            expanded = expanded + self.spread * nn.functional.pad(noise, (0, self.config.dims))
        return -self.joint.log_prob(expanded).mean()

    def tune(
        self,
        validation: Tensor,
        *,
        widths: Iterable[float] = WIDTHS,
        draws: int = 128,
        generator: torch.Generator,
    ) -> float:
        """Set the proposal's width to the best one on validation data, and return it."""
        shell, _ = self.preprocessed(validation)

        def score(width: float) -> Tensor:
            proposal = replace(self.proposal(shell), width=width)
            estimate = self.importance(
                validation, proposal=proposal, draws=draws, repetitions=1, generator=generator
            )
            return estimate.lower_bound

        self.width.fill_(tuned_width(score, widths))
        return float(self.width)

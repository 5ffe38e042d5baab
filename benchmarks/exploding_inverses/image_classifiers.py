"""INN classifiers of images: couplings, shuffles or 1x1 convolutions, and regularizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.exploding_inverses.image_training import Batch
from inn_guard.core.invertible import Invertible
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.permutation import Permutation
from inn_guard.models.glow import (
    CouplingMaker,
    GlowConfig,
    MixingMaker,
    glow_classifier,
    projection_head,
)
from inn_guard.training.regularizer_hook import RegularizerHook
from inn_guard.training.regularizers import FiniteDifferences, NormalizingFlowLoss

__all__ = ["COUPLINGS", "MIXINGS", "Classifier", "FiniteDifferencesTerm", "Run", "Term"]

COUPLINGS: dict[str, CouplingMaker] = {
    "additive": AdditiveCoupling.on_halves,
    "affine": AffineCoupling.on_halves,
}


def _shuffles(seed: int) -> MixingMaker:
    generator = torch.Generator().manual_seed(seed)
    return lambda channels: Permutation.shuffle(channels, generator=generator)


REGULARIZERS = ("none", "FD", "NF")
MIXINGS: dict[str, Callable[[int], MixingMaker]] = {
    "shuffle": _shuffles,
    "conv": lambda seed: InvertibleLinear,
}


@dataclass(frozen=True)
class Run:
    """One training, named after couplings, mixing and regularizer, such as "affine conv FD 1e-4".

    Attributes:
        coupling: a key of COUPLINGS.
        mixing: a key of MIXINGS.
        regularizer: none, FD or NF.
        coefficient: of the regularizer.
    """

    coupling: str
    mixing: str
    regularizer: str
    coefficient: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Run:
        """The run with this name.

        Raises:
            ValueError: if a word or the coefficient is wrong.
        """
        coupling, mixing, regularizer, *rest = [*text.split(), "", "", ""]
        numbers = [float(part) for part in rest if part]
        known = coupling in COUPLINGS and mixing in MIXINGS and regularizer in REGULARIZERS
        if not known:
            raise ValueError(
                "expected a run such as 'affine conv FD 1e-4' or 'additive shuffle none', "
                f"got {text!r}"
            )
        if len(numbers) != (regularizer != "none"):
            raise ValueError(
                f"expected one coefficient after FD or NF and none after none, got {text!r}"
            )
        return cls(coupling, mixing, regularizer, *numbers)

    @property
    def reversible(self) -> bool:
        """Whether its inverse should hold during training, so that no activations are stored."""
        return self.regularizer != "none" or self.coupling == "additive"


class Classifier(nn.Module):
    """Invertible trunk, then BatchNorm - ReLU - Linear.

    Args:
        run: which layers.
        shape: (C, H, W) of one image.
        levels: of the trunk.
        blocks: per level.
        hidden: channels of the couplings' networks.
        seed: of the weights and shuffles.
    """

    def __init__(
        self,
        run: Run,
        shape: tuple[int, int, int],
        *,
        levels: int,
        blocks: int,
        hidden: int,
        seed: int,
    ) -> None:
        super().__init__()
        config = GlowConfig(
            levels,
            blocks,
            hidden,
            coupling=COUPLINGS[run.coupling],
            mixing=MIXINGS[run.mixing](seed),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inn = glow_classifier(shape, config=config)
            self.head = projection_head(int(torch.tensor(shape).prod()), 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10)."""
        return self.head(self.inn(x))


class Term:
    """What a regularizer adds to the loss of a batch; nothing here."""

    def latents(self, inn: Invertible, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """z = F(x), and the penalty."""
        return inn(x), 0.0


@dataclass(frozen=True)
class NormalizingFlowTerm(Term):
    """NF at every step, from the task's own forward pass."""

    coefficient: float

    def latents(self, inn: Invertible, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """z, and the normalizing-flow loss of the same pass."""
        z, log_det = inn.forward_and_log_det(x)
        return z, NormalizingFlowLoss(self.coefficient).from_forward(z, log_det)


@dataclass(frozen=True)
class FiniteDifferencesTerm(Term):
    """FD at every K-th step, on a share of the batch, with noise that depends on the step alone."""

    coefficient: float
    every: int
    fraction: float
    regularizer: FiniteDifferences = field(init=False)

    def __post_init__(self) -> None:
        share = None
        if self.fraction < 1:
            share = self.fraction
        object.__setattr__(self, "regularizer", FiniteDifferences(self.coefficient, fraction=share))

    def latents(self, inn: Invertible, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """z, and the penalty where it is due."""
        self.regularizer.generator.manual_seed(batch.generator.initial_seed())
        z = inn(x)
        hook = RegularizerHook(inn, [self.regularizer], every=self.every)
        return z, hook(x, z=z, step=batch.step)


def term(run: Run, *, every: int, fraction: float) -> Term:
    """The term of a run; ``every`` and ``fraction`` concern FD."""
    if run.regularizer == "NF":
        return NormalizingFlowTerm(run.coefficient)
    if run.regularizer == "FD":
        return FiniteDifferencesTerm(run.coefficient, every, fraction)
    return Term()

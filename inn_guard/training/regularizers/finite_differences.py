"""Bi-directional finite differences: keeps |J_F| and |J_F^-1| small along random directions."""

from __future__ import annotations

import enum
import math
from dataclasses import KW_ONLY, dataclass, field

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.execution.parallel import Group, rank_noise
from inn_guard.training.regularizers.autocast import autocast_disabled, reusable
from inn_guard.training.regularizers.checks import check_coefficient, is_number
from inn_guard.training.regularizers.deterministic import require_deterministic

__all__ = ["Direction", "FiniteDifferences"]


class Direction(enum.Flag):
    """Which Jacobians are penalised: of F, of F^-1, or both."""

    FORWARD = enum.auto()
    INVERSE = enum.auto()
    BOTH = FORWARD | INVERSE


@dataclass(frozen=True)
class FiniteDifferences:
    """coefficient * (mean squared Frobenius norms of J_F(x) and of J_F^-1(z)), estimated along one direction a sample.

        R_fwd = mean_B |F(x + eps v) - F(x)|^2 / eps^2              -> mean_B |J_F(x)|_F^2      as eps -> 0
        R_inv = mean_B |F^-1(z + eps v*) - F^-1(z)|^2 / eps^2       -> mean_B |J_F^-1(z)|_F^2,  z = F(x)

    with v, v* ~ N(0, I); for a linear map both expectations are exact at every eps. z keeps its graph, so the gradient
    is that of R as a function of the parameters. F^-1(z) is x then, in value and in derivative, and x is what is
    used: one inverse pass less, and a numerical inverse that has come apart from x is penalised for it. Maps that are
    only injective have F^-1(F(x)) computed, which is a projection of x.

    The noise comes from a generator of its own, drawn on the CPU in the order rows, v, v*: the global generators stay
    as they are, and every device sees the same noise. In a distributed run give every process the same seed and its
    ``group``: each takes its part of the noise of all batches, and the averaged gradient is that of one process with
    all of them. Without the group give each process a seed of its own. Under autocast all passes run in float32 and a
    given z, being rounded, is computed anew. NaN and Inf come out as they are. A model in training mode sees the noisy
    batches too: BatchNorm in it counts them in its running statistics; dropout, which makes another map of every pass,
    is refused. Clip the gradient's norm where data have outliers, and leave out a step whose gradient is not finite:
    one sample at which the inverse explodes makes a penalty of any size, NaN included.

    This differs from the paper in: nothing; its published code divides by eps instead of eps^2, draws v so scaled that
    the penalty is eps times the one above, and sums where the text averages, so that a coefficient c there acts about
    like 0.1 c here.

    Args:
        coefficient: c >= 0; the paper searched 1e-3, 1e-4, 5e-5.
        direction: which of R_fwd and R_inv are added up.
        eps: step, > 0; 0.1 rather than tiny, against catastrophic cancellation.
        fraction: penalise a random share of the batch only, in (0, 1]; None: all of it. An unbiased estimate.
        seed: of the noise.
        group: the torch.distributed group whose processes hold one batch each, all of one size; None: this one alone.

    Attributes:
        generator: source of the noise; its state is what a training run must save to resume exactly.

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann, Vicol, Wang, Grosse,
        Jacobsen, 2021), section 3.2, equation 6.
    """

    coefficient: float
    _: KW_ONLY
    direction: Direction = Direction.BOTH
    eps: float = 0.1
    fraction: float | None = None
    seed: int = 0
    group: Group | None = field(default=None, repr=False, compare=False)
    generator: torch.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_coefficient(self.coefficient)
        if not (is_number(self.eps) and 0 < self.eps < math.inf):
            raise ValueError(f"expected a finite step eps > 0; got {self.eps!r}")
        if self.fraction is not None and not (is_number(self.fraction) and 0 < self.fraction <= 1):
            raise ValueError(
                f"expected a fraction of the batch in (0, 1], or None for all of it; got {self.fraction!r}"
            )
        if not isinstance(self.direction, Direction) or not self.direction:
            raise ValueError(
                f"expected Direction.FORWARD, .INVERSE or .BOTH; got {self.direction!r}"
            )
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))

    def __call__(
        self, model: Invertible, x: Shaped[Tensor, "batch *data"], z: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """The penalty at a batch.

        Args:
            model: the map F.
            x: data, (B, *data).
            z: F(x) with its graph, if it has been computed already, (B, *latent).

        Returns:
            A scalar with gradients for the parameters of F (and for x, if x wants them).

        Raises:
            ValueError: if x is empty, z does not belong to it, or F(x) depends on random numbers.
        """
        z = reusable(z, x)
        if z is not None:
            _require_graph(model, z)
        model, x, z = self._subset(model, x, z)
        with autocast_disabled(x) as x, require_deterministic(model, x):
            z = model(x) if z is None else z
            penalty = torch.zeros((), dtype=z.dtype, device=z.device)
            if Direction.FORWARD in self.direction:
                penalty = penalty + self._mean_square(model(x + self._noise(x)), z)
            if Direction.INVERSE in self.direction:
                origin = x if model.bijective else model.inverse(z)
                penalty = penalty + self._mean_square(model.inverse(z + self._noise(z)), origin)
            return self.coefficient * penalty

    def _subset(
        self, model: Invertible, x: Tensor, z: Tensor | None
    ) -> tuple[Invertible, Tensor, Tensor | None]:
        if self.fraction in (None, 1) or len(x) == 0:
            return model, x, z
        count = math.ceil(self.fraction * len(x))
        rows = torch.randperm(len(x), generator=self.generator, device="cpu")[:count].to(x.device)
        return model.select(rows), x[rows], None if z is None else z[rows]

    def _noise(self, like: Tensor) -> Tensor:
        noise = rank_noise(like.shape, generator=self.generator, dtype=like.dtype, group=self.group)
        return self.eps * noise.to(like.device)

    def _mean_square(self, moved: Tensor, origin: Tensor) -> Tensor:
        """mean_B |moved - origin|^2 / eps^2, subtracted in float32 at least."""
        difference = moved.to(torch.promote_types(moved.dtype, torch.float32)) - origin
        return difference.flatten(1).square().sum(1).mean() / self.eps**2


def _require_graph(model: Invertible, z: Tensor) -> None:
    if (
        torch.is_grad_enabled()
        and not z.requires_grad
        and any(p.requires_grad for p in model.parameters())
    ):
        raise ValueError(
            "expected z = model(x) with its graph; got one without (detached or computed under no_grad), which would "
            "lose part of the gradient: leave z out to have it computed"
        )

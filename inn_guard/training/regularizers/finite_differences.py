"""Finite differences: keep |J_F| and |J_F^-1| small along random directions."""

from __future__ import annotations

import enum
import math
from dataclasses import KW_ONLY, dataclass, field

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.execution.parallel import Group, rank_noise
from inn_guard.training.regularizers.checks import check_batch, check_coefficient, is_number
from inn_guard.training.regularizers.passes import (
    autocast_disabled,
    require_deterministic,
    z_if_exact,
)

__all__ = ["Direction", "FiniteDifferences"]

LARGEST_STEP = 1e18  #: whose square is far from the largest float32


class Direction(enum.Flag):
    """Which Jacobians are penalised: of F, of F^-1, or both."""

    FORWARD = enum.auto()
    INVERSE = enum.auto()
    BOTH = FORWARD | INVERSE


@dataclass(frozen=True)
class FiniteDifferences:
    """coefficient * (mean squared Frobenius norms of J_F and J_F^-1), one random direction each.

        R_fwd = mean_B |F(x + eps v) - F(x)|^2 / eps^2           -> mean_B |J_F(x)|_F^2
        R_inv = mean_B |F^-1(z + eps v*) - F^-1(z)|^2 / eps^2    -> mean_B |J_F^-1(z)|_F^2

    as eps -> 0, with z = F(x) and v, v* ~ N(0, I). For a linear map both expectations are exact at
    every eps. z keeps its
    graph, so the gradient is that of R as a function of the parameters. For a bijection F^-1(z) is
    x, in value and in derivative, and x is used: this saves an inverse pass, and a numerical
    inverse that has drifted away from x is penalised for it. For a map that is only injective
    F^-1(F(x)), a projection of x, is computed.

    **What helps against which failure.** The default protects the gradients and inverses at the
    data. It does not repair a flow whose *samples* are lost: too many stay lost.
    For sampling penalise F^-1 alone, either at the data, steady and cheap, with a coefficient of 1
    to 10 every 5th step,

        FiniteDifferences(1.0, direction="inverse")

    or at draws of the model's own base, z = F(x) being replaced by z ~ base of deviation s per
    feature and the step by eps s v*:

        FiniteDifferences(1.0, direction="inverse", at="prior", form="log")
        R_log = D mean log(1 + |F^-1(z + eps s v*) - F^-1(z)|^2 / (eps^2 D)),   D = size of z

    where the mean is over the draws with a finite difference: a single draw cannot dominate the
    step. A coefficient of 0.1 for a hundred steps repairs a trained flow at a small cost in
    likelihood. Limit the gradient's norm and leave out steps whose gradient is not finite:
    ``RegularizerHook.step`` does both.

    The noise comes from a generator of its own on the CPU, drawn in the order rows, z, v, v*: the
    global generators stay as they are, and every device sees the same noise. In a distributed run
    give every process the same seed and its ``group``: each takes its part of the noise of all
    batches, and the averaged gradient is that of one process with all of them. Without the group
    give each process its own seed. Under autocast all passes run in float32, and a given z, being
    rounded, is computed again. In the square form NaN and Inf are passed on. A model in training
    mode sees the noisy batches too: BatchNorm counts them in its running statistics.

    This differs from the paper in: the options above, which are off by default. The published code
    follows another convention than the paper's text; ``published`` builds that one.

    Args:
        coefficient: c >= 0; the paper searched 1e-3, 1e-4, 5e-5.
        direction: which of R_fwd and R_inv are added up: "forward", "inverse" or "both".
        at: "data", or "prior" for latents drawn from the model's base (with direction "inverse").
        form: "square" as above, or "log".
        eps: step, > 0; 0.1 rather than a tiny one, because of cancellation.
        fraction: penalise a random share of the batch only, in (0, 1]; None: all of it. The
            estimate stays unbiased.
        seed: seed of the noise.
        group: torch.distributed group whose processes hold one batch each, all of one size; None:
            this process alone.
        convention: "paper", or "published"; see ``published``.

    Attributes:
        generator: source of the noise; its state must be saved to resume a run exactly.

    Raises:
        ValueError: if a setting is out of its range, or two of them contradict each other.

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), section 3.2, equation 6.
    """

    coefficient: float
    _: KW_ONLY
    direction: Direction | str = Direction.BOTH
    at: str = "data"
    form: str = "square"
    eps: float = 0.1
    fraction: float | None = None
    seed: int = 0
    group: Group | None = field(default=None, repr=False, compare=False)
    convention: str = field(default="paper", repr=False)
    generator: torch.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_coefficient(self.coefficient)
        if not (is_number(self.eps) and 0 < self.eps < LARGEST_STEP):
            raise ValueError(f"expected a finite step eps > 0, below 1e18; got {self.eps!r:.60}")
        object.__setattr__(self, "eps", float(self.eps))
        if self.fraction is not None and not (is_number(self.fraction) and 0 < self.fraction <= 1):
            raise ValueError(
                "expected a fraction of the batch in (0, 1], or None for all of it; "
                f"got {self.fraction!r}"
            )
        object.__setattr__(self, "direction", _checked_direction(self.direction))
        _check_choice("at", self.at, ("data", "prior"))
        _check_choice("form", self.form, ("square", "log"))
        _check_choice("convention", self.convention, ("paper", "published"))
        if self.at == "prior" and self.direction is not Direction.INVERSE:
            raise ValueError(
                'expected direction="inverse" with at="prior", because draws of the base are '
                f"latents; got {self.direction}"
            )
        plain = self.at == "data" and self.form == "square" and self.group is None
        if self.convention == "published" and not plain:
            raise ValueError(
                'expected at="data", form="square" and no group with convention="published"'
            )
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if not whole or not abs(self.seed) < 2**63:
            raise ValueError(f"expected seed as a whole number of 63 bits; got {self.seed!r:.60}")
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))

    @classmethod
    def published(
        cls,
        coefficient: float,
        *,
        direction: Direction | str = Direction.BOTH,
        eps: float = 0.1,
        seed: int = 0,
    ) -> FiniteDifferences:
        """The penalty as the published code of the paper computes it, to reproduce its runs.

            R_fwd = sum_B |F(x + eps d) - F(x)|^2 / eps,    d = v / (norm of v over the batch)

        and R_inv alike. Each coordinate of d has the deviation 1 / sqrt(B), so with the same noise
        this is ``FiniteDifferences(coefficient * eps, eps=eps / sqrt(B))`` at a batch of B samples:
        the value is about eps times that of the paper's text, the step is shorter by the exact
        factor sqrt(B).

        Args:
            coefficient: c >= 0.
            direction: "forward", "inverse" or "both".
            eps: nominal step, > 0; 0.1 in the published code.
            seed: seed of the noise.
        """
        return cls(coefficient, direction=direction, eps=eps, seed=seed, convention="published")

    def __call__(
        self, model: Invertible, x: Shaped[Tensor, "batch *data"], z: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """The penalty at a batch.

        Args:
            model: the map F.
            x: data, (B, *data). With at="prior" as many latents are drawn as x has samples.
            z: F(x) with its graph, if it has been computed already, (B, *latent).

        Returns:
            A scalar with gradients for the parameters of F, and for x if it requires them.

        Raises:
            ValueError: if x is empty, z does not belong to it, or F(x) depends on random numbers.
        """
        check_batch(model, x, z)
        z = z_if_exact(z, x)
        if z is not None and self.at == "data":
            _require_graph(model, z)
        model, x, z = self._subset(model, x, z)
        with autocast_disabled(x) as x, require_deterministic(model, x):
            if self.at == "prior":
                penalty = self._at_prior(model, x, z)
            else:
                penalty = self._at_data(model, x, z)
            return self.coefficient * penalty

    def _subset(
        self, model: Invertible, x: Tensor, z: Tensor | None
    ) -> tuple[Invertible, Tensor, Tensor | None]:
        if self.fraction in (None, 1) or len(x) == 0:
            return model, x, z
        count = math.ceil(self.fraction * len(x))
        rows = torch.randperm(len(x), generator=self.generator, device="cpu")[:count].to(x.device)
        if z is not None:
            z = z[rows]
        return model.select(rows), x[rows], z

    def _at_data(self, model: Invertible, x: Tensor, z: Tensor | None) -> Tensor:
        if z is None:
            z = model(x)
        direction = Direction(self.direction)  # names have become members in __post_init__
        penalty = torch.zeros((), dtype=z.dtype, device=z.device)
        if Direction.FORWARD in direction:
            step = self._step(x)
            penalty = penalty + self._term(model, Direction.FORWARD, start=x, step=step, image=z)
        if Direction.INVERSE in direction:
            image = x
            if not model.bijective:
                image = model.inverse(z)
            step = self._step(z)
            penalty = penalty + self._term(
                model, Direction.INVERSE, start=z, step=step, image=image
            )
        return penalty

    def _at_prior(self, model: Invertible, x: Tensor, z: Tensor | None) -> Tensor:
        start, deviation = self._base_draws(model, x, z)
        step = deviation * self._step(start)
        image = model.inverse(start)
        return self._term(model, Direction.INVERSE, start=start, step=step, image=image)

    def _base_draws(self, model: Invertible, x: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """One latent per sample from the model's base, and the base's deviation per feature."""
        base = model.base()
        if base is not None:
            seed = int(torch.randint(2**31, (), generator=self.generator))
            rank, processes = 0, 1
            if self.group is not None:
                rank, processes = dist.get_rank(self.group), dist.get_world_size(self.group)
            draws = base.draw(processes * len(x), seed)
            return draws[rank * len(x) :][: len(x)], base.deviation
        if z is None:
            with torch.no_grad():
                z = model(x)
        return self._noise(z), z.new_ones(())

    def _term(
        self,
        model: Invertible,
        direction: Direction,
        *,
        start: Tensor,
        step: Tensor,
        image: Tensor,
    ) -> Tensor:
        """The penalty on f, F or its inverse: f(start + step) against image = f(start)."""
        f = model.inverse
        if direction is Direction.FORWARD:
            f = model
        squares = self._squares(f(start + step), image)
        if self.form == "square":
            return squares.mean()
        size = start[0].numel()
        finite = squares.isfinite()
        if finite.all():
            return size * (squares / size).log1p().mean()
        if not finite.any():
            return squares.new_zeros(())
        # A lost draw weighs 0 in the mean, but 0 * inf in the backward pass makes the gradient
        # of all parameters NaN. So the graph is built again without it.
        rows = finite.nonzero().squeeze(1)
        kept = model.select(rows)
        image = image[rows]
        if self.at == "prior":
            image = kept.inverse(start[rows])
        return self._term(kept, direction, start=start[rows], step=step[rows], image=image)

    def _noise(self, like: Tensor) -> Tensor:
        noise = rank_noise(like.shape, generator=self.generator, dtype=like.dtype, group=self.group)
        return noise.to(like.device)

    def _step(self, like: Tensor) -> Tensor:
        v = self._noise(like)
        if self.convention == "published":
            v = v / v.norm(dim=0)
        return self.eps * v

    def _squares(self, moved: Tensor, image: Tensor) -> Tensor:
        """|moved - image|^2 / eps^2 of each sample, (B,), subtracted in float32 at least."""
        difference = moved.to(torch.promote_types(moved.dtype, torch.float32)) - image
        squares = difference.flatten(1).square().sum(1)
        if self.convention == "published":
            # the published code sums over the batch and divides by eps
            return squares * len(squares) / self.eps
        return squares / self.eps**2


def _checked_direction(direction: object) -> Direction:
    if isinstance(direction, str) and direction.upper() in Direction.__members__:
        return Direction[direction.upper()]
    if isinstance(direction, Direction) and direction:
        return direction
    raise ValueError(f'expected direction as "forward", "inverse" or "both"; got {direction!r}')


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        expected = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"expected {name} as {expected}; got {value!r}")


def _require_graph(model: Invertible, z: Tensor) -> None:
    if not torch.is_grad_enabled() or z.requires_grad:
        return
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "expected z = model(x) with its graph; got one that is detached or was computed under "
            "no_grad, which would lose part of the gradient: leave z out to have it computed"
        )

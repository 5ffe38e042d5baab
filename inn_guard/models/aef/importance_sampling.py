"""Importance sampling of log p(x) = log int p(x, w) dw with a Gaussian proposal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from inn_guard.core.tensors import draw_normal

__all__ = ["ImportanceEstimate", "Proposal", "importance_log_prob", "tuned_width"]

Joint = Callable[[Tensor], Tensor]  #: w (B, K, d) -> log p(x, w), (B, K)


@dataclass(frozen=True)
class Proposal:
    """q(w | x) = N(center, width^2 I).

    Attributes:
        center: (B, d).
        width: standard deviation.
    """

    center: Tensor
    width: float

    def sample(self, draws: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """K draws w, (B, K, d), and log q(w) in nats, (B, K)."""
        rows, dims = self.center.shape
        noise = draw_normal((rows, draws, dims), like=self.center, generator=generator)
        constant = dims * (math.log(self.width) + 0.5 * math.log(2 * math.pi))
        return self.center[:, None] + self.width * noise, -0.5 * noise.square().sum(2) - constant


@dataclass(frozen=True)
class ImportanceEstimate:
    """log p(x) of every sample in nats, with figures of its accuracy. All of shape (B,).

    Attributes:
        log_prob: log of the mean weight of all A K draws.
        lower_bound: mean over the A repetitions of the log of the mean of K weights; below log p(x)
            in expectation.
        standard_error: of log_prob, from the spread of the A repetitions; nan for one.
        effective_draws: (sum of weights)^2 / sum of squared weights, between 1 and A K.
    """

    log_prob: Tensor
    lower_bound: Tensor
    standard_error: Tensor
    effective_draws: Tensor


@torch.no_grad()
def importance_log_prob(
    joint: Joint,
    proposal: Proposal,
    *,
    draws: int = 128,
    repetitions: int = 20,
    generator: torch.Generator,
) -> ImportanceEstimate:
    """log p(x) in nats by importance sampling.

        log p(x) = log E_q[(1/K) sum_k p(x, w_k) / q(w_k | x)],   w_k ~ q(w | x)

    This differs from the paper in: both readings of its "average of 20 times 128 samples" are
    returned, the logarithm of the average (its equation 18) and the average of the logarithms,
    which is a lower bound.

    Args:
        joint: w (B, K, d) -> log p(x, w), (B, K).
        proposal: q(w | x).
        draws: K, per repetition.
        repetitions: A.
        generator: source of w, on the CPU.

    References:
        Deterministic Training of Generative Autoencoders Using Invertible Layers (Silvestri, Roos,
        Ambrogioni, 2023), equations 17 and 18, appendix D.6.
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2016).
    """
    # logarithms of sums throughout: the weights themselves are far out of the range of floats
    means, squares = [], []
    for _ in range(repetitions):
        w, log_q = proposal.sample(draws, generator=generator)
        log_weights = (joint(w) - log_q).double()
        means.append(log_weights.logsumexp(1) - math.log(draws))
        squares.append((2 * log_weights).logsumexp(1))
    stacked = torch.stack(means)
    log_prob = stacked.logsumexp(0) - math.log(repetitions)
    spread = torch.full_like(log_prob, math.nan)
    if repetitions > 1:
        # relative deviation of the mean weights, which is the deviation of its logarithm
        spread = (stacked - log_prob).exp().std(0)
    total = log_prob + math.log(repetitions * draws)
    effective = (2 * total - torch.stack(squares).logsumexp(0)).exp()
    return ImportanceEstimate(log_prob, stacked.mean(0), spread / math.sqrt(repetitions), effective)


def tuned_width(score: Callable[[float], Float[Tensor, "batch"]], widths: Iterable[float]) -> float:
    """The width with the largest finite mean score over validation data.

    Args:
        score: width -> log p(x) of validation data, (B,); a better proposal has a larger lower
            bound.
        widths: candidates.

    Raises:
        ValueError: if no width has a finite score.
    """
    scores = {width: score(width).mean().item() for width in widths}
    finite = [width for width in scores if math.isfinite(scores[width])]
    if not finite:
        raise ValueError(f"expected a width with finite scores, got {scores}")
    return max(finite, key=lambda width: scores[width])

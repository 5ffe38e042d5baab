"""log|det(I + G)| of a residual layer: exact, by a truncated power series, or without bias.

With G = dg/dx of norm below 1, log|det(I + G)| = tr log(I + G) = sum_k (-1)^(k+1) tr(G^k) / k, and
tr(G^k) = E[v^T G^k v] for v ~ N(0, I): one vector-Jacobian product per term.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from inn_guard.core.layer_jacobian import Map

__all__ = ["ExactLogDet", "PowerSeries", "ResidualLogDet", "RussianRoulette"]


class ResidualLogDet(nn.Module, abc.ABC):
    """A way to compute log|det(I + G)|, differentiable in x and in the parameters of g."""

    def forward(self, g: Map, x: Tensor) -> tuple[Tensor, Tensor]:
        """g(x), and log|det(I + G)| at x in nats, (B,)."""
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # products with G need a graph of g even where the caller wants none
            point = x
            if not (graph and x.requires_grad):
                point = x.detach().requires_grad_()
            value = g(point)

            def pull(u: Tensor) -> Tensor:
                (row,) = torch.autograd.grad(value, point, u, create_graph=graph, retain_graph=True)
                return row

            log_det = self.of_products(pull, point)
        if graph:
            return value, log_det
        return value.detach(), log_det.detach()

    @abc.abstractmethod
    def of_products(self, pull: Map, x: Tensor) -> Tensor:
        """log|det(I + G)| at x in nats, (B,), from the products ``pull``: u -> G^T u."""


class ExactLogDet(ResidualLogDet):
    """From the dense Jacobian: D vector-Jacobian products and an LU factorisation. For small D."""

    def of_products(self, pull: Map, x: Tensor) -> Tensor:
        """log|det(I + G)| in nats, (B,), by LU."""
        flat = x.flatten(1)
        eye = torch.eye(flat.shape[1], dtype=x.dtype, device=x.device)
        rows = [pull(row.expand_as(flat).reshape(x.shape)).flatten(1) for row in eye]
        return torch.linalg.slogdet(eye + torch.stack(rows, dim=1)).logabsdet


class _Stochastic(ResidualLogDet):
    """An estimate by its own generator: new draws at every call in training mode, else the same.

    Args:
        probes: random vectors per sample.
        seed: of the generator.
    """

    draws: Tensor

    def __init__(self, *, probes: int, seed: int) -> None:
        super().__init__()
        if probes < 1:
            raise ValueError(f"expected at least one probe, got {probes}")
        self.probes, self.seed = probes, seed
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def of_products(self, pull: Map, x: Tensor) -> Tensor:
        """The mean over the probes of sum_k (-1)^(k+1)/k v^T G^k v weight_k."""
        generator = torch.Generator().manual_seed(self.seed + int(self.draws))
        if self.training:
            self.draws += 1
        weights = list(self.weights(generator))
        total = x.new_zeros(len(x))
        for _ in range(self.probes):
            v = torch.randn(x.shape, generator=generator, device="cpu", dtype=torch.float64).to(x)
            w = v
            for k, weight in enumerate(weights, start=1):
                w = pull(w)
                total = total + (weight * (-1) ** (k + 1) / k) * (w * v).flatten(1).sum(1)
        return total / self.probes

    @abc.abstractmethod
    def weights(self, generator: torch.Generator) -> Iterator[float]:
        """The weight of each term of the series that is computed."""


class PowerSeries(_Stochastic):
    """Hutchinson's estimate of the first n terms of the series.

    Its bias is at most D c^(n+1) / ((n+1)(1-c)), c = Lip(g).

    Args:
        terms: n.
        probes: random vectors per sample.
        seed: of the generator.

    References:
        Invertible Residual Networks (Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, 2019),
        algorithm 2.
    """

    def __init__(self, *, terms: int = 10, probes: int = 1, seed: int = 0) -> None:
        super().__init__(probes=probes, seed=seed)
        if terms < 1:
            raise ValueError(f"expected at least one term, got {terms}")
        self.terms = terms

    def weights(self, generator: torch.Generator) -> Iterator[float]:
        """The weight 1 for each of the n terms."""
        return iter([1.0] * self.terms)


class RussianRoulette(_Stochastic):
    """Unbiased: a random number of terms, each divided by the probability of being reached.

    Args:
        exact_terms: number of terms that are always computed.
        stop: probability of stopping after each further term.
        probes: random vectors per sample.
        seed: of the generator.

    References:
        Residual Flows for Invertible Generative Modeling (Chen, Behrmann, Duvenaud,
        Jacobsen, 2019), theorem 1.
    """

    def __init__(
        self, *, exact_terms: int = 8, stop: float = 0.5, probes: int = 1, seed: int = 0
    ) -> None:
        super().__init__(probes=probes, seed=seed)
        if not 0 < stop < 1 or exact_terms < 0:
            raise ValueError(
                f"expected 0 < stop < 1 and exact_terms >= 0, got {stop}, {exact_terms}"
            )
        self.exact_terms, self.stop = exact_terms, stop

    def weights(self, generator: torch.Generator) -> Iterator[float]:
        """The weight 1 for the exact terms, then 1 / P(the term is reached)."""
        uniform = torch.rand((), generator=generator, device="cpu", dtype=torch.float64).item()
        # further terms N with P(N >= k) = (1 - stop)^(k - 1), k = 1, 2, ...
        further = 1 + math.floor(math.log1p(-uniform) / math.log(1 - self.stop))
        yield from [1.0] * self.exact_terms
        yield from ((1 - self.stop) ** (1 - k) for k in range(1, further + 1))

"""Slow copies of the regularizers, sample by sample as the papers write them; and small maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inn_guard.core.invertible import Invertible


def literal_finite_differences(model, x, v, v_star, eps=0.1):
    """(R_fwd, R_inv) with F^-1(F(x)) really computed, one sample at a time."""
    forward, inverse = [], []
    for k in range(len(x)):
        row = torch.tensor([k])
        one = model.select(row)
        z = one(x[row])
        forward.append((one(x[row] + eps * v[row]) - z).pow(2).sum() / eps**2)
        inverse.append((one.inverse(z + eps * v_star[row]) - one.inverse(z)).pow(2).sum() / eps**2)
    return sum(forward) / len(x), sum(inverse) / len(x)


def literal_published_finite_differences(model, x, v, v_star, eps=0.1):
    """(R_fwd, R_inv) as the published code has them: sums over the batch, divided by eps.

    Its directions are normalised coordinate by coordinate over the batch.
    """
    d, d_star = v / v.norm(dim=0), v_star / v_star.norm(dim=0)
    z = model(x)
    forward = ((model(x + eps * d) - z) ** 2).sum() / eps
    inverse = ((model.inverse(z + eps * d_star) - model.inverse(z)) ** 2).sum() / eps
    return forward, inverse


def literal_finite_differences_at_prior(model, z, v, deviation, *, form, eps=0.1):
    """R of F^-1 at latents z with steps eps * deviation * v, one draw at a time.

    The log form is D times the mean of log(1 + |.|^2 / (eps^2 D)) over the finite draws.
    """
    terms = []
    for k in range(len(z)):
        row = torch.tensor([k])
        one = model.select(row)
        moved = one.inverse(z[row] + eps * deviation * v[row])
        square = (moved - one.inverse(z[row])).pow(2).sum() / eps**2
        size = z[row].numel()
        if form == "square":
            terms.append(square)
        elif square.isfinite():
            terms.append(size * torch.log(1 + square / size))
    return sum(terms) / len(terms)


def literal_normalizing_flow_loss(model, x):
    """mean( -log N(z; 0, I) - log|det J| ) with a dense autograd Jacobian of each sample."""
    total = 0.0
    for k in range(len(x)):
        row = torch.tensor([k])
        one = model.select(row)
        point = x[row]
        size = point.numel()
        jacobian = torch.autograd.functional.jacobian(one, point, create_graph=True).reshape(
            size, size
        )
        log_p = torch.distributions.Normal(0.0, 1.0).log_prob(one(point)).sum()
        total = total - log_p - torch.linalg.slogdet(jacobian).logabsdet
    return total / len(x)


class LinearMap(Invertible):
    """z = W x, one W of its own; x may have any shape."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.weight.T).reshape(x.shape)

    def inverse(self, z: Tensor) -> Tensor:
        return torch.linalg.solve(self.weight, z.flatten(1).T).T.reshape(z.shape)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), torch.linalg.slogdet(self.weight).logabsdet.expand(len(x))


class Scaling(Invertible):
    """z = c x with a context c (B, 1) of its own for each sample."""

    def forward(self, x: Tensor) -> Tensor:
        return self.context * x

    def inverse(self, z: Tensor) -> Tensor:
        return z / self.context


class Embedding(Invertible):
    """z = A x with a wide A: F^-1(F(x)) is a projection of x."""

    bijective = False

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T

    def inverse(self, z: Tensor) -> Tensor:
        return z @ torch.linalg.pinv(self.matrix).T


class TwoCouplings(Invertible):
    """Two curved affine couplings over 6 features, with an optional context (B, 2)."""

    def __init__(self, seed: int = 0, context_size: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.networks = nn.ModuleList(
                nn.Sequential(nn.Linear(3 + context_size, 8), nn.Tanh(), nn.Linear(8, 6))
                for _ in range(2)
            )

    def _scale_and_shift(self, k: int, passive: Tensor) -> tuple[Tensor, Tensor]:
        if self.context is not None:
            passive = torch.cat([passive, self.context], 1)
        log_scale, shift = self.networks[k](passive).chunk(2, 1)
        return log_scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_and_log_det(x)[0]

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        passive, active = x.chunk(2, 1)
        log_det = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for k in range(2):
            log_scale, shift = self._scale_and_shift(k, passive)
            passive, active = active * log_scale.exp() + shift, passive
            log_det = log_det + log_scale.sum(1)
        return torch.cat([passive, active], 1), log_det

    def inverse(self, z: Tensor) -> Tensor:
        passive, active = z.chunk(2, 1)
        for k in (1, 0):
            log_scale, shift = self._scale_and_shift(k, active)
            passive, active = active, (passive - shift) * (-log_scale).exp()
        return torch.cat([passive, active], 1)

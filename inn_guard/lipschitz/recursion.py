"""The bound of a chain for given multipliers: an ordinary evaluation to optimise, and a certified one to keep."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from inn_guard.lipschitz.chains import Chain, Layer, Multipliers
from inn_guard.lipschitz.rounding import UNIT, gamma, largest_eigenvalue, up

__all__ = ["certify", "fast_multipliers", "optimise"]

Progress = Callable[[str, float], None]
WORST = 4  #: frequencies that are optimised at first, and that are added at each look at all of them
LOOK = 60  #: steps between two looks at all frequencies


def certify(chain: Chain, multipliers: Multipliers) -> float:
    """A certified upper bound of sup ||J|| over all slopes of a chain, proved by the given multipliers.

    Every matrix Q of the recursion is replaced by a computed one plus e I, where e bounds what rounding may have taken
    away; any matrix above Q is valid as well. N^-1 is never trusted: an approximate solution X of N X = V enters with
    its residual, V^H N^-1 V <= V^H X + X^H E + ||E||^2 / lmin(N) for E = V - N X, and lmin(N) by Cholesky.

    Args:
        chain: what is bounded.
        multipliers: D of every layer, (n,) each, positive.

    Returns:
        The bound; inf if the multipliers prove nothing.

    References:
        Efficient and Accurate Estimation of Lipschitz Constants for Deep Neural Networks (Fazlyab, Robey, Hassani,
        Morari, Pappas, 2019), LipSDP-Neuron. This differs from the paper in: no semidefinite program; slopes per
        neuron; slopes of exactly one; one problem per frequency of a convolution.
    """
    Q = torch.eye(chain.size, dtype=torch.float64)[None]
    for layer, D in zip(chain.layers, multipliers, strict=True):
        advanced = _certified_step(Q, layer, D)
        if advanced is None:
            return math.inf
        Q = advanced
    S, error = _certified_congruence(chain.output, chain.error, Q)
    square = up(largest_eigenvalue(S) + error)
    return up(math.sqrt(max(square, 0.0))) if math.isfinite(square) else math.inf


def _certified_congruence(weight: Tensor, error: float, Q: Tensor) -> tuple[Tensor, float]:
    """fl(W Q W^H) and a bound of the norm of its error, W being known up to ``error``."""
    weight, Q = _common(weight, Q)
    S = weight @ Q @ weight.mH
    w, q = _frobenius(weight), _frobenius(Q)
    relative = gamma((8 if weight.is_complex() else 1) * (2 * weight.shape[-1] + 4))
    return S, up((relative * w * w + (2 * w + error) * error) * q * (1 + 1e-9), 4)


def _certified_step(Q: Tensor, layer: Layer, D: Tensor) -> Tensor | None:
    size, n = Q.shape[-1], layer.weight.shape[1]
    selector = torch.eye(size, dtype=torch.float64)[layer.keep][None].expand(len(layer.weight), -1, -1)
    joint = torch.cat([selector.to(layer.weight.dtype), layer.weight], 1)
    T, error = _certified_congruence(joint, layer.error, Q)
    k = len(layer.keep)
    error = up(error + 4 * UNIT * (float(T.abs().max()) + float(D.max())), 2)
    P, C, S = T[:, :k, :k].clone(), T[:, k:, :k], T[:, k:, k:]
    N = torch.diag_embed(D).to(S.dtype) - S
    N = (N + N.mH) / 2
    N.diagonal(dim1=1, dim2=2).sub_(2 * error)
    smallest = -largest_eigenvalue(-N)
    if not smallest > 0:
        return None
    P = (P + P.mH) / 2
    P.diagonal(dim1=1, dim2=2).add_(2 * error)
    M, R = layer.mean, layer.half_width
    V = torch.cat([C, torch.diag_embed(D * M).to(S.dtype).expand(len(C), -1, -1)], 2)
    X = torch.cholesky_solve(V, torch.linalg.cholesky(N))
    E = V - N @ X
    new = V.mH @ X + X.mH @ E
    new = (new + new.mH) / 2
    new[:, :k, :k] += P
    new.diagonal(dim1=1, dim2=2)[:, k:].add_(R * R * D - M * M * D)
    weight = gamma((8 if S.is_complex() else 1) * (n + 4))
    v, x, e = _frobenius(V), _frobenius(X), _frobenius(E)
    unseen = weight * (_frobenius(N) * x + v)  # rounding of E itself
    slack = up(weight * x * (v + e) + unseen * (x + 2 * (e + unseen) / smallest) + e * e / smallest, 8)
    slack = up(
        slack * (1 + 1e-9) + 8 * UNIT * (_frobenius(P) + float((D * (M * M + R * R)).max()) + _frobenius(new)), 4
    )
    new.diagonal(dim1=1, dim2=2).add_(slack)
    return new


def fast_multipliers(chain: Chain) -> Multipliers:
    """D = 2 lmax(S) I for every layer: a valid choice without optimisation, the one of ECLipsE-Fast.

    References:
        ECLipsE: Efficient Compositional Lipschitz Constant Estimation for Deep Neural Networks (Xu, Sivaranjani, 2024).
    """
    with torch.no_grad():
        return _evaluate(chain, _start(chain))[1]


@torch.enable_grad()
def optimise(
    chain: Chain, *, seconds: float = 5.0, steps: int = 150, rate: float = 0.1, progress: Progress | None = None
) -> Multipliers:
    """Multipliers that make a chain's bound small, by Adam on log of the bound.

    D = e^v (1 + e^c) lmax(e^{-v/2} S e^{-v/2}) is feasible for every v and c. Of many frequencies only the worst are
    differentiated; now and then all are looked at.

    Args:
        chain: what is bounded.
        seconds: time after which no step is begun.
        steps: at most so many.
        rate: learning rate.
        progress: called with a sentence and the share that is done.

    Returns:
        The best multipliers found, at least as good as ``fast_multipliers``.
    """
    begun = time.monotonic()
    free = _start(chain)
    everything = torch.arange(chain.frequencies)
    bounds, best = _look(chain, free)
    least = float(bounds.max())
    chosen = everything if chain.frequencies <= WORST else bounds.topk(WORST).indices
    optimiser = torch.optim.Adam([tensor.requires_grad_() for pair in free for tensor in pair], lr=rate)
    sub_least, candidate = math.inf, None
    for step in range(steps):
        if time.monotonic() - begun > seconds or not math.isfinite(least):
            break
        optimiser.zero_grad()
        try:
            loss = _evaluate(chain.at(chosen), free)[0].max()
        except torch.linalg.LinAlgError:
            break
        if float(loss.detach()) < sub_least:
            sub_least, candidate = float(loss.detach()), [(v.detach().clone(), c.detach().clone()) for v, c in free]
        loss.log().backward()
        optimiser.step()
        if progress is not None:
            progress(f"multipliers: bound {math.sqrt(float(loss.detach())):.4g}", (step + 1) / steps)
        if chain.frequencies > len(chosen) and step % LOOK == LOOK - 1 and candidate is not None:
            bounds, found = _look(chain, candidate)
            if float(bounds.max()) < least:
                least, best = float(bounds.max()), found
            chosen = torch.cat([chosen, bounds.topk(WORST).indices]).unique()
            sub_least = math.inf
    if candidate is not None:
        bounds, found = _look(chain, candidate)
        best = found if float(bounds.max()) < least else best
    return best


Free = list[tuple[Tensor, Tensor]]


def _start(chain: Chain) -> Free:
    zero = torch.zeros((), dtype=torch.float64)
    return [(torch.zeros(len(layer.lower), dtype=torch.float64), zero.clone()) for layer in chain.layers]


@torch.no_grad()
def _look(chain: Chain, free: Free) -> tuple[Tensor, Multipliers]:
    """The squared bound at every frequency, and the multipliers themselves."""
    return _evaluate(chain, free)


def _evaluate(chain: Chain, free: Free) -> tuple[Tensor, Multipliers]:
    """The squared bound per frequency for free parameters (v, c), differentiable, and the multipliers they mean."""
    Q, multipliers = torch.eye(chain.size, dtype=torch.float64)[None], []
    for layer, (v, c) in zip(chain.layers, free, strict=True):
        Q, D = _narrow_step(Q, layer, v, c) if Q.shape[-1] < layer.weight.shape[1] else _wide_step(Q, layer, v, c)
        multipliers.append(D.detach())
    weight, Q = _common(chain.output, Q)
    final = weight @ Q @ weight.mH
    return torch.linalg.eigvalsh((final + final.mH) / 2)[:, -1], tuple(multipliers)


def _narrow_step(Q: Tensor, layer: Layer, v: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The step for more neurons than state: everything in the size of the state, Q = F F^H."""
    W, Q = _common(layer.weight, Q)
    F = torch.linalg.cholesky(_regular(Q))
    scaled = W * (-v).exp()[:, None]
    inner = F.mH @ (W.mH @ scaled) @ F
    largest = torch.linalg.eigvalsh(inner)[:, -1].max()
    factor = _factor(largest, c, Q)
    D = v.exp() * factor
    Y = torch.linalg.solve_triangular(torch.linalg.cholesky(_identity_like(inner) - inner / factor), F.mH, upper=False)
    X = Y.mH @ Y
    MW = W * layer.mean[:, None]
    MWX = MW @ X
    kept = X[:, layer.keep][:, :, layer.keep]
    cross = MWX[:, :, layer.keep]
    hidden = MWX @ MW.mH + torch.diag(layer.half_width**2 * D)
    return _assembled(kept, cross, hidden), D


def _wide_step(Q: Tensor, layer: Layer, v: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    W, Q = _common(layer.weight, Q)
    WQ = W @ Q
    S = WQ @ W.mH
    S = (S + S.mH) / 2
    root = (-v / 2).exp()
    largest = torch.linalg.eigvalsh(root[:, None] * S * root)[:, -1].max()
    D = v.exp() * _factor(largest, c, Q)
    C = WQ[:, :, layer.keep]
    L = torch.linalg.cholesky(torch.diag(D).to(S.dtype) - S)
    Y = torch.linalg.solve_triangular(L, torch.cat([C, S], 2), upper=False)
    A, B = Y[:, :, : C.shape[2]], Y[:, :, C.shape[2] :]
    kept = Q[:, layer.keep][:, :, layer.keep] + A.mH @ A
    M = layer.mean
    cross = M[:, None] * (C + B.mH @ A)
    hidden = M[:, None] * (S + B.mH @ B) * M + torch.diag(layer.half_width**2 * D)
    return _assembled(kept, cross, hidden), D


def _factor(largest: Tensor, c: Tensor, Q: Tensor) -> Tensor:
    # a layer without weights still needs a positive multiplier
    return largest.clamp_min(1e-14 * float(Q.detach().abs().max())) * (1 + c.exp())


def _assembled(kept: Tensor, cross: Tensor, hidden: Tensor) -> Tensor:
    Q = torch.cat([torch.cat([kept, cross.mH], 2), torch.cat([cross, hidden], 2)], 1)
    return (Q + Q.mH) / 2


def _regular(Q: Tensor) -> Tensor:
    return Q + 1e-13 * float(Q.detach().abs().max()) * _identity_like(Q)


def _identity_like(Q: Tensor) -> Tensor:
    return torch.eye(Q.shape[-1], dtype=Q.dtype)


def _common(weight: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(weight.dtype, Q.dtype)
    return weight.to(dtype), Q.to(dtype)


def _frobenius(A: Tensor) -> float:
    """An upper bound of the largest Frobenius norm of a batch."""
    if A.numel() == 0:
        return 0.0
    return up(float(torch.linalg.matrix_norm(A).max()) * (1 + gamma(4 * A.shape[-1] * A.shape[-2] + 4)), 2)

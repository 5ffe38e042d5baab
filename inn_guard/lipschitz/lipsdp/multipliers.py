"""The search for multipliers of a chain: Adam on an ordinary evaluation of the recursion.

Nothing here is trusted: what a search returns is a proof only after ``recursion.certify``. The
state's matrix is kept as Q = B + F F^H with F of as many columns as the chain has inputs. With N_B
= D - W B W^H, E = N_B^-1 W F and G = F^H W^H E, Woodbury's identity gives the same form again: B
goes on as Q did, and

    F' = ([K F; 0] + V_B^H E) (I - G)^{-1/2}

so that hidden layers of a convolutional flow, of which only B is large and shared by all
frequencies, cost little.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.execution.deadline import Deadline, spend
from inn_guard.lipschitz.lipsdp.chain import Chain, Layer, Multipliers, product
from inn_guard.lipschitz.lipsdp.recursion import CERTIFICATE
from inn_guard.numerics.rounding import TINY

__all__ = ["NORM", "ROWS", "Goal", "fast_multipliers", "optimise"]

WORST = 8  #: frequencies that are optimised at first, and that each look at all of them may add
LOOK = 25  #: steps between two looks at all frequencies
RATE = 0.1  #: learning rate of Adam
POWERS = 12  #: power iterations for the size of a layer's S on many frequencies
BACKWARD = 2.0  #: times an evaluation that its derivatives take


def fast_multipliers(chain: Chain) -> Multipliers:
    """D = 2 lmax(S) I for every layer, as in ECLipsE-Fast: valid without optimisation.

    References:
        ECLipsE: Efficient Compositional Lipschitz Constant Estimation for Deep Neural Networks (Xu,
            Sivaranjani, 2024).
    """
    spend(chain.operations)
    with torch.no_grad():
        return _evaluate(chain, _start(chain))[1]


@dataclass(frozen=True)
class Goal:
    """The quantity that multipliers minimise.

    Attributes:
        of_matrix: Q (frequencies, n, n) -> one number per frequency, (frequencies,).
        of_all: those numbers -> the quantity.
        chosen: those numbers -> the indices of the frequencies that are differentiated first.
    """

    of_matrix: Callable[[Tensor], Tensor]
    of_all: Callable[[Tensor], Tensor]
    chosen: Callable[[Tensor], Tensor]


def _worst(values: Tensor) -> Tensor:
    return values.topk(min(WORST, len(values))).indices


def _spread(values: Tensor) -> Tensor:
    # the worst ones too: they decide how large the multipliers have to be
    evenly = torch.linspace(0, len(values) - 1, min(WORST, len(values))).long()
    return torch.cat([evenly, _worst(values)[: WORST // 2]]).unique()


#: the norm, squared
NORM = Goal(lambda Q: torch.linalg.eigvalsh(Q)[:, -1], torch.amax, _worst)
#: the mean square of the norms of the rows
ROWS = Goal(lambda Q: Q.diagonal(dim1=1, dim2=2).real.mean(1), torch.mean, _spread)


@torch.enable_grad()
def optimise(
    chain: Chain, *, deadline: Deadline | None = None, steps: int = 150, goal: Goal = NORM
) -> Multipliers:
    """Multipliers that make a chain's bound small, by Adam on log of the bound.

    D = e^v (1 + e^c) lmax(e^{-v/2} S e^{-v/2}) is feasible for every v and c. Of many frequencies
    only the worst are differentiated; now and then all are looked at.

    Args:
        chain: the chain to bound.
        deadline: no step begins that would leave too little time for the certificate.
        steps: the largest number of steps.
        goal: the quantity to minimise.

    Returns:
        The best multipliers found, at least as good as ``fast_multipliers``.
    """
    search = _Search(chain, deadline or Deadline(), goal)
    for step in range(steps):
        if not search.goes_on() or not search.step():
            break
        if step % LOOK == LOOK - 1:
            search.look()
    search.look()
    return search.best


Free = list[tuple[Tensor, Tensor]]


class _Search:
    """Adam on the worst frequencies, and the best multipliers for all of them."""

    def __init__(self, chain: Chain, deadline: Deadline, goal: Goal) -> None:
        self.chain, self.deadline, self.goal = chain, deadline, goal
        self.free = _start(chain)
        left = deadline.left
        with torch.no_grad():
            bounds, self.best = self.evaluated(chain, self.free)
        self.looking = _elapsed(left, deadline)
        self.stepping = 0.0
        self.least = float(goal.of_all(bounds))
        self.chosen = goal.chosen(bounds)
        self.part = chain.at(self.chosen)
        self.candidate: Free | None = None
        self.candidate_bound = math.inf
        parameters = [tensor.requires_grad_() for pair in self.free for tensor in pair]
        self.optimiser = torch.optim.Adam(parameters, lr=RATE)

    def evaluated(self, chain: Chain, free: Free) -> tuple[Tensor, Multipliers]:
        """The goal's numbers per frequency, and the multipliers."""
        spend(chain.operations)
        Q, multipliers = _evaluate(chain, free)
        return self.goal.of_matrix(Q), multipliers

    def goes_on(self) -> bool:
        """Whether there is time for a step, a look and the certificate."""
        neurons = sum(len(v) for v, _ in self.free)
        if neurons == 0 or not math.isfinite(self.least):
            return False
        return self.deadline.left > self.stepping + (1 + CERTIFICATE) * self.looking

    def step(self) -> bool:
        """One step; False if the multipliers are no longer feasible."""
        left = self.deadline.left
        self.optimiser.zero_grad()
        try:
            loss = self.goal.of_all(self.evaluated(self.part, self.free)[0])
        except torch.linalg.LinAlgError:
            return False
        if float(loss.detach()) < self.candidate_bound:
            self.candidate_bound = float(loss.detach())
            self.candidate = [(v.detach().clone(), c.detach().clone()) for v, c in self.free]
        spend(BACKWARD * self.part.operations)
        loss.log().backward()
        self.optimiser.step()
        self.stepping = max(self.stepping, _elapsed(left, self.deadline))
        return True

    @torch.no_grad()
    def look(self) -> None:
        """Evaluate the best candidate at all frequencies; from now on optimise their worst."""
        if self.candidate is None:
            return
        try:
            bounds, found = self.evaluated(self.chain, self.candidate)
        except torch.linalg.LinAlgError:
            return
        if float(self.goal.of_all(bounds)) < self.least:
            self.least, self.best = float(self.goal.of_all(bounds)), found
        fresh = self.goal.chosen(bounds)
        if not bool(torch.isin(fresh, self.chosen).all()):
            self.chosen = torch.cat([self.chosen, fresh]).unique()
            self.part = self.chain.at(self.chosen)
            self.candidate_bound = math.inf


def _elapsed(left: float, deadline: Deadline) -> float:
    """Seconds since ``left`` seconds were left; 0 without a deadline."""
    if math.isinf(left):
        return 0.0
    return max(left - deadline.left, 0.0)


def _start(chain: Chain) -> Free:
    free = []
    for layer in chain.layers:
        v = torch.zeros(len(layer.lower), dtype=torch.float64)
        free.append((v, torch.zeros((), dtype=torch.float64)))
    return free


@dataclass(frozen=True)
class _State:
    """Q = base + factor factor^H.

    Attributes:
        base: (1 or frequencies, m, m), or None for zero.
        factor: (1 or frequencies, m, r).
    """

    base: Tensor | None
    factor: Tensor

    def size(self) -> float:
        """The largest diagonal entry of Q."""
        diagonal = self.factor.detach().abs().square().sum(-1)
        if self.base is not None:
            diagonal = diagonal + self.base.detach().diagonal(dim1=1, dim2=2).real
        return float(diagonal.max())

    def through(self, A: Tensor) -> _State:
        """A Q A^H."""
        base = self.base
        if base is not None:
            base = product(product(A, base), A.mH)
        return _State(base, product(A, self.factor))

    def folded(self) -> _State:
        """The same with a square factor and no base, where that is smaller."""
        m, r = self.factor.shape[-2:]
        if m > 2 * r or (self.base is None and m >= r):
            return self
        Q = self.matrix()
        size = Q.detach().diagonal(dim1=1, dim2=2).real.amax(1).clamp_min(TINY)
        eye = torch.eye(m, dtype=Q.dtype)
        return _State(None, torch.linalg.cholesky(Q + 1e-13 * size[:, None, None] * eye))

    def matrix(self) -> Tensor:
        """Q, Hermitian."""
        Q = product(self.factor, self.factor.mH)
        if self.base is not None:
            Q = Q + self.base
        return (Q + Q.mH) / 2


def _evaluate(chain: Chain, free: Free) -> tuple[Tensor, Multipliers]:
    """Q >= J J^H per frequency for free parameters (v, c), differentiable, and the multipliers."""
    state, multipliers = _State(None, torch.eye(chain.size, dtype=torch.float64)[None]), []
    for layer, (v, c) in zip(chain.layers, free, strict=True):
        state, D = _step(state, layer, v, c)
        multipliers.append(D.detach())
    return state.through(chain.output).matrix(), tuple(multipliers)


def _step(state: _State, layer: Layer, v: Tensor, c: Tensor) -> tuple[_State, Tensor]:
    k = layer.keep.shape[1]
    T = state.through(layer.joint)
    if not len(v):
        return T.folded(), v
    kept, WF = T.factor[:, :k], T.factor[:, k:]
    S = None
    if T.base is not None:
        S = T.base[:, k:, k:]
    # a layer without weights still needs a positive multiplier
    D = v.exp() * _largest(S, WF, v).clamp_min(1e-14 * state.size()) * (1 + c.exp())
    if T.base is None or S is None:
        E = WF / D[:, None]
        zeros = torch.zeros(k, dtype=torch.float64)
        base = torch.diag(torch.cat([zeros, layer.half_width**2 * D]))[None]
    else:
        inverse = _inverse(torch.diag(D) - (S + S.mH) / 2)
        E = product(inverse, WF)
        kept = kept + product(T.base[:, k:, :k].mH, E)
        base = _next_base(T.base, inverse, layer, D)
    G = product(WF.mH, E)
    L = torch.linalg.cholesky(torch.eye(G.shape[-1], dtype=G.dtype) - (G + G.mH) / 2)
    Z = torch.cat([kept, (D * layer.mean)[:, None] * E], 1)
    factor = torch.linalg.solve_triangular(L.mH, Z, upper=True, left=False)
    return _State(base, factor).folded(), D


def _next_base(base: Tensor, inverse: Tensor, layer: Layer, D: Tensor) -> Tensor:
    """[[P, 0], [0, R^2 D - M D M]] + V^H N^-1 V with V = [C, D M]."""
    k, DM = layer.keep.shape[1], D * layer.mean
    C = base[:, k:, :k]
    X = inverse @ C
    kept = base[:, :k, :k] + C.mH @ X
    cross = DM[:, None] * X
    hidden = DM[:, None] * inverse * DM + torch.diag(layer.half_width**2 * D - DM * layer.mean)
    upper, lower = torch.cat([kept, cross.mH], 2), torch.cat([cross, hidden], 2)
    return torch.cat([upper, lower], 1)


def _inverse(N: Tensor) -> Tensor:
    """N^-1 with its derivative -N^-1 dN N^-1; N must be positive definite."""
    with torch.no_grad():
        X = torch.cholesky_inverse(torch.linalg.cholesky(N))
    return 2 * X - X @ N @ X


def _largest(S: Tensor | None, F: Tensor, v: Tensor) -> Tensor:
    """lmax of e^{-v/2} (S + F F^H) e^{-v/2} over the frequencies; an estimate for many."""
    root = (-v / 2).exp()[:, None]
    F = root * F
    if S is not None:
        S = root * S * root.mT
    count, n, r = F.shape
    if count == 1 or (S is None and r <= 32) or n <= 8:
        A = _State(S, F).matrix()
        if S is None and r < n:
            A = product(F.mH, F)
        return torch.linalg.eigvalsh((A + A.mH) / 2)[:, -1].max()
    # power iterations find the worst frequency and its vector, which alone are differentiated
    with torch.no_grad():
        u = F.sum(2, keepdim=True) + F.abs().sum(2, keepdim=True)
        for _ in range(POWERS):
            u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True).clamp_min(TINY)
            y = _applied(S, F, u)
            value = torch.linalg.vecdot(u, y, dim=1).real
            missing = torch.linalg.vector_norm(y - value[:, None] * u, dim=1)
            u = y
        worst = int((value + missing).argmax())
        u = u[worst] / torch.linalg.vector_norm(u[worst]).clamp_min(TINY)
    if S is not None and len(S) > 1:
        S = S[worst][None]
    y = _applied(S, F[worst][None], u[None])[0]
    return torch.linalg.vecdot(u, y, dim=0).real.sum() + missing[worst].sum()


def _applied(S: Tensor | None, F: Tensor, u: Tensor) -> Tensor:
    y = product(F, product(F.mH, u))
    if S is None:
        return y
    return y + product(S, u)

"""Comparison matrices: the norms of a Jacobian's blocks, channel by channel, multiplied through runs of layers.

For a partition into blocks, N(M)_ij = ||M_ij|| satisfies ||M|| <= ||N(M)|| and N(A B) <= N(A) N(B) entry by entry, and
0 <= X <= Y entry by entry gives ||X|| <= ||Y||. Hence ||J_n ... J_1|| <= ||N_n ... N_1|| for N_k >= N(J_k), which can
be less than the product of norms where layers stretch different channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from inn_guard.lipschitz.chains import Chain
from inn_guard.lipschitz.conditioners import Proof
from inn_guard.lipschitz.deadline import Deadline
from inn_guard.lipschitz.factors import Factor
from inn_guard.lipschitz.rounding import gamma
from inn_guard.lipschitz.spectral import norm_operations, spectral_norm

__all__ = ["comparison_factors"]

UNDERFLOW = 1e-300  #: more than what products of a row lose by underflow
WIDE = 256  #: channels up to which matrices are multiplied


def comparison_factors(matrices: Sequence[Tensor | None], deadline: Deadline) -> list[Factor]:
    """Every run of two and more layers whose comparison matrices are known, as a factor, as long as time lasts.

    Args:
        matrices: N_k of the layers in the order in which they are applied, nonnegative, (C', C); None where unknown.
        deadline: after which no run is begun.

    Returns:
        Factors whose proofs are the products, as chains without layers.
    """
    found: list[Factor] = []
    for first, start in enumerate(matrices):
        total = start
        for last in range(first + 1, len(matrices)):
            step = matrices[last]
            if total is None or step is None or max(*step.shape, *total.shape) > WIDE:
                break
            if not deadline.affords(norm_operations(*step.shape)):
                return found
            total = (step @ total) * (1 + 2 * gamma(step.shape[1] + 2)) + UNDERFLOW
            bound = spectral_norm(total)
            if not math.isfinite(bound):
                break
            found.append(
                Factor(first, last + 1, bound, Proof(bound, Chain(total.shape[1], (), total[None]), ()), compared=True)
            )
    return found

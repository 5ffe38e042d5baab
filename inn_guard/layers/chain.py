"""Chain: the composition of invertible layers."""

from __future__ import annotations

from torch import Tensor, nn

from inn_guard.core.invertible import Invertible
from inn_guard.core.readable import runs_code_of

__all__ = ["Chain"]


class Chain(Invertible):
    """z = F_n(...F_1(x)); log|det J| = sum_i log|det J_i|, every J_i at the input of its own layer.

    ``layers()`` is flat: chains inside the chain are opened. A chain with a context passes it to
    every step; without one, each step keeps its own.

    Args:
        steps: the layers in the order in which they are applied; none gives the identity.

    Raises:
        TypeError: if a step is not an Invertible.

    >>> import torch
    >>> from inn_guard.layers.permutation import Permutation
    >>> twice = Chain(Permutation.reverse(3), Permutation.reverse(3))
    >>> twice(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
    [[1.0, 2.0, 3.0]]
    """

    def __init__(self, *steps: Invertible) -> None:
        super().__init__()
        for step in steps:
            if not isinstance(step, Invertible):
                raise TypeError(
                    f"expected Invertible steps, got {type(step).__name__}; "
                    "pass it through inn_guard.wrap(...) first"
                )
        self.steps = nn.ModuleList(steps)
        self.bijective = all(step.bijective for step in steps)

    def forward(self, x: Tensor) -> Tensor:
        """z = F_n(...F_1(x)), (B, *latent)."""
        for step in self._conditioned_steps():
            x = step(x)
        return x

    def inverse(self, z: Tensor) -> Tensor:
        """x = F_1^-1(...F_n^-1(z)), (B, *data)."""
        for step in reversed(self._conditioned_steps()):
            z = step.inverse(z)
        return z

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F(x) and the sum of the steps' log-determinants."""
        total = x.new_zeros(len(x))
        for step in self._conditioned_steps():
            x, log_det = step.forward_and_log_det(x)
            total = total + log_det
        return x, total

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """F^-1(z) and the sum of the steps' inverse log-determinants."""
        total = z.new_zeros(len(z))
        for step in reversed(self._conditioned_steps()):
            z, log_det = step.inverse_and_log_det(z)
            total = total + log_det
        return z, total

    def layers(self) -> tuple[Invertible, ...]:
        """The steps, with nested chains opened; () for a subclass that is another map."""
        if not _is_chain(self):
            return ()
        flat: list[Invertible] = []
        for step in self._conditioned_steps():
            if _is_chain(step):
                flat += step.layers()  # none if the chain is empty: it is the identity
            else:
                flat += step.layers() or (step,)  # an opaque step is one layer
        return tuple(flat)

    def _conditioned_steps(self) -> list[Invertible]:
        """The steps, in the chain's context if it has one."""
        steps: list[Invertible] = list(self.steps)  # type: ignore[arg-type]
        if self.context is None:
            return steps
        return [step.with_context(self.context) for step in steps]


def _is_chain(step: Invertible) -> bool:
    """Whether a step does what `Chain` says, so that its steps stand for it."""
    methods = ("__call__", "forward", "inverse")
    return isinstance(step, Chain) and bool(runs_code_of(step, Chain, methods))

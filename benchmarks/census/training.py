"""How the models of the census are trained, and what their likelihood is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

import inn_guard as ig
from benchmarks.census.truth import REFUSALS
from inn_guard.training.regularizer_hook import Regularizer

__all__ = ["PENALTY_EVERY", "Training", "bits", "seeded"]

PENALTY_EVERY = 5  #: steps between two penalties


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The generators of torch and of numpy, which FrEIA draws from, set and put back afterwards."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


class Training:
    """Adam on the negative log-likelihood, which goes on from where it was.

    Steps whose loss or gradient is not finite, or at which the library raises, are left out and
    counted. Nothing is clipped: the defaults do not.

    Args:
        flow: is trained in place.
        train: rows.
        batch_size: rows of one step.
        learning_rate: of Adam.
        seed: of the batches.
        penalties: are added to the loss at every fifth step.
    """

    def __init__(
        self,
        flow: nn.Module,
        train: Tensor,
        *,
        batch_size: int,
        learning_rate: float,
        seed: int,
        penalties: Sequence[Regularizer] = (),
    ) -> None:
        self.flow, self.train, self.batch_size = flow, train, batch_size
        self.model = ig.wrap(flow)
        self.parameters = [p for p in flow.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate)
        self.generator = torch.Generator().manual_seed(seed)
        self.penalty = ig.RegularizerHook(self.model, list(penalties), every=PENALTY_EVERY)
        self.done = self.skipped = 0
        flow.train()
        with torch.no_grad():  # layers that are initialised by their first batch
            self.model.log_prob(train[:batch_size])
        flow.eval()

    def go_on(self, steps: int) -> None:
        """Train up to this number of steps in all; the flow is in eval mode afterwards."""
        self.flow.train()
        while self.done < steps:
            self.skipped += not self._step(self.batch())
            self.done += 1
        self.flow.eval()

    def batch(self) -> Tensor:
        """The next rows."""
        size = (self.batch_size,)
        return self.train[torch.randint(len(self.train), size, generator=self.generator)]

    def _step(self, batch: Tensor) -> bool:
        self.optimizer.zero_grad()
        try:
            loss = self.penalty(batch, step=self.done) - self.model.log_prob(batch).mean()
            loss.backward()
        except REFUSALS:
            return False
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not all(bool(one.isfinite().all()) for one in (loss, *gradients)):
            return False
        self.optimizer.step()
        return True


@torch.no_grad()
def bits(flow: nn.Module, x: Tensor) -> float:
    """Median negative log-likelihood in bits per dimension: single rows rule the mean."""
    try:
        nats = -ig.wrap(flow).log_prob(x).double()
    except REFUSALS:
        return math.nan
    return nats.median().item() / x[0].numel() / math.log(2)

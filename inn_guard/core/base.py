"""The base distribution of a flow: the latents that its library samples from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.core.context import Context, context_length, select_rows
from inn_guard.core.missing import NotApplicable
from inn_guard.core.random import current_device, generator_of_device

__all__ = ["BaseDistribution", "seeded"]

PILOT_DRAWS = 4096  #: estimate a deviation to about one per cent
PILOT_SEED = 0

Sampler = Callable[[int, Context], Tensor]  #: (n, context of n rows or None) -> (n, *latent)


@dataclass(frozen=True)
class BaseDistribution:
    """The distribution of z whose image under ``inverse`` is the model's distribution of x.

    Attributes:
        sampler: draws n latents with torch's global generator, at temperature 1. Its second
            argument is a context of n rows, or None.
        like: a tensor with the dtype and device of the model; its values are not used.
        context: the model's own context, (B, ...) or None.
        exact_deviation: standard deviation of each entry, (*latent); None where it is not known.
        declared: whether the library's object has a base distribution; False where the latents are
            standard normal by assumption only.
        description: what a report calls it.
        log_density: z (B, *latent) -> log p(z) in nats, (B,), differentiable, in the model's own
            context; None where the library does not offer it.
    """

    sampler: Sampler
    like: Tensor
    context: Context = None
    exact_deviation: Tensor | None = None
    declared: bool = True
    description: str = "base distribution"
    log_density: Callable[[Tensor], Tensor] | None = None

    def draw(self, n: int, seed: int, *, context: Context = None) -> Tensor:
        """Latents z, (n, *latent), in the dtype and on the device of the model, without a graph.

        The same seed gives the same latents; torch's global generators are left as they were.

        Args:
            n: number of latents.
            seed: of the generator.
            context: n rows, one for each latent. Default: the model's own context, whose B rows are
                repeated in turn: latent i is drawn in row i mod B, as in ``repeated_context(n)``.

        Raises:
            NotApplicable: if the library cannot sample this distribution.
            ValueError: if ``context`` has another number of rows than n.
        """
        if context is None:
            context = self.repeated_context(n)
        elif context_length(context) != n:
            raise ValueError(
                f"expected a context with {n} rows, one for each latent; "
                f"got {context_length(context)} rows"
            )
        try:
            with torch.no_grad(), seeded(seed, self.like.device):
                latents = self.sampler(n, context)
        except NotImplementedError as error:
            reason = str(error) or "the library does not implement it"
            raise NotApplicable(f"no samples of the {self.description}: {reason}") from error
        return latents.detach().to(self.like)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, (B,), in the model's own context.

        Raises:
            NotApplicable: if the library does not offer the density.
        """
        if self.log_density is None:
            raise NotApplicable(f"the {self.description} has no density that can be evaluated")
        return self.log_density(z)

    def repeated_context(self, n: int) -> Context:
        """The model's own context with n rows: row i is its row i mod B. None without a context."""
        if self.context is None:
            return None
        rows = torch.arange(n) % context_length(self.context)
        return select_rows(self.context, rows)

    @functools.cached_property
    def deviation(self) -> Tensor:
        """Standard deviation of each entry of z, (*latent): exact if known, else of 4096 draws.

        With a context, the draws are spread over all rows of the model's own context.
        """
        if self.exact_deviation is not None:
            return self.exact_deviation.detach().to(self.like)
        pilot = self.draw(PILOT_DRAWS, PILOT_SEED).double()
        return pilot.std(0).to(self.like)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of ``device``; restore both afterwards."""
    holder = generator_of_device(device)
    with torch.random.fork_rng(devices=[]), ExitStack() as undoing:
        # torch.manual_seed would seed every other device, too, which fork_rng does not restore
        torch.default_generator.manual_seed(seed)
        if holder is not None:
            undoing.callback(holder.set_rng_state, holder.get_rng_state(device), device)
            with current_device(device):
                holder.manual_seed(seed)
        yield

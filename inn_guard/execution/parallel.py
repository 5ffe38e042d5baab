"""Samples shared out: over the processes of a torch.distributed group, and within each into micro-batches.

Every process is handed the same model, the same data and the same seeds, runs the same code, and measures its own part
of the samples where the code says so; the parts are gathered, so that all go on with the same numbers. Random numbers
belong to samples, not to processes: each one draws those of the whole batch and takes the rows that it measures.
"""

from __future__ import annotations

import math
import pickle
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inn_guard.execution.memory import Footprint

__all__ = ["SERIAL", "WorkSharing", "rank_noise", "register_fsdp_methods"]

Group = Any  #: a torch.distributed.ProcessGroup; some builds of torch have none
Item = TypeVar("Item")
Answer = TypeVar("Answer")

METHODS = ("inverse", "forward_and_log_det", "inverse_and_log_det", "log_prob", "linearize")


@dataclass(frozen=True)
class WorkSharing:
    """Over which processes samples are shared, and how many bytes a measurement may take in each.

    Attributes:
        group: the processes; None: this one alone, whatever torch.distributed may know of others.
        memory: bytes that one measurement may hold at once, beside the model, the data and what has their size; None:
            no bound.
    """

    group: Group | None = None
    memory: float | int | None = None

    @property
    def rank(self) -> int:
        """This process's number, 0 if it is alone."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def local(self) -> WorkSharing:
        """The same bound of memory in this process only."""
        return WorkSharing(None, self.memory)

    def max_batch(self, footprint: Callable[[float], Footprint]) -> float | int:
        """How many samples a measurement of that footprint may take at once: 1 at least, inf without a bound.

        All processes agree on it. The footprint is only measured where there is a bound, which it is told.
        """
        if self.memory is None:
            return math.inf
        memory = float(self.memory)
        return min(self.all_gather(lambda: footprint(memory).samples_within(memory)))

    def map(
        self,
        rows: Tensor,
        measure: Callable[[Tensor], Sequence[Tensor]],
        *,
        at_most: float | int = math.inf,
    ) -> tuple[Tensor, ...]:
        """What ``measure`` returns for all rows: for parts of them, one after the other and in all processes.

        Args:
            rows: indices of samples, at least one.
            measure: rows -> tensors whose first dimension is that of these rows.
            at_most: rows in one call.

        Returns:
            the tensors for all rows, in their order, on the device of ``rows``.
        """
        size = max(1, int(min(math.ceil(len(rows) / self.size), at_most)))
        if size >= len(rows):
            return tuple(measure(rows))
        parts = self.map_items(
            rows.split(size), lambda part: tuple(self._portable(t) for t in measure(part))
        )
        return tuple(torch.cat(field).to(rows.device) for field in zip(*parts, strict=True))

    def map_items(self, items: Iterable[Item], measure: Callable[[Item], Answer]) -> list[Answer]:
        """What ``measure`` returns for every item, in their order: process r takes items r, r + size, ..."""
        items = list(items)
        answers = self.all_gather(lambda: [measure(item) for item in items[self.rank :: self.size]])
        return [answers[k % self.size][k // self.size] for k in range(len(items))]

    def all_gather(self, call: Callable[[], Answer]) -> list[Answer]:
        """What ``call`` returns in every process, by rank; what it raises in one of them is raised in all."""
        if self.group is None:
            return [call()]
        mine: tuple[Any, Exception | None]
        try:
            mine = (call(), None)
        except Exception as error:  # the others must not wait for this process
            mine = (None, error)
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, (mine[0], _sendable(mine[1])), group=self.group)
        for rank, (_, error) in enumerate(answers):
            if error is not None:
                raise mine[1] if rank == self.rank and mine[1] is not None else error
        return [answer for answer, _ in answers]

    def check_agreement(self, model: nn.Module, x: Tensor) -> None:
        """See to it that all processes hold the same data and the same weights.

        Raises:
            ValueError: if they do not.
        """
        if self.group is None:
            return
        for what, tensors in (("data x", [x]), ("model", [*model.parameters(), *model.buffers()])):
            found = self.all_gather(lambda tensors=tensors: [_fingerprint(t) for t in tensors])  # type: ignore[misc]
            if any(other != found[0] for other in found):
                raise ValueError(
                    f"expected the same {what} in every process of the group, got different ones: seed their making "
                    "alike, load the same file, or broadcast them; a DataLoader must not shuffle per process"
                )

    def _portable(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if self.group is None else tensor.detach().cpu()


SERIAL = WorkSharing()


def rank_noise(
    shape: Sequence[int], *, generator: torch.Generator, dtype: torch.dtype, group: Group
) -> Tensor:
    """Standard normal numbers for this process's batch, on the CPU: its part of those of all batches in a row.

    With generators alike in all processes and batches of one size, the processes together draw what one process draws
    for all of their batches, the batch of rank 0 first.
    """
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    drawn = torch.randn(
        (size * shape[0], *shape[1:]), generator=generator, device="cpu", dtype=dtype
    )
    return drawn[rank * shape[0] : (rank + 1) * shape[0]]


def register_fsdp_methods(model: nn.Module) -> nn.Module:
    """Let FSDP2 gather the weights of its modules for their inverses and log-determinants too, not for forward alone.

        fully_shard(flow)
        hook = RegularizerHook(register_fsdp_methods(flow), [FiniteDifferences(1e-4)])

    Args:
        model: a module that ``fully_shard`` has been applied to, itself or its parts.

    Returns:
        the same module.

    Raises:
        TypeError: if nothing in it is sharded.
    """
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    sharded = [part for part in model.modules() if isinstance(part, FSDPModule)]
    if not sharded:
        raise TypeError(
            f"expected a module after fully_shard(), got {type(model).__name__} with nothing sharded in it"
        )
    for part in sharded:
        for name in METHODS:
            if callable(getattr(part, name, None)):
                register_fsdp_forward_method(part, name)  # type: ignore[arg-type]
    return model


def _fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return (
        tuple(tensor.shape),
        str(tensor.dtype),
        zlib.crc32(memoryview(plain.view(torch.uint8).numpy())),
    )  # type: ignore[arg-type]


def _sendable(error: Exception | None) -> Exception | None:
    """The error as another process can receive it: some cannot be pickled, or not be made again."""
    try:
        copy = pickle.loads(pickle.dumps(error))  # own object, never read from anywhere
        return error if type(copy) is type(error) else None
    except Exception:  # whatever an exception class may do
        return RuntimeError(f"{type(error).__name__}: {error}")

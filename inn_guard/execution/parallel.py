"""Samples shared by the processes of a torch.distributed group, in batches that fit the memory.

Every process gets the same model, data and seeds and runs the same code. It measures its own share
of the samples; the results are gathered, so that all processes continue with the same numbers.
Random numbers belong to samples: every process draws those of the whole batch and takes its rows.
"""

from __future__ import annotations

import functools
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

Group = Any  #: a torch.distributed.ProcessGroup, a class that some builds of torch do not have
Item = TypeVar("Item")
Answer = TypeVar("Answer")

FSDP_METHODS = ("inverse", "forward_and_log_det", "inverse_and_log_det", "log_prob", "linearize")


@dataclass(frozen=True)
class WorkSharing:
    """The processes that share the samples, and the memory of a measurement in each of them.

    Attributes:
        group: the processes; None: this process only, also where torch.distributed has a group.
        memory: bytes that one measurement may hold at once, in addition to the model, the data and
            tensors of their size; None: no limit.
    """

    group: Group | None = None
    memory: float | int | None = None

    @property
    def rank(self) -> int:
        """The number of this process in the group; 0 without one."""
        if self.group is None:
            return 0
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """The number of processes."""
        if self.group is None:
            return 1
        return dist.get_world_size(self.group)

    @property
    def local(self) -> WorkSharing:
        """The same memory limit, in this process only."""
        return WorkSharing(None, self.memory)

    def max_batch(self, footprint: Callable[[float], Footprint]) -> float | int:
        """The number of samples that a measurement may take at once, the same in all processes.

        Args:
            footprint: memory limit in bytes -> the footprint of the measurement; called only where
                there is a limit.

        Returns:
            at least 1; infinite without a limit.
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
        """Measure all rows in parts, which the processes share, and concatenate the results.

        Args:
            rows: indices of samples, at least one.
            measure: rows -> tensors whose first dimension is that of these rows.
            at_most: largest number of rows in one call.

        Returns:
            the tensors for all rows, in the order of ``rows`` and on their device.
        """
        size = max(1, int(min(math.ceil(len(rows) / self.size), at_most)))
        if size >= len(rows):
            return tuple(measure(rows))

        def measure_part(part: Tensor) -> list[Tensor]:
            return [self._portable(tensor) for tensor in measure(part)]

        parts = self.map_items(rows.split(size), measure_part)
        return tuple(torch.cat(field).to(rows.device) for field in zip(*parts, strict=True))

    def map_items(self, items: Iterable[Item], measure: Callable[[Item], Answer]) -> list[Answer]:
        """``measure(item)`` of every item, in order. Process r measures items r, r + size, ..."""
        items = list(items)
        size = self.size
        answers = self.all_gather(lambda: list(map(measure, items[self.rank :: size])))
        return [answers[k % size][k // size] for k in range(len(items))]

    def all_gather(self, call: Callable[[], Answer]) -> list[Answer]:
        """``call()`` of every process, by rank. An exception in one is raised in all of them."""
        if self.group is None:
            return [call()]
        answer: Answer | None = None
        own_error: Exception | None = None
        try:
            answer = call()
        except Exception as error:  # the other processes must not wait for this one
            own_error = error
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, (answer, _sendable(own_error)), group=self.group)
        for rank, (_, error) in enumerate(gathered):
            if error is None:
                continue
            if rank == self.rank and own_error is not None:
                raise own_error  # with its traceback
            raise error
        return [answer for answer, _ in gathered]

    def check_agreement(self, model: nn.Module, x: Tensor) -> None:
        """Compare the data and the weights of all processes.

        Raises:
            ValueError: if they differ.
        """
        if self.group is None:
            return
        for what, tensors in (("data x", [x]), ("model", [*model.parameters(), *model.buffers()])):
            own = [_fingerprint(tensor) for tensor in tensors]
            gathered: list[Any] = self.all_gather(functools.partial(list, own))
            if any(other != gathered[0] for other in gathered):
                raise ValueError(
                    f"expected the same {what} in every process of the group, got different ones: "
                    "use the same seed, load the same file, or broadcast from one process; a "
                    "DataLoader must not shuffle differently in each process"
                )

    def _portable(self, tensor: Tensor) -> Tensor:
        if self.group is None:
            return tensor.detach()
        return tensor.detach().cpu()


SERIAL = WorkSharing()


def rank_noise(
    shape: Sequence[int], *, generator: torch.Generator, dtype: torch.dtype, group: Group
) -> Tensor:
    """Standard normal numbers of ``shape`` (B, ...) for the batch of this process, on the CPU.

    Where all processes have the same generator state and batch size, they draw together the
    numbers that one process draws for the concatenated batches, that of rank 0 first.
    """
    sharing = WorkSharing(group)
    batch, *rest = shape
    whole = (sharing.size * batch, *rest)
    drawn = torch.randn(whole, generator=generator, device="cpu", dtype=dtype)
    return drawn[sharing.rank * batch : (sharing.rank + 1) * batch]


def register_fsdp_methods(model: nn.Module) -> nn.Module:
    """Make FSDP2 gather weights for inverses and log-determinants too, not for ``forward`` only.

        fully_shard(flow)
        hook = RegularizerHook(register_fsdp_methods(flow), [FiniteDifferences(1e-4)])

    Args:
        model: a module to which, or to parts of which, ``fully_shard`` has been applied.

    Returns:
        the same module.

    Raises:
        TypeError: if no part of it is sharded.
    """
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    sharded = [part for part in model.modules() if isinstance(part, FSDPModule)]
    if not sharded:
        raise TypeError(
            f"expected a module after fully_shard(), got {type(model).__name__} with nothing "
            "sharded in it: call fully_shard(model) first"
        )
    for part in sharded:
        for name in FSDP_METHODS:
            if callable(getattr(part, name, None)):
                register_fsdp_forward_method(part, name)  # type: ignore[arg-type]
    return model


def _fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    checksum = zlib.crc32(memoryview(content))  # type: ignore[arg-type]
    return tuple(tensor.shape), str(tensor.dtype), checksum


def _sendable(error: Exception | None) -> Exception | None:
    """The error itself, or a RuntimeError with its message where pickling it fails."""
    try:
        pickle.loads(pickle.dumps(error))  # this very object, not foreign data
    except Exception:  # exception classes may raise anything here
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error

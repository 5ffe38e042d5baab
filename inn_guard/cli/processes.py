"""The processes that ``torchrun -m inn_guard ...`` starts, which share one audit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from inn_guard.execution.parallel import Group

__all__ = ["is_first", "processes"]


def is_first() -> bool:
    """Whether this process prints and writes: the only one, or torchrun's first."""
    return not _started_by_torchrun() or os.environ["RANK"] == "0"


@contextmanager
def processes() -> Iterator[Group | None]:
    """The group of torchrun's processes, which leave the block together; None if there is one."""
    if not _started_by_torchrun() or os.environ["WORLD_SIZE"] == "1":
        yield None
        return
    # what is gathered are numbers on the CPU, whatever device the model is on
    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
        # torchrun ends all processes as soon as one has failed: not before the report is written
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _started_by_torchrun() -> bool:
    return {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"} <= set(os.environ)

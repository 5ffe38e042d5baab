"""What a call costs, in arithmetic operations rather than in seconds of a busy machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["TooManyOperations", "count_operations"]

Answer = TypeVar("Answer")


class TooManyOperations(RuntimeError):
    """A call needs more operations than it may have."""


def count_operations(
    call: Callable[[], Answer], *, at_most: float = math.inf
) -> tuple[Answer, int]:
    """What ``call()`` returns and its operations, backward passes included.

    Products and convolutions count their multiplications and additions; any other operation that
    computes something counts one per number it returns. Views are free.

    Args:
        call: what is counted.
        at_most: how many operations it may have, so that a solver which does not end is ended, on
            every machine at the same step.

    Raises:
        TooManyOperations: if it needs more.

    >>> import torch
    >>> count_operations(lambda: torch.ones(2, 3) @ torch.ones(3, 4))[1]  # 48, and 18 ones
    66
    """
    with _Counter(at_most) as counter:
        answer = call()
    return answer, counter.total


class _Counter(TorchDispatchMode):
    def __init__(self, at_most: float) -> None:
        super().__init__()
        self.total = 0
        self.at_most = at_most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        elif not func.is_view:
            results = out if isinstance(out, (tuple, list)) else (out,)
            self.total += sum(result.numel() for result in results if isinstance(result, Tensor))
        if self.total > self.at_most:
            raise TooManyOperations(f"more than {self.at_most:,.0f} operations")
        return out

"""Memory-saving backpropagation: gradients of a chain of invertible layers from its output."""

from inn_guard.memory_saving.model import (
    INPUT,
    OUTPUT,
    MemorySaving,
    memory_saving,
    saving_compared_chain,
)
from inn_guard.memory_saving.replay import RandomAndBufferState

__all__ = [
    "INPUT",
    "OUTPUT",
    "MemorySaving",
    "RandomAndBufferState",
    "memory_saving",
    "saving_compared_chain",
]

"""Memory-saving backpropagation: gradients of a chain of invertible layers without its activations."""

from inn_guard.reversible.memory_saving import MemorySaving, memory_saving
from inn_guard.reversible.replay import Surroundings

__all__ = ["MemorySaving", "Surroundings", "memory_saving"]

"""Memory-saving backpropagation: gradients of a chain of invertible layers without its activations."""

from inn_guard.reversible.memory_saving import MemorySaving, memory_saving

__all__ = ["MemorySaving", "memory_saving"]

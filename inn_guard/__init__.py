"""inn_guard: audit and repair the numerical stability of invertible neural networks."""

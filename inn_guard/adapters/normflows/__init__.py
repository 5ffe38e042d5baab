"""normflows: the adapter, and the Jacobians of the layers whose structure is known."""

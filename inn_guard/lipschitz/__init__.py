"""Certified Lipschitz bounds: never below the truth, in both directions of an invertible network."""

"""Certified Lipschitz bounds: never below the truth, in both directions of an invertible network."""

from inn_guard.lipschitz.bounding import LipschitzBounds, lipschitz_bounds
from inn_guard.lipschitz.certificates import Certificate
from inn_guard.lipschitz.intervals import Box

__all__ = ["Box", "Certificate", "LipschitzBounds", "lipschitz_bounds"]

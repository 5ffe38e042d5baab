"""Certified Lipschitz bounds of an invertible network, in both directions."""

from inn_guard.lipschitz.bounds import LipschitzBounds, lipschitz_bounds
from inn_guard.lipschitz.certificate import Certificate
from inn_guard.numerics.intervals import Box

__all__ = ["Box", "Certificate", "LipschitzBounds", "lipschitz_bounds"]

"""Regularizers: map + batch -> a scalar that keeps a map and its inverse well conditioned."""

from inn_guard.training.regularizers.adaptive import AdaptiveCoefficient
from inn_guard.training.regularizers.finite_differences import Direction, FiniteDifferences
from inn_guard.training.regularizers.normalizing_flow import NormalizingFlowLoss

__all__ = ["AdaptiveCoefficient", "Direction", "FiniteDifferences", "NormalizingFlowLoss"]

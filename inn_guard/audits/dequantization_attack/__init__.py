"""Searches of a cube around every sample for the point that the inverse reconstructs worst."""

from inn_guard.audits.dequantization_attack.momentum_ascent import Ascent
from inn_guard.audits.dequantization_attack.projected_gradient import ProjectedGradient
from inn_guard.audits.dequantization_attack.quantization import Cubes, Quantization
from inn_guard.audits.dequantization_attack.random_search import RandomSearch
from inn_guard.audits.dequantization_attack.restarts import Restarts
from inn_guard.audits.dequantization_attack.search import Attack, Search
from inn_guard.audits.dequantization_attack.spectral_ascent import SpectralAscent
from inn_guard.audits.dequantization_attack.spsa import GradientFree

__all__ = [
    "Ascent",
    "Attack",
    "Cubes",
    "GradientFree",
    "ProjectedGradient",
    "Quantization",
    "RandomSearch",
    "Restarts",
    "Search",
    "SpectralAscent",
]

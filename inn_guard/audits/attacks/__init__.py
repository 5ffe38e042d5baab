"""Attacks: searches of a cube around every sample for the point that the inverse reconstructs worst."""

from inn_guard.audits.attacks.ascent import Ascent
from inn_guard.audits.attacks.cubes import Cubes, Quantization
from inn_guard.audits.attacks.gradient_free import GradientFree
from inn_guard.audits.attacks.projected_gradient import ProjectedGradient
from inn_guard.audits.attacks.random_search import RandomSearch
from inn_guard.audits.attacks.restarts import Restarts
from inn_guard.audits.attacks.search import Search, Strategy
from inn_guard.audits.attacks.spectral import SpectralAscent

__all__ = [
    "Ascent",
    "Cubes",
    "GradientFree",
    "ProjectedGradient",
    "Quantization",
    "RandomSearch",
    "Restarts",
    "Search",
    "SpectralAscent",
    "Strategy",
]

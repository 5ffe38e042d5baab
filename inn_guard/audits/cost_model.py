"""What each audit costs: passes of one sample through the model, and what it holds at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from inn_guard.audits.out_of_distribution.input_families import PRIORS, PROBES
from inn_guard.audits.out_of_distribution.radius_search import BISECTIONS, LARGEST, SMALLEST

__all__ = ["COSTS", "Cost", "Passes", "Task"]

USUAL = 3.0  #: times the root of the steps allowed is what an iteration for singular values usually takes
WORST = 8  #: samples that are explained, or that a check takes where it says nothing else
DIRECTIONS = 16
EXACT_UP_TO = 512
ARITHMETICS = 5
SWEEPS = 3  #: inverse passes that one sweep of a forecast costs


@dataclass(frozen=True)
class Task:
    """What is to be audited: samples, entries of a sample, layers; and the check's own settings."""

    samples: int
    dimension: int
    layers: int
    settings: Mapping[str, Any]

    @property
    def chosen(self) -> int:
        """Samples that the check takes."""
        return min(self.samples, int(self.settings.get("samples", self.samples)))

    def steps(self, allowed: int) -> float | int:
        """Steps of Lanczos for one end of the spectrum."""
        return min(self.dimension, allowed, USUAL * math.sqrt(allowed))


@dataclass(frozen=True)
class Passes:
    """Passes of one sample: forward, inverse, forward with the graph kept, and products with J, J^T, J^-1 or J^-T."""

    forward: float | int = 0
    inverse: float | int = 0
    linearize: float | int = 0
    product: float | int = 0

    def __mul__(self, times: float | int) -> Passes:
        return Passes(
            *(times * count for count in (self.forward, self.inverse, self.linearize, self.product))
        )

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.forward + other.forward,
            self.inverse + other.inverse,
            self.linearize + other.linearize,
            self.product + other.product,
        )


@dataclass(frozen=True)
class Cost:
    """What a check costs.

    Attributes:
        passes: of one sample, all together.
        at_once: samples that are held at once, unless memory is short.
        linearized: whether they are held with their graph.
        vectors: of the size of x that are held beside, per sample.
        seconds: that it may take besides, a limit of its own.
    """

    passes: Passes
    at_once: int
    linearized: bool = False
    vectors: float | int = 0
    seconds: float | int = 0


ROUND = Passes(forward=1, inverse=1)
GRADIENT = Passes(linearize=1, product=2)


def _extremes(task: Task, allowed: int) -> Passes:
    """Both ends of the spectrum at one sample."""
    return Passes(linearize=1, product=4 * task.steps(allowed))


def _preflight(task: Task) -> Cost:
    few = min(WORST, task.samples)
    return Cost(Passes(forward=6, inverse=2) * few, few)


def _reconstruction(task: Task) -> Cost:
    few = min(WORST, task.samples)
    trips = (ROUND * 3 + Passes(forward=1)) * task.samples
    explained = (_extremes(task, 20) + Passes(product=4)) * few
    batch = min(task.samples, int(task.settings["batch_size"]))
    return Cost(trips + explained, batch, vectors=4)


def _log_det(task: Task) -> Cost:
    dense = task.dimension <= EXACT_UP_TO
    reference = (
        Passes(forward=1, product=task.dimension)
        if dense
        else Passes(linearize=1, product=8 * 2 * 16)
    )
    own = Passes(forward=3, inverse=1)
    vectors = task.dimension if dense else 2 * 16
    passes = Passes(forward=1) * task.samples + (own + reference) * task.chosen
    return Cost(passes, task.chosen, linearized=True, vectors=vectors)


def _out_of_distribution(task: Task) -> Cost:
    families = 1 + len(PROBES) + len(PRIORS)
    searched = 2 * (LARGEST - SMALLEST + 1 + BISECTIONS) * DIRECTIONS
    trips = ROUND * (families * task.chosen + searched + 3 * task.chosen)
    spectra = _extremes(task, 20) * (
        families * min(task.chosen, int(task.settings["spectrum_samples"]))
    )
    return Cost(trips + spectra, max(task.chosen, DIRECTIONS), vectors=4)


def _jacobian_spectrum(task: Task) -> Cost:
    allowed = int(task.settings["max_steps"])
    passes = Passes(forward=1) * task.samples + _extremes(task, allowed) * task.chosen
    return Cost(passes, task.chosen, linearized=True, vectors=2 * min(task.dimension, allowed))


def _layer_blame(task: Task) -> Cost:
    sweeps = Passes(product=min(task.dimension, int(task.settings["probes"])))
    each = sweeps + _extremes(task, 20) + Passes(inverse=1)
    passes = Passes(forward=1) * task.samples + each * task.chosen
    return Cost(passes, task.chosen, linearized=True, vectors=2 * 20 + task.layers)


def _precision(task: Task) -> Cost:
    forecast = Passes(forward=1, inverse=2 * SWEEPS)
    return Cost(
        (ROUND * ARITHMETICS + forecast) * task.samples, task.samples, vectors=2 * (task.layers + 4)
    )


def _gradient_angle(task: Task) -> Cost:
    batch = min(task.samples, int(task.settings["batch_size"]))
    both = GRADIENT * 2 + ROUND
    return Cost(both * task.samples + GRADIENT * (2 * batch), batch, linearized=True)


def _full_spectrum(task: Task) -> Cost:
    rows = Passes(linearize=1, product=task.dimension) * task.chosen
    # the Jacobian in the model's dtype, and in float64 for its decomposition
    return Cost(
        Passes(forward=1) * task.samples + rows, 1, linearized=True, vectors=4 * task.dimension
    )


def _dequantization_attack(task: Task) -> Cost:
    budget = getattr(task.settings.get("strategy"), "budget", 800.0)
    return Cost(Passes(forward=budget) * task.chosen, task.chosen, linearized=True, vectors=4)


def _lipschitz_bounds(task: Task) -> Cost:
    return Cost(Passes(), 1, seconds=float(task.settings["seconds"]))


#: name of an audit -> its cost
COSTS: dict[str, Callable[[Task], Cost]] = {
    "preflight": _preflight,
    "reconstruction": _reconstruction,
    "log_det": _log_det,
    "out_of_distribution": _out_of_distribution,
    "jacobian_spectrum": _jacobian_spectrum,
    "layer_blame": _layer_blame,
    "precision": _precision,
    "gradient_angle": _gradient_angle,
    "full_spectrum": _full_spectrum,
    "dequantization_attack": _dequantization_attack,
    "lipschitz_bounds": _lipschitz_bounds,
}

"""The computation of bounds: layers, chains, Jacobians over the box, witnesses, cross-checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable
from inn_guard.core.readable import evaluate_weight_norms
from inn_guard.execution.deadline import Deadline
from inn_guard.lipschitz import rules
from inn_guard.lipschitz.branch_and_bound.search import branch_and_bound
from inn_guard.lipschitz.cross_check import (
    FAILURES,
    POINTS,
    contradiction,
    cross_checked,
    why_no_chain,
    why_no_copy,
    without_bounds,
)
from inn_guard.lipschitz.linearised_chain import linearised
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.preimage import is_everywhere
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.whole_network import (
    Factor,
    LayerBound,
    LayerBounds,
    bound_layers,
    forward_factors,
    inverse_factors,
    product,
)
from inn_guard.lipschitz.witness import Witnesses, measure, search, starting_points
from inn_guard.numerics.intervals import Box, Interval
from inn_guard.numerics.rounding import Upper

__all__ = ["Computed", "Conditions", "Progress", "compute"]

Progress = Callable[[str, float], None]
LINEARISED = 0.9  #: of the time, at most, for a linearisation; it is left out if it takes longer
BRANCHING = 4  #: dimensions up to which a box is branched


@dataclass(frozen=True)
class Conditions:
    """What bounds were computed for, so that they can be computed again.

    Attributes:
        box: where they hold.
        seconds: the budget of work.
        effort: budget per chain, or None for that which follows from ``seconds``.
    """

    box: Box
    seconds: float
    effort: SearchBudget | None = None


@dataclass(frozen=True)
class Computed:
    """What a computation found.

    Attributes:
        upper: certified bounds of sup ||J|| and sup ||J^-1||.
        lower: witnessed ones, or what follows from the other direction.
        method: names of the methods that gave ``upper``.
        scope: "global", or the box.
        per_layer: every layer with its box, its bounds and Table 3's.
        paper_bound: the product of Table 3's formulas, with norm products for subnetworks; NaN if
            the budget ran out.
        reason: why a bound is infinite; empty where both are finite.
        factors_forward: factors whose product bounds the forward map.
        factors_inverse: those of the inverse map.
        witnesses: (stretched, shrunk), the points and directions of the lower bounds, each None
            where there is none.
        leaves: bounds by branch and bound, by direction.
    """

    upper: Pair
    lower: Pair
    method: tuple[str, str]
    scope: str
    per_layer: tuple[LayerBound, ...]
    paper_bound: Pair
    reason: str
    factors_forward: tuple[Factor, ...]
    factors_inverse: tuple[Factor, ...]
    witnesses: Witnesses
    leaves: Mapping[str, float]


def compute(
    model: Invertible,
    conditions: Conditions,
    data: Tensor | None = None,
    progress: Progress | None = None,
    *,
    goal: Pair | None = None,
) -> Computed:
    """The bounds of a model.

    Args:
        model: the model.
        conditions: the box and the budget.
        data: samples at which the search for witnesses begins; default: random points of the box.
        progress: called with a sentence and the fraction that is done.
        goal: bounds to be proved again: nothing more is searched for once they are reached.
    """
    rules.load()
    return _Run(model, conditions, data, progress, goal=goal).bounds()


class _Run:
    """One computation of bounds: the model, the box and the time."""

    def __init__(
        self,
        model: Invertible,
        conditions: Conditions,
        data: Tensor | None,
        progress: Progress | None,
        *,
        goal: Pair | None = None,
    ) -> None:
        self.model, self.conditions, self.data = model, conditions, data
        self.box, self.seconds, self.effort = conditions.box, conditions.seconds, conditions.effort
        self.deadline = Deadline.after(self.seconds)
        self.progress = progress or (lambda sentence, share: None)
        self.goal = goal
        self.witnesses = Witnesses()
        box = self.box
        self.branches = box.bounded and box.lo.dim() == 1 and box.lo.numel() <= BRANCHING

    def bounds(self) -> Computed:
        """The best bounds by all methods."""
        self.progress("layer by layer", 0.0)
        exact = self._exact_copy()
        # calls of a model that initialises itself change it: rules read a copy that is not called
        called = self._exact_copy()
        points = self._points()
        layers = exact.layers() or (exact,)
        called_layers = called.layers() or (called,)
        why = why_no_copy(self.model) or why_no_chain(called, called_layers, points)
        if why is None:
            maps = [(layer.name, bounded_map(layer.block, layer)) for layer in layers]
        else:
            called_layers = (called,)
            maps = [(exact.name, NoRule(why.reason))]
        computed = self._per_layer(maps)
        per_layer = cross_checked(computed, called_layers, points)
        is_refuted = per_layer != computed
        self.progress("whole network", 0.2)
        forward, inverse = self._whole_network(per_layer)
        best = Pair(product([f.bound for f in forward]), product([f.bound for f in inverse]))
        method = [_method(forward), _method(inverse)]
        by_layers = list(method)
        leaves: dict[str, float] = {}
        self.progress("witnesses", 0.6)
        self._search_witnesses(exact)
        if self.branches and not is_refuted and not self._is_settled(best, self.witnesses.lower):
            with suppress(Unbounded):
                pair = self._branched([described for _, described in maps], exact)
                leaves = {"forward": pair.forward, "inverse": pair.inverse}
                for k, bound in enumerate(pair):
                    if bound < best[k]:
                        method[k] = "branch and bound"
                best = Pair(*map(min, pair, best))
        self.progress("done", 1.0)
        if not self.model.bijective:
            # a direction that an encoder forgets says nothing about an inverse
            self.witnesses = Witnesses(self.witnesses.stretched)
        measured = self.witnesses.lower
        wrong = contradiction(best, measured, method)
        if wrong:
            best = Pair(Upper(math.inf), Upper(math.inf))
            per_layer = [without_bounds(layer, wrong, layer.box.shape) for layer in per_layer]
            forward = inverse = [Factor(0, len(per_layer), math.inf)]
            leaves = {}
        lower = _lower_bounds(self.model, measured, best)
        scope = f"on the {_text_of(self.box)}"
        is_global = all(layer.bounds.is_global for layer in per_layer)
        # chains and enclosures take slopes on the box, even of layers whose own bounds are global
        if any(factor.proof is not None or factor.method for factor in (*forward, *inverse)):
            is_global = is_everywhere(self.box)
        if is_global and method == by_layers:
            scope = "global"
        reason = ""
        if math.inf in best:
            reason = wrong or _first_reason(per_layer)
        return Computed(
            Pair(float(best.forward), float(best.inverse)),
            lower,
            (method[0], method[1]),
            scope,
            tuple(per_layer),
            _paper_bound(per_layer),
            reason,
            tuple(forward),
            tuple(inverse),
            self.witnesses,
            leaves,
        )

    def _is_settled(self, best: Pair, measured: Pair) -> bool:
        """Whether the goal, if there is one, is reached already, or is out of reach."""
        if self.goal is None:
            return False
        reached = all(own <= goal for own, goal in zip(best, self.goal, strict=True))
        return reached or any(own > goal for own, goal in zip(measured, self.goal, strict=True))

    def _search_witnesses(self, model: Invertible) -> None:
        """Search uphill from the data, or from random points of the box."""
        deadline, data = self._fraction(0.2, 0.8), self.data
        generator = torch.Generator().manual_seed(0)
        if data is None:
            count = 4
            if self.box.lo.numel() <= 64:
                count = 256
            data = starting_points(self.box, count, generator)
        with suppress(NotApplicable, *FAILURES):
            self.witnesses = search(model, data, self.box, deadline=deadline, generator=generator)

    def _branched(self, maps: list[BoundedMap], model: Invertible) -> Pair:
        """Bounds by branch and bound.

        Raises:
            Unbounded: if there are none.
        """
        box = self.box
        self.progress("branch and bound", 0.7)
        if self.goal is not None:
            found = branch_and_bound(
                maps, box, lower=self.goal, deadline=self.deadline, tolerance=1.0
            )
        else:
            lower = self.witnesses.lower

            def probe(points: Tensor) -> Pair:
                with suppress(NotApplicable, *FAILURES):
                    self.witnesses = self.witnesses.joined(measure(model, points))
                return self.witnesses.lower

            found = branch_and_bound(maps, box, lower=lower, probe=probe, deadline=self.deadline)
        return found.pair

    def _exact_copy(self) -> Invertible:
        exact = self.model.to_dtype(torch.float64)
        evaluate_weight_norms(exact)
        return exact

    def _points(self) -> Tensor:
        """Some points of the box: of the data if there are any, else random ones."""
        points = starting_points(self.box, POINTS, torch.Generator().manual_seed(1))
        if self.data is None:
            return points
        given = self.data[:POINTS].detach().double().cpu()
        return torch.minimum(torch.maximum(given, self.box.lo), self.box.hi)

    def _fraction(self, branching: float, otherwise: float) -> Deadline:
        """A share of the time left, which is smaller if branch and bound still has to run."""
        if self.branches:
            return self.deadline.fraction(branching)
        return self.deadline.fraction(otherwise)

    def _per_layer(self, maps: list[tuple[str, BoundedMap]]) -> LayerBounds:
        described = [bounded for _, bounded in maps]
        effort = self.effort
        if effort is None:
            seconds = min(10.0, 0.4 * self.seconds / len(maps))
            effort = SearchBudget(steps=30, seconds=seconds)
        try:
            near = linearised(described, self.box, self.deadline.fraction(LINEARISED))
            effort = replace(effort, deadline=self._fraction(0.2, 0.4))
            return bound_layers(maps, self.box, effort, near)
        except RuntimeError as error:
            shape = ", ".join(["B", *map(str, self.box.shape)])
            raise ValueError(
                "expected a domain of the shape of one sample, but the model does not accept "
                f"samples of the domain's shape, ({shape}): {error}"
            ) from error

    def _whole_network(self, per_layer: LayerBounds) -> tuple[list[Factor], list[Factor]]:
        effort = self.effort
        if effort is None:
            share = 0.3
            if self.branches:
                share = 0.05
            effort = SearchBudget(steps=400, seconds=share * self.seconds)
        effort = replace(effort, deadline=self._fraction(0.1, 0.4))
        forward = forward_factors(per_layer, effort)
        effort = replace(effort, deadline=self._fraction(0.1, 0.6))
        return forward, inverse_factors(per_layer, effort)


def _lower_bounds(model: Invertible, measured: Pair, upper: Pair) -> Pair:
    """What is measured, or follows from the other direction."""
    if not model.bijective:
        return measured
    # Remark 3: the reciprocal of an upper bound of one direction is a lower bound of the other
    forward = max(measured.forward, _reciprocal(upper.inverse))
    inverse = max(measured.inverse, _reciprocal(upper.forward))
    # where both are equal, the measured one may be larger by its rounding
    return Pair(min(forward, upper.forward), min(inverse, upper.inverse))


def _reciprocal(bound: float) -> float:
    if not 0 < bound < math.inf:
        return 0.0
    return math.nextafter(1 / float(bound), 0.0)


def _paper_bound(layers: LayerBounds) -> Pair:
    forward = [layer.paper_bound.forward for layer in layers]
    inverse = [layer.paper_bound.inverse for layer in layers]
    if any(map(math.isnan, forward + inverse)):
        return Pair(math.nan, math.nan)
    return Pair(float(product(forward)), float(product(inverse)))


def _first_reason(layers: LayerBounds) -> str:
    for k, layer in enumerate(layers):
        if layer.bounds.reason:
            return f"layer {k} ({layer.name}): {layer.bounds.reason}"
    return (
        "every layer has a bound, but their product is beyond the range of float64; "
        "pass a smaller domain"
    )


def _method(factors: list[Factor]) -> str:
    longest = max(factors, key=lambda f: f.last - f.first)
    count, total = longest.last - longest.first, factors[-1].last
    if count == 1:
        return "product of layers"
    kind = longest.method or "recursion"
    if count < total:
        return f"{kind} over runs of up to {count} of {total} layers"
    return longest.method or "whole-network recursion"


def _text_of(box: Interval) -> str:
    if not box.bounded:
        return "unbounded box"
    return f"box within [{box.inf():.4g}, {box.sup():.4g}]^{box.lo.numel()}"

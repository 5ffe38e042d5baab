"""lipschitz_bounds: certified upper and witnessed lower bounds of bi-Lipschitz constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inn_guard.adapters import wrap
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable
from inn_guard.core.readable import evaluate_weight_norms
from inn_guard.execution.deadline import Deadline
from inn_guard.lipschitz import rules
from inn_guard.lipschitz.branch_and_bound.search import bounds_of_one_box, branch_and_bound
from inn_guard.lipschitz.certificate import Certificate, Conditions
from inn_guard.lipschitz.cross_check import (
    FAILURES,
    POINTS,
    contradiction,
    cross_checked,
    why_no_chain,
    why_no_copy,
    without_bounds,
)
from inn_guard.lipschitz.fingerprint import fingerprint, weights_hash
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.closed_forms import Pair
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
from inn_guard.lipschitz.witness import (
    Witness,
    larger,
    measure,
    search,
    smaller,
    starting_points,
)
from inn_guard.numerics.intervals import Box, Interval
from inn_guard.numerics.rounding import Upper

__all__ = ["LipschitzBounds", "bounds_again", "lipschitz_bounds"]

Progress = Callable[[str, float], None]
BRANCHING = 4  #: dimensions up to which a box is branched
WHOLE = 16  #: dimensions up to which Jacobians over the box as a whole are enclosed
LOOSE = 1e3  #: an upper bound this many times above the witnessed lower bound is called loose


@dataclass(frozen=True, repr=False)
class LipschitzBounds:
    """What is known about Lip(F) and Lip(F^-1), dimensionless.

    ``scope`` says where: on all of R^d, or on a box. On a box, ``inverse`` bounds sup ||J(x)^-1||
        over x in the box.
    That is the Lipschitz constant of F^-1 on the image of the box only where that image is convex;
    otherwise it is one along images of straight paths.

    Attributes:
        forward: certified upper bound of sup ||J||.
        inverse: certified upper bound of sup ||J^-1||.
        lower_forward: witnessed lower bound of sup ||J||.
        lower_inverse: witnessed lower bound of sup ||J^-1||.
        method: names of the methods that gave ``forward`` and ``inverse``.
        scope: "global", or the box.
        per_layer: every layer with its box, its bounds and Table 3's.
        paper_bound: the product of Table 3's formulas, with norm products for subnetworks; NaN if
            the budget ran out.
        reason: why a bound is infinite; empty where both are finite.
        certificate: the proof of the bounds; ``certificate.save(path)``.
        witnesses: (most stretched, most shrunk) points and directions, each None where there is
            none.
    """

    forward: float
    inverse: float
    lower_forward: float
    lower_inverse: float
    method: tuple[str, str]
    scope: str
    per_layer: tuple[LayerBound, ...]
    paper_bound: Pair
    reason: str
    certificate: Certificate
    witnesses: tuple[Witness | None, Witness | None]

    @property
    def looseness(self) -> Pair:
        """Upper bound / lower bound of each direction; inf where one of them says nothing."""
        return Pair(
            _quotient(self.forward, self.lower_forward), _quotient(self.inverse, self.lower_inverse)
        )

    def __str__(self) -> str:
        forward = f"{self.lower_forward:.4g} <= Lip(F) <= {self.forward:.4g}"
        inverse = f"{self.lower_inverse:.4g} <= Lip(F^-1) <= {self.inverse:.4g}"
        lines = [
            f"{forward}  ({self.method[0]}, {self.scope}){_remark(self.looseness.forward)}",
            f"{inverse}  ({self.method[1]}, {self.scope}){_remark(self.looseness.inverse)}",
        ]
        if self.reason:
            lines.append(self.reason)
        return "\n".join(lines)

    def __repr__(self) -> str:
        forward = f"[{self.lower_forward:.4g}, {self.forward:.4g}]"
        inverse = f"[{self.lower_inverse:.4g}, {self.inverse:.4g}]"
        return f"LipschitzBounds(forward={forward}, inverse={inverse}, scope={self.scope!r})"


def _quotient(upper: float, lower: float) -> float:
    if lower <= 0:
        return math.inf
    return upper / lower


def _remark(looseness: float) -> str:
    if looseness < LOOSE:
        return ""
    if math.isinf(looseness):
        return "; proves nothing"
    return f"; loose: the upper bound is {looseness:.2g} times the largest value found"


def lipschitz_bounds(
    model: Any,
    domain: Box | Tensor,
    *,
    data: Tensor | None = None,
    seconds: float = 60.0,
    effort: SearchBudget | None = None,
    progress: Progress | None = None,
) -> LipschitzBounds:
    """Certified upper and witnessed lower bounds of a model's bi-Lipschitz constants.

    First layer by layer; then, within the time, runs of layers as one chain, or as a product of
    comparison matrices; and in up to four dimensions, on a bounded box, branch and bound. The least
    bound is kept.

    Args:
        model: an Invertible, or any model that ``wrap`` accepts.
        domain: where the bounds hold: ``Box(lo, hi)`` of the shape of one sample,
            ``Box.everywhere(shape)`` for global bounds, or samples (B, *shape), around which the
            smallest box is taken.
        data: samples (B, *shape) at which the search for witnesses begins; default: the samples of
            ``domain``, or random points of the box.
        seconds: budget of work for everything together, in seconds of one slow core. Operations
            are counted, so that the bounds are the same on every machine and under every load.
            Work that is expected to take longer is left out or replaced by looser bounds.
        effort: budget per chain; default: derived from ``seconds``.
        progress: called with a sentence and the fraction that is done.

    Returns:
        The bounds; infinite ones with the reason.

    Raises:
        TypeError: if ``domain`` is neither a Box nor a tensor.
        ValueError: if ``seconds`` is negative or not a number, if samples are not finite, or if
            the shapes of model, ``domain`` and ``data`` do not agree.

    >>> import torch
    >>> from inn_guard.layers.permutation import Permutation
    >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    >>> lipschitz_bounds(Permutation.reverse(2), x, seconds=1.0)
    LipschitzBounds(forward=[1, 1], inverse=[1, 1], scope='global')

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), Table 3, Remark 3.
    """
    usable = isinstance(seconds, (int, float)) and seconds >= 0
    if not usable or (isinstance(seconds, int) and seconds > 10**18):
        raise ValueError(f"expected a time of at least 0 seconds, got {seconds!r:.60}")
    if data is None and isinstance(domain, Tensor):
        data = domain
    box = _as_box(domain)
    if data is not None and (len(data) == 0 or data.shape[1:] != box.shape):
        wanted = ", ".join(["B >= 1", *map(str, box.shape)])
        raise ValueError(
            f"expected data of the domain's shape, ({wanted}), got {tuple(data.shape)}"
        )
    model = wrap(model)
    rules.load()
    return _Run(model, Conditions(box, seconds, effort), data, progress).bounds()


def bounds_again(model: Invertible, conditions: Conditions, *, goal: tuple[float, float]) -> Pair:
    """The bounds of a model, computed again as far as they are needed to prove a goal.

    Args:
        model: the model.
        conditions: box and budget of the first computation.
        goal: the first bounds; branch and bound ends there.
    """
    rules.load()
    found = _Run(model, conditions, None, None, goal=Pair(*goal)).bounds()
    return Pair(found.forward, found.inverse)


def _as_box(domain: Any) -> Box:
    if isinstance(domain, Box):
        if not domain.shape or not domain.lo.numel():
            raise ValueError(
                "expected a domain of the shape of one sample, such as Box(lo, hi) with corners of "
                f"shape (D,), got corners of shape {tuple(domain.shape)}"
            )
        return domain
    if not isinstance(domain, Tensor):
        raise TypeError(
            "expected a domain as inn_guard.Box(lo, hi) or as a tensor of samples (B, *shape), "
            f"got {type(domain).__name__}"
        )
    if not bool(domain.isfinite().all()):
        raise ValueError("expected finite samples as the domain, got NaN or Inf; leave those out")
    return Box.around(domain)


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
        box = self.box
        self.branches = box.bounded and box.lo.dim() == 1 and box.lo.numel() <= BRANCHING

    def bounds(self) -> LipschitzBounds:
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
        certificate = Certificate(
            tuple(forward),
            tuple(inverse),
            weights=weights_hash(self.model.state_dict()),
            map=fingerprint(self.model),
            conditions=self.conditions,
        )
        self.progress("witnesses", 0.6)
        witnesses = _Witnesses(exact)
        witnesses.search(self.box, self.data, self._fraction(0.2, 0.8))
        if not is_refuted and not self._is_settled(best, witnesses.lower):
            with suppress(Unbounded):
                name, pair = self._enclosed([described for _, described in maps], witnesses)
                leaves = {"forward": pair.forward, "inverse": pair.inverse}
                certificate = replace(certificate, leaves=leaves)
                for k, bound in enumerate(pair):
                    if bound < best[k]:
                        method[k] = name
                best = Pair(*map(min, pair, best))
        self.progress("done", 1.0)
        measured = witnesses.lower
        if not self.model.bijective:
            # a direction that an encoder forgets has no inverse that its bound could contradict
            measured = Pair(measured.forward, 0.0)
        wrong = contradiction(best, measured, method)
        if wrong:
            best = Pair(Upper(math.inf), Upper(math.inf))
            per_layer = [without_bounds(layer, wrong, layer.box.shape) for layer in per_layer]
            nothing = (Factor(0, len(per_layer), math.inf),)
            certificate = replace(certificate, forward=nothing, inverse=nothing, leaves={})
        lower, found = _lower_bounds(self.model, witnesses, best)
        scope = f"on the {_text_of(self.box)}"
        is_global = all(layer.bounds.is_global for layer in per_layer)
        if is_global and method == by_layers:
            scope = "global"
        reason = ""
        if math.inf in best:
            reason = wrong or _first_reason(per_layer)
        return LipschitzBounds(
            float(best.forward),
            float(best.inverse),
            lower.forward,
            lower.inverse,
            (method[0], method[1]),
            scope,
            tuple(per_layer),
            _paper_bound(per_layer),
            reason,
            certificate,
            found,
        )

    def _is_settled(self, best: Pair, measured: Pair) -> bool:
        """Whether the goal, if there is one, is reached already, or is out of reach."""
        if self.goal is None:
            return False
        reached = all(own <= goal for own, goal in zip(best, self.goal, strict=True))
        return reached or any(own > goal for own, goal in zip(measured, self.goal, strict=True))

    def _enclosed(self, maps: list[BoundedMap], witnesses: _Witnesses) -> tuple[str, Pair]:
        """Bounds by Jacobians over the box, whole or cut, and the name of the method.

        Raises:
            Unbounded: if there are none.
        """
        box = self.box
        if not box.bounded or box.lo.dim() != 1 or box.lo.numel() > WHOLE:
            raise Unbounded("images, many dimensions, or no bounded box")
        if not self.branches:
            if self.deadline.passed:
                raise Unbounded("the budget is spent")
            return "enclosed Jacobians", bounds_of_one_box(maps, box)
        self.progress("branch and bound", 0.7)
        if self.goal is not None:
            found = branch_and_bound(
                maps, box, lower=self.goal, deadline=self.deadline, tolerance=1.0
            )
        else:
            lower, probe = witnesses.lower, witnesses.measure
            found = branch_and_bound(maps, box, lower=lower, probe=probe, deadline=self.deadline)
        return "branch and bound", found.pair

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
        effort = self.effort
        if effort is None:
            seconds = min(10.0, 0.4 * self.seconds / len(maps))
            effort = SearchBudget(steps=30, seconds=seconds)
        effort = replace(effort, deadline=self._fraction(0.2, 0.4))
        try:
            return bound_layers(maps, self.box, effort)
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


class _Witnesses:
    """The most stretched and the most shrunk direction found so far."""

    def __init__(self, model: Invertible) -> None:
        self.model = model
        self.stretch: Witness | None = None
        self.shrink: Witness | None = None

    @property
    def lower(self) -> Pair:
        """The lower bounds that they prove."""
        forward = inverse = 0.0
        if self.stretch is not None:
            forward = self.stretch.ratio
        if self.shrink is not None:
            inverse = 1 / self.shrink.ratio
        return Pair(forward, inverse)

    def search(self, box: Box, data: Tensor | None, deadline: Deadline) -> None:
        """Search uphill from the data, or from random points of the box."""
        generator = torch.Generator().manual_seed(0)
        if data is None:
            count = 4
            if box.lo.numel() <= 64:
                count = 256
            data = starting_points(box, count, generator)
        with suppress(NotApplicable, *FAILURES):
            found = search(self.model, data, box, deadline=deadline, generator=generator)
            self._keep(*found)

    def measure(self, points: Tensor) -> Pair:
        """The lower bounds after a measurement at some points."""
        with suppress(NotApplicable, *FAILURES):
            self._keep(*measure(self.model, points))
        return self.lower

    def _keep(self, stretch: Witness | None, shrink: Witness | None) -> None:
        self.stretch = larger(self.stretch, stretch)
        self.shrink = smaller(self.shrink, shrink)


def _lower_bounds(
    model: Invertible, witnesses: _Witnesses, upper: Pair
) -> tuple[Pair, tuple[Witness | None, Witness | None]]:
    lower = witnesses.lower
    if not model.bijective:
        # directions that the forward map forgets say nothing about the inverse
        return Pair(lower.forward, 0.0), (witnesses.stretch, None)
    # Remark 3: the reciprocal of an upper bound of one direction is a lower bound of the other
    forward = max(lower.forward, _reciprocal(upper.inverse))
    inverse = max(lower.inverse, _reciprocal(upper.forward))
    # where both are equal, the measured one may be larger by its rounding
    forward, inverse = min(forward, upper.forward), min(inverse, upper.inverse)
    return Pair(forward, inverse), (witnesses.stretch, witnesses.shrink)


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
    return ""


def _method(factors: list[Factor]) -> str:
    longest = max(factors, key=lambda f: f.last - f.first)
    count, total = longest.last - longest.first, factors[-1].last
    if count == 1:
        return "product of layers"
    kind = "recursion"
    if longest.compared:
        kind = "comparison matrices"
    if count < total:
        return f"{kind} over runs of up to {count} of {total} layers"
    if longest.compared:
        return kind
    return "whole-network recursion"


def _text_of(box: Interval) -> str:
    if not box.bounded:
        return "unbounded box"
    return f"box within [{box.inf():.4g}, {box.sup():.4g}]^{box.lo.numel()}"

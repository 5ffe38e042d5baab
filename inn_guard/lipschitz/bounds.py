"""lipschitz_bounds: certified upper and witnessed lower bounds of a model's bi-Lipschitz constants, within a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.execution.deadline import Deadline
from inn_guard.lipschitz.branch_and_bound.search import branch_and_bound
from inn_guard.lipschitz.certificate import Certificate, weights_hash
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.whole_network import (
    Factor,
    LayerBound,
    product,
    stack,
    whole_forward,
    whole_inverse,
)
from inn_guard.lipschitz.witness import Witness, better, measure, search, starting_points
from inn_guard.numerics.intervals import Box, Interval

__all__ = ["LipschitzBounds", "lipschitz_bounds"]

Progress = Callable[[str, float], None]
BRANCHING = 4  #: dimensions up to which a box is branched


@dataclass(frozen=True)
class LipschitzBounds:
    """What is known about Lip(F) and Lip(F^-1).

    ``scope`` says where: on all of R^d, or on a box. On a box, ``inverse`` bounds sup ||J(x)^-1|| over x in the box.
    That is the Lipschitz constant of F^-1 on the image of the box only where that image is convex; otherwise it is one
    along images of straight paths.

    Attributes:
        forward: certified upper bound of sup ||J||.
        inverse: certified upper bound of sup ||J^-1||.
        lower_forward: witnessed lower bound of sup ||J||.
        lower_inverse: witnessed lower bound of sup ||J^-1||.
        method: what gave ``forward`` and ``inverse``.
        scope: "global", or the box.
        per_layer: every layer with its box, its bounds and Table 3's.
        printed: the product of what Table 3 prints, with norm products for subnetworks; NaN if time ran out.
        reason: why a bound is infinite; empty where both are finite.
        certificate: what proves the bounds; ``certificate.save(path)``.
        witnesses: (most stretched, most shrunk) points and directions, each None where there is none.
    """

    forward: float
    inverse: float
    lower_forward: float
    lower_inverse: float
    method: tuple[str, str]
    scope: str
    per_layer: tuple[LayerBound, ...]
    printed: Pair
    reason: str
    certificate: Certificate
    witnesses: tuple[Witness | None, Witness | None]

    def __str__(self) -> str:
        lines = [
            f"{self.lower_forward:.4g} <= Lip(F) <= {self.forward:.4g}  ({self.method[0]}, {self.scope})",
            f"{self.lower_inverse:.4g} <= Lip(F^-1) <= {self.inverse:.4g}  ({self.method[1]}, {self.scope})",
        ]
        return "\n".join([*lines, self.reason] if self.reason else lines)


def lipschitz_bounds(
    model: Invertible,
    domain: Box,
    *,
    data: Tensor | None = None,
    seconds: float = 60.0,
    effort: SearchBudget | None = None,
    progress: Progress | None = None,
) -> LipschitzBounds:
    """Certified upper and witnessed lower bounds of the Lipschitz constants of a model and of its inverse.

    Layer by layer; then, within the time, runs of layers as one chain, or as a product of comparison matrices; and in
    up to four dimensions, on a bounded box, branch and bound. The least bound is kept.

    Args:
        model: the map.
        domain: where: ``Box(lo, hi)`` of the shape of one sample, or ``Box.everywhere(shape)`` for global bounds.
        data: samples (B, *shape) to begin the search for witnesses with; random ones unless given.
        seconds: for everything together, by the clock on the wall: a time budget, so that a busy or slow machine proves
            less, never something wrong. What is foreseen to take longer than what is left is replaced by something
            cheaper, or left out; a single operation that takes longer than foreseen is not interrupted.
        effort: per chain; derived from ``seconds`` unless given.
        progress: called with a sentence and the share that is done.

    Returns:
        The bounds; infinite ones with the reason.

    Raises:
        ValueError: if ``seconds`` is negative or not a number, or the data are no samples of the domain's shape.

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann, Vicol, Wang, Grosse,
        Jacobsen, 2021), Table 3, Remark 3.
    """
    if not seconds >= 0:
        raise ValueError(f"expected a time of at least 0 seconds, got {seconds}")
    if data is not None and (len(data) == 0 or data.shape[1:] != domain.lo.shape):
        wanted = ", ".join(["B >= 1", *map(str, domain.lo.shape)])
        raise ValueError(
            f"expected data of the domain's shape, ({wanted}), got {tuple(data.shape)}"
        )
    from inn_guard.lipschitz.rules import load

    load()
    deadline, report = Deadline.after(seconds), progress or (lambda sentence, share: None)
    exact = model.to_dtype(torch.float64)
    layers = exact.layers() or (exact,)
    report("layer by layer", 0.0)
    effort_per_layer = effort or SearchBudget(
        steps=30, seconds=min(10.0, 0.4 * seconds / len(layers))
    )
    described = [(layer.name, _rule(model, layer)) for layer in layers]
    branching = domain.bounded and domain.lo.numel() <= BRANCHING and domain.lo.dim() == 1
    bounds = stack(
        described,
        domain,
        replace(effort_per_layer, deadline=deadline.fraction(0.2 if branching else 0.4)),
    )
    report("whole network", 0.2)
    whole = effort or SearchBudget(steps=400, seconds=(0.05 if branching else 0.3) * seconds)
    ahead = whole_forward(
        bounds, replace(whole, deadline=deadline.fraction(0.1 if branching else 0.4))
    )
    back = whole_inverse(
        bounds, replace(whole, deadline=deadline.fraction(0.1 if branching else 0.6))
    )
    certificate = Certificate(tuple(ahead), tuple(back), weights=weights_hash(model.state_dict()))
    best = Pair(product([f.bound for f in ahead]), product([f.bound for f in back]))
    method = (_method(ahead), _method(back))
    report("witnesses", 0.6)
    found = _Found(exact)
    found.searched(domain, data, deadline.fraction(0.2 if branching else 0.8))
    if branching:
        report("branch and bound", 0.7)
        try:
            branched = branch_and_bound(
                [m for _, m in described],
                domain,
                lower=found.lower,
                probe=found.at,
                deadline=deadline,
            )
            certificate = replace(certificate, leaves=branched.leaves)
            smaller = [new < old for new, old in zip(branched.pair, best, strict=True)]
            names = [
                "branch and bound" if less else name
                for less, name in zip(smaller, method, strict=True)
            ]
            method = (names[0], names[1])
            best = Pair(*map(min, branched.pair, best))
        except Unbounded:
            pass
    lower, witnesses = found.lower, (found.stretch, found.shrink)
    report("done", 1.0)
    if model.bijective:
        # Remark 3: every upper bound of one direction is a lower bound of the other
        lower = Pair(
            max(lower.forward, _over(best.inverse)), max(lower.inverse, _over(best.forward))
        )
    else:
        # what the forward map shrinks most are directions that it forgets: they say nothing of the inverse
        lower, witnesses = Pair(lower.forward, 0.0), (found.stretch, None)
    is_global = all(layer.bounds.is_global for layer in bounds) and "branch and bound" not in method
    printed = Pair(
        *(
            _printed([getattr(layer.printed, side) for layer in bounds])
            for side in ("forward", "inverse")
        )
    )
    reason = next(
        (
            f"layer {k} ({b.name}): {b.bounds.reason}"
            for k, b in enumerate(bounds)
            if b.bounds.reason
        ),
        "",
    )
    return LipschitzBounds(
        *best, *lower, method, "global" if is_global else f"on the {_described(domain)}", tuple(bounds), printed,
        reason if math.inf in best else "", certificate, witnesses,
    )  # fmt: skip


class _Found:
    """The best witnesses so far."""

    def __init__(self, model: Invertible) -> None:
        self.model = model
        self.stretch: Witness | None = None
        self.shrink: Witness | None = None

    @property
    def lower(self) -> Pair:
        """What they prove, forward and inverse."""
        return Pair(
            self.stretch.ratio if self.stretch else 0.0,
            1 / self.shrink.ratio if self.shrink else 0.0,
        )

    def searched(self, domain: Box, data: Tensor | None, deadline: Deadline) -> None:
        """From data, or random points, uphill."""
        self._keep(*_witnesses(self.model, domain, data, deadline))

    def at(self, points: Tensor) -> Pair:
        """The lower bounds after a look at some points."""
        with suppress(NotApplicable, RuntimeError, ValueError):
            self._keep(*measure(self.model, points))
        return self.lower

    def _keep(self, stretch: Witness | None, shrink: Witness | None) -> None:
        self.stretch = better(self.stretch, stretch, largest=True)
        self.shrink = better(self.shrink, shrink, largest=False)


def _printed(factors: list[float]) -> float:
    return math.nan if any(map(math.isnan, factors)) else product(factors)


def _over(bound: float) -> float:
    return math.nextafter(1 / bound, 0.0) if 0 < bound < math.inf else 0.0


def _method(factors: list[Factor]) -> str:
    longest = max(factors, key=lambda f: f.last - f.first)
    count, total = longest.last - longest.first, max(f.last for f in factors)
    if count == 1:
        return "product of layers"
    if count == total:
        return "comparison matrices" if longest.compared else "whole-network recursion"
    kind = "comparison matrices" if longest.compared else "recursion"
    return f"{kind} over runs of up to {count} of {total} layers"


def _witnesses(
    model: Invertible, domain: Box, data: Tensor | None, deadline: Deadline
) -> tuple[Witness | None, Witness | None]:
    generator = torch.Generator().manual_seed(0)
    points = (
        starting_points(domain, 256 if domain.lo.numel() <= 64 else 4, generator)
        if data is None
        else data
    )
    try:
        return search(model, points, domain, deadline=deadline, generator=generator)
    except (NotApplicable, RuntimeError, ValueError):
        return None, None


def _rule(model: Invertible, layer: Invertible) -> BoundedMap:
    """What is known of a layer; nothing where a call runs more than the classes of its modules say."""
    altered = _altered(model.block, *layer.block.modules())
    return NoRule(altered) if altered else bounded_map(layer.block, layer)


def _altered(*modules: nn.Module) -> str:
    """Which module has hooks or a forward of its own, '' if none; reparametrisations of torch.nn.utils are known."""
    for module in modules:
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        foreign = [hook for hook in hooks if not type(hook).__module__.startswith("torch.nn.utils")]
        if foreign or "forward" in vars(module):
            return f"{type(module).__name__} has hooks or a forward of its own, which may change what it computes"
    return ""


def _described(box: Interval) -> str:
    if not box.bounded:
        return "unbounded box"
    low, high = float(box.lo.min()), float(box.hi.max())
    return f"box within [{low:.4g}, {high:.4g}]^{box.lo.numel()}"

"""gradient_angle: does memory-saving backpropagation point where the true gradient points."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.base import AuditResult, Verdict
from inn_guard.audits.watched import polite
from inn_guard.invertible import Invertible, standard_normal_log_prob
from inn_guard.reversible import Surroundings, memory_saving
from inn_guard.tangent import NotApplicable

__all__ = ["MAX_ANGLE", "gradient_angle"]

#: Degrees at which one per cent of a small step's descent is lost, cos(8.1) = 0.99: minibatch noise costs far more.
MAX_ANGLE = math.degrees(math.acos(0.99))

#: |g - h| / |h| of a gradient that is as far off along its own direction.
MAX_DISTANCE = math.sin(math.radians(MAX_ANGLE))

Loss = Callable[..., Tensor]
Pair = tuple[Tensor, Tensor]


@polite
def gradient_angle(
    model: Invertible, x: Tensor, *, loss: Loss | None = None, batch_size: int = 64, seed: int = 0
) -> AuditResult:
    """Angle in degrees between the memory-saving gradient g and the true gradient h, over all parameters.

        angle = arccos( <g, h> / (|g| |h|) ),    distance = |g - h| / |h|

    g is what ``memory_saving(model)`` computes from z alone, h plain backpropagation; both at the same minibatches, with
    the same randomness. A step along -g decreases the loss by cos(angle) of what a step of that length along -h would:
    above MAX_ANGLE, or at a distance above its sine, training goes another way. What rounding alone explains is
    measured beside it: how far h itself moves when every entry of x moves by one rounding unit.

    Args:
        model: a chain of layers with parameters; those that require grad count, or all if none does.
        x: data, (B, *data), cut into minibatches.
        loss: (z) -> scalar or (z, log_det) -> scalar; unless given, the negative log-likelihood under a standard
            normal, or the mean square of z where there is no log-determinant.
        batch_size: samples per gradient.
        seed: of the rounding of x.

    Returns:
        mean and largest angle and distance, a row per minibatch, a row per layer with parameters.

    Raises:
        NotApplicable: if the model has no layers() or no parameters.

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann, Vicol, Wang, Grosse,
        Jacobsen, 2021), section 4 and figure 18.
    """
    parameters = _parameters(model)
    saving = memory_saving(model)
    measure = _measure(model, x) if loss is None else _scalar(loss)
    batches = torch.arange(len(x), device=x.device).split(batch_size)
    found: list[_Comparison] = []
    for rows in batches:
        surroundings = Surroundings(model, x)
        true = _gradients(model.select(rows), x[rows], measure, parameters)
        surroundings.changed()
        with surroundings.restored():
            found.append(_Comparison(_gradients(saving.select(rows), x[rows], measure, parameters), true))
    nudged = _nudged(x[batches[0]], torch.Generator().manual_seed(seed))
    moved = _gradients(model.select(batches[0]), nudged, measure, parameters)
    rounding = _Comparison(moved, found[0].true).distance()
    layers = _by_layer(model, parameters, found)
    verdict, reason = _judged(found, rounding)
    return AuditResult(
        "gradient_angle",
        verdict,
        reason,
        values={
            "mean_angle": _mean([one.angle() for one in found]),
            "max_angle": _worst([one.angle() for one in found]),
            "mean_distance": _mean([one.distance() for one in found]),
            "max_distance": _worst([one.distance() for one in found]),
            "rounding_distance": rounding,
        },
        units={"mean_angle": "degrees", "max_angle": "degrees"}
        | dict.fromkeys(("mean_distance", "max_distance", "rounding_distance"), "of |h|"),
        per_layer=layers,
        tables={
            "minibatch": tuple(one.row() | {"samples": len(rows)} for one, rows in zip(found, batches, strict=True))
        },
        settings={
            "loss": "default" if loss is None else getattr(loss, "__name__", type(loss).__name__),
            "batch_size": batch_size,
            "minibatches": len(batches),
            "max_angle_limit": MAX_ANGLE,
            "max_distance_limit": MAX_DISTANCE,
            "seed": seed,
        },
        advice=_ADVICE if verdict.failed else "",
    )


_ADVICE = (
    "Train with memory_saving(model, guard=1e-3), which notices and repairs wrong gradients, or with stored "
    "activations; keep the inverse stable with a regularizer (FiniteDifferences, NormalizingFlowLoss)."
)


@dataclass(frozen=True)
class _Comparison:
    """Gradients g and h, one pair of tensors per parameter."""

    saving: Sequence[Tensor]
    true: Sequence[Tensor]
    pairs: list[Pair] = field(init=False)

    def __post_init__(self) -> None:
        pairs = [(g.double().flatten(), h.double().flatten()) for g, h in zip(self.saving, self.true, strict=True)]
        object.__setattr__(self, "pairs", pairs)

    def of(self, chosen: Iterable[int]) -> _Comparison:
        """The same for some parameters only."""
        kept = list(chosen)
        return _Comparison([self.saving[k] for k in kept], [self.true[k] for k in kept])

    def norms(self) -> tuple[float, float]:
        """|g| and |h|."""
        return _norm(g for g, _ in self.pairs), _norm(h for _, h in self.pairs)

    def angle(self) -> float:
        """Degrees, by the lengths of the unit vectors' difference and sum: exact for small angles too."""
        a, b = self.norms()
        if a == 0 or b == 0:
            return 0.0 if a == b else 90.0
        apart = _norm(g / a - h / b for g, h in self.pairs)
        together = _norm(g / a + h / b for g, h in self.pairs)
        return math.degrees(2 * math.atan2(apart, together))

    def distance(self) -> float:
        """|g - h| / |h|."""
        difference, length = _norm(g - h for g, h in self.pairs), self.norms()[1]
        if length == 0:
            return 0.0 if difference == 0 else math.inf
        return difference / length

    def row(self) -> dict[str, Any]:
        """Angle, distance and lengths."""
        saving, true = self.norms()
        return {"angle": self.angle(), "distance": self.distance(), "memory_saving": saving, "true": true}


def _norm(vectors: Iterable[Tensor]) -> float:
    lengths = [torch.linalg.vector_norm(vector) for vector in vectors if vector.numel()]
    return float(torch.linalg.vector_norm(torch.stack(lengths))) if lengths else 0.0


def _parameters(model: Invertible) -> list[Tensor]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        trainable = [parameter.requires_grad_() for parameter in model.parameters() if parameter.is_floating_point()]
    if not trainable:
        raise NotApplicable("the model has no parameters, so that training has no gradient")
    return list(trainable)


def _gradients(
    model: Invertible, x: Tensor, measure: Callable[[Invertible, Tensor], Tensor], parameters: list[Tensor]
) -> list[Tensor]:
    found = torch.autograd.grad(measure(model, x), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _measure(model: Invertible, x: Tensor) -> Callable[[Invertible, Tensor], Tensor]:
    """The default loss that the model has."""
    try:
        with torch.no_grad():
            model.select(torch.arange(1, device=x.device)).forward_and_log_det(x[:1])
    except NotApplicable:
        return _scalar(_mean_square)
    return _scalar(_negative_log_likelihood)


def _mean_square(z: Tensor) -> Tensor:
    return z.square().mean()


def _negative_log_likelihood(z: Tensor, log_det: Tensor) -> Tensor:
    return -(standard_normal_log_prob(z) + log_det).mean()


def _scalar(loss: Loss) -> Callable[[Invertible, Tensor], Tensor]:
    """The loss as a function of model and x, by the number of arguments that it wants."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = [p for p in inspect.signature(loss).parameters.values() if p.kind in kinds and p.default is p.empty]
    if len(wanted) >= 2:
        return lambda model, x: loss(*model.forward_and_log_det(x))
    return lambda model, x: loss(model(x))


def _nudged(x: Tensor, generator: torch.Generator) -> Tensor:
    """x with every entry moved by one rounding unit, up or down."""
    sign = torch.randint(2, x.shape, generator=generator).to(x) * 2 - 1
    return x * (1 + torch.finfo(x.dtype).eps * sign)


def _by_layer(model: Invertible, parameters: list[Tensor], found: list[_Comparison]) -> tuple[dict[str, Any], ...]:
    """One row per layer with parameters: the largest angle and distance of all minibatches."""
    position = {id(parameter): k for k, parameter in enumerate(parameters)}
    rows = []
    for k, layer in enumerate(model.layers()):
        own = sorted({position[id(parameter)] for parameter in layer.parameters() if id(parameter) in position})
        if not own:
            continue
        parts = [one.of(own) for one in found]
        rows.append(
            {
                "layer": k,
                "name": layer.name,
                "angle": _worst([part.angle() for part in parts]),
                "distance": _worst([part.distance() for part in parts]),
                "parameters": sum(parameters[j].numel() for j in own),
            }
        )
    return tuple(rows)


def _judged(found: list[_Comparison], rounding: float) -> tuple[Verdict, str]:
    true, saving = (all(math.isfinite(one.norms()[k]) for one in found) for k in (1, 0))
    angle, distance = (_worst([measure(one) for one in found]) for measure in (_Comparison.angle, _Comparison.distance))
    if not true:
        return Verdict.NON_FINITE, "the true gradient itself is not finite"
    if not saving:
        count = sum(not math.isfinite(one.norms()[0]) for one in found)
        return Verdict.NON_FINITE, f"the memory-saving gradient is not finite in {count} of {len(found)} minibatches"
    figures = f"{angle:.3g} degrees from the true one, {distance:.2g} of its length away, in the worst of {len(found)}"
    explained = f"one rounding of x moves the true gradient by {rounding:.2g}"
    if angle > MAX_ANGLE or distance > MAX_DISTANCE:
        return Verdict.UNSTABLE, f"memory-saving gradients point elsewhere: {figures} minibatches; {explained}"
    return Verdict.STABLE, f"memory-saving gradients are right: {figures} minibatches; {explained}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _worst(values: list[float]) -> float:
    """The largest; NaN if one of them is."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)

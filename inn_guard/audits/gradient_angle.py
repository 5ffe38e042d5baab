"""gradient_angle: does memory-saving backpropagation point where the true gradient points."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.audited_model import polite, shares_of, shares_samples
from inn_guard.core.invertible import Invertible, standard_normal_log_prob
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.execution.memory import linearized_footprint
from inn_guard.memory_saving import RandomAndBufferState, memory_saving
from inn_guard.report.result import AuditResult, Verdict

__all__ = ["GradientComparison", "Pair"]

Pair = tuple[Tensor, Tensor]  #: one parameter's part of g and of h


@dataclass(frozen=True)
class GradientComparison:
    """Two gradients g and h of the same parameters, in lengths.

    Attributes:
        g: |g|.
        h: |h|.
        apart: | g/|g| - h/|h| |.
        together: | g/|g| + h/|h| |.
        difference: |g - h|.
    """

    g: float
    h: float
    apart: float
    together: float
    difference: float

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> GradientComparison:
        """Of gradients given as a pair of tensors per parameter."""
        a, b = (_norm(pair[k] for pair in pairs) for k in (0, 1))
        apart = _norm(g.double() / a - h.double() / b for g, h in pairs)
        together = _norm(g.double() / a + h.double() / b for g, h in pairs)
        return cls(a, b, apart, together, _norm(g.double() - h.double() for g, h in pairs))

    def row(self) -> dict[str, float]:
        """Angle in degrees, by the unit vectors' difference and sum, which small angles survive; distance; lengths."""
        if self.g == 0 or self.h == 0:
            angle = 0.0 if self.g == self.h else 90.0
            distance = 0.0 if self.g == self.h else (1.0 if self.h else math.inf)
        else:
            angle, distance = (
                math.degrees(2 * math.atan2(self.apart, self.together)),
                self.difference / self.h,
            )
        return {
            "angle": angle,
            "distance": distance,
            "memory_saving_norm": self.g,
            "true_norm": self.h,
        }


def _norm(vectors: Iterable[Tensor]) -> float:
    lengths = [
        torch.linalg.vector_norm(vector, dtype=torch.float64)
        for vector in vectors
        if vector.numel()
    ]
    return float(torch.linalg.vector_norm(torch.stack(lengths))) if lengths else 0.0


__all__ = ["MAX_ANGLE", "gradient_angle"]

#: Degrees at which one per cent of a small step's descent is lost, cos(8.1) = 0.99: minibatch noise costs far more.
MAX_ANGLE = math.degrees(math.acos(0.99))

#: |g - h| / |h| of a gradient that is as far off along its own direction.
MAX_DISTANCE = math.sin(math.radians(MAX_ANGLE))

Loss = Callable[..., Tensor]
Measured = Callable[[Invertible, Tensor], Tensor]


@polite
@shares_samples
def gradient_angle(
    model: Invertible, x: Tensor, *, loss: Loss | None = None, batch_size: int = 64, seed: int = 0
) -> AuditResult:
    """Angle in degrees between the memory-saving gradient g and the true gradient h, over all parameters.

        angle = arccos( <g, h> / (|g| |h|) ),    distance = |g - h| / |h|

    g is what ``memory_saving(model)`` computes from z, h plain backpropagation; both at the same minibatches, with the
    same randomness. A step along -g decreases the loss by cos(angle) of what a step of that length along -h would:
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
        ValueError: if ``loss`` returns anything but one differentiable number.

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann, Vicol, Wang, Grosse,
        Jacobsen, 2021), section 4 and figure 18.
    """
    parameters = _parameters(model)
    measure = _default_loss(model, x) if loss is None else _scalar(loss)
    groups = _groups(model, parameters)
    batch_size = int(
        min(
            batch_size,
            shares_of(model).max_batch(lambda within: linearized_footprint(model, x, within=within)),
        )
    )
    batches = torch.arange(len(x), device=x.device).split(batch_size)
    saving = memory_saving(model)

    def compare(rows: Tensor) -> tuple[GradientComparison, list[GradientComparison]]:
        pairs = _pairs(
            (saving.select(rows), x[rows]), (model.select(rows), x[rows]), measure, parameters
        )
        parts = [GradientComparison.of([pairs[k] for k in group.members]) for group in groups]
        return GradientComparison.of(pairs), parts

    compared = shares_of(model).map_items(batches, compare)
    minibatches = tuple(whole.row() for whole, _ in compared)
    rounding = _rounding(model.select(batches[0]), x[batches[0]], measure, parameters, seed)
    verdict, reason = _judged(minibatches, rounding)
    return AuditResult(
        "gradient_angle",
        verdict,
        reason,
        values={
            **{
                f"mean_{name}": _mean([row[name] for row in minibatches])
                for name in ("angle", "distance")
            },
            **{
                f"max_{name}": _worst([row[name] for row in minibatches])
                for name in ("angle", "distance")
            },
            "rounding_distance": rounding,
        },
        units={"mean_angle": "degrees", "max_angle": "degrees", "angle": "degrees"}
        | dict.fromkeys(
            ("mean_distance", "max_distance", "rounding_distance", "distance"), "of |h|"
        ),
        per_layer=tuple(
            group.row()
            | {
                name: _worst([parts[k].row()[name] for _, parts in compared])
                for name in ("angle", "distance")
            }
            for k, group in enumerate(groups)
        ),
        tables={"minibatch": minibatches},
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
class _Group:
    """The parameters of one layer, by their numbers."""

    index: int
    layer: str
    members: list[int]
    parameters: int

    def row(self) -> dict[str, Any]:
        """Which layer this is, and how many parameters it has."""
        return {"index": self.index, "layer": self.layer, "parameters": self.parameters}


def _rounding(
    model: Invertible, x: Tensor, measure: Measured, parameters: list[Tensor], seed: int
) -> float:
    """|h(x') - h(x)| / |h(x)| with every entry of x moved by one rounding unit, up or down."""
    sign = (
        torch.randint(2, x.shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(x)
        * 2
        - 1
    )
    moved = x * (1 + torch.finfo(x.dtype).eps * sign)
    return GradientComparison.of(_pairs((model, moved), (model, x), measure, parameters)).row()[
        "distance"
    ]


def _pairs(
    first: tuple[Invertible, Tensor],
    second: tuple[Invertible, Tensor],
    measure: Measured,
    parameters: list[Tensor],
) -> list[Pair]:
    """Gradients at two models and batches, with the same random numbers, parameter by parameter."""
    surroundings = RandomAndBufferState(*first)
    g = _gradients(measure(*first), parameters)
    surroundings.changed()
    with surroundings.restored():
        h = _gradients(measure(*second), parameters)
    return list(zip(g, h, strict=True))


def _gradients(loss: Any, parameters: list[Tensor]) -> list[Tensor]:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"expected loss to return one differentiable number, got {got}: add .mean(), do not detach"
        )
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _parameters(model: Invertible) -> list[Tensor]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        trainable = [
            parameter.requires_grad_()
            for parameter in model.parameters()
            if parameter.is_floating_point()
        ]
    if not trainable:
        raise NotApplicable("the model has no parameters, so that training has no gradient")
    return list(trainable)


def _default_loss(model: Invertible, x: Tensor) -> Measured:
    """The likelihood where there is a log-determinant, else the mean square."""
    try:
        with torch.no_grad():
            model.select(torch.arange(1, device=x.device)).forward_and_log_det(x[:1])
    except NotApplicable:
        return _differentiable(_scalar(_mean_square))
    return _differentiable(_scalar(_negative_log_likelihood))


def _differentiable(measure: Measured) -> Measured:
    """The same, not applicable to models through whose output no gradient reaches anything."""

    def measured(model: Invertible, x: Tensor) -> Any:
        value = measure(model, x)
        if not value.requires_grad:
            raise NotApplicable("no gradient reaches the model's parameters from its output")
        return value

    return measured


def _mean_square(z: Tensor) -> Tensor:
    return z.square().mean()


def _negative_log_likelihood(z: Tensor, log_det: Tensor) -> Tensor:
    return -(standard_normal_log_prob(z) + log_det).mean()


def _scalar(loss: Loss) -> Measured:
    """The loss as a function of model and x, by the number of arguments that it wants."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = [
        p
        for p in inspect.signature(loss).parameters.values()
        if p.kind in kinds and p.default is p.empty
    ]
    if len(wanted) >= 2:
        return lambda model, x: loss(*model.forward_and_log_det(x))
    return lambda model, x: loss(model(x))


def _groups(model: Invertible, parameters: list[Tensor]) -> list[_Group]:
    position = {id(parameter): k for k, parameter in enumerate(parameters)}
    groups = []
    for index, layer in enumerate(model.layers()):
        members = [
            position[id(parameter)] for parameter in layer.parameters() if id(parameter) in position
        ]
        if members:
            groups.append(
                _Group(index, layer.name, members, sum(parameters[k].numel() for k in members))
            )
    return groups


def _judged(minibatches: Sequence[Mapping[str, float]], rounding: float) -> tuple[Verdict, str]:
    count = len(minibatches)
    if not all(math.isfinite(row["true_norm"]) for row in minibatches):
        return Verdict.NON_FINITE, "the true gradient itself is not finite"
    broken = sum(not math.isfinite(row["memory_saving_norm"]) for row in minibatches)
    if broken:
        return (
            Verdict.NON_FINITE,
            f"the memory-saving gradient is not finite in {broken} of {count} minibatches",
        )
    angle, distance = (_worst([row[name] for row in minibatches]) for name in ("angle", "distance"))
    figures = f"{angle:.3g} degrees and {distance:.2g} of its length off the true one in the worst of {count} minibatches"
    explained = f"one rounding of x moves the true gradient by {rounding:.2g} of its length"
    if angle > MAX_ANGLE or distance > MAX_DISTANCE:
        return Verdict.UNSTABLE, f"the memory-saving gradient is {figures}; {explained}"
    return Verdict.STABLE, f"the memory-saving gradient is {figures}; {explained}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _worst(values: list[float]) -> float:
    """The largest; NaN if one of them is."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)

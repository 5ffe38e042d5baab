"""gradient_angle: does memory-saving backpropagation point where the true gradient points."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.audited_model import AuditedModel, ModelError
from inn_guard.audits.context import AuditContext
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.level import Level
from inn_guard.audits.spec import audit_check
from inn_guard.core.invertible import Invertible, standard_normal_log_prob
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.execution.state import StateSnapshot
from inn_guard.memory_saving import (
    INPUT,
    OUTPUT,
    RandomAndBufferState,
    saving_compared_chain,
)
from inn_guard.report.formatting import brief
from inn_guard.report.limits import Limits
from inn_guard.report.result import AuditResult
from inn_guard.report.uses import Finding
from inn_guard.report.verdict import Verdict

__all__ = ["GradientComparison", "gradient_angle"]

Pair = tuple[Tensor, Tensor]  #: one parameter's part of g and of h
JOINED = 2**20  #: entries of small parameters that are handled as one vector


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
        parts = _parts(pairs)
        vectors = [_vectors(part) for part in parts] if len(parts) == 1 else map(_vectors, parts)
        lengths = [(_norm(g), _norm(h), _norm(g - h)) for g, h in vectors]
        a, b, difference = (_length(column) for column in zip(*lengths, strict=True))
        if len(parts) > 1:
            vectors = map(_vectors, parts)  # again, so that one is held at a time
        sums = [(_norm(g / a - h / b), _norm(g / a + h / b)) for g, h in vectors]
        apart, together = (_length(column) for column in zip(*sums, strict=True))
        return cls(a, b, apart, together, difference)

    def row(self) -> dict[str, float]:
        """Angle in degrees, distance and lengths.

        The angle is that of the unit vectors' difference and sum, which small angles survive.
        """
        if self.g == self.h == 0:
            angle, distance, length = 0.0, 0.0, 0.0
        elif self.h == 0:
            angle, distance, length = 90.0, math.inf, math.inf
        elif self.g == 0:
            angle, distance, length = 90.0, 1.0, 1.0
        else:
            angle = math.degrees(2 * math.atan2(self.apart, self.together))
            distance = self.difference / self.h
            length = abs(self.g - self.h) / self.h
        return {
            "angle": angle,
            "distance": distance,
            "length_error": length,
            "memory_saving_norm": self.g,
            "true_norm": self.h,
        }


def _parts(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """The same gradients, many small parameters in one part."""
    parts: list[list[Pair]] = [[]]
    entries = 0
    for g, h in pairs:
        entries += g.numel()
        last = parts[-1]
        if last and (entries > JOINED or g.device != last[0][0].device):
            parts.append([])
            entries = g.numel()
        parts[-1].append((g, h))
    return parts


def _vectors(pairs: Sequence[Pair]) -> Pair:
    """Both gradients of a part as one vector each, in float64."""
    if not pairs:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    g = torch.cat([g.reshape(-1) for g, _ in pairs])
    h = torch.cat([h.reshape(-1) for _, h in pairs])
    return g.double(), h.double()


def _norm(vector: Tensor) -> float:
    return torch.linalg.vector_norm(vector).item()


def _length(parts: Sequence[float]) -> float:
    """Of a vector, from the lengths of its parts; NaN if one of them is."""
    return _norm(torch.tensor(parts, dtype=torch.float64))


Loss = Callable[..., Tensor]
Measured = Callable[[Invertible, Tensor], Tensor]
At = tuple[Invertible, Tensor]  #: a model and the batch at which its gradient is taken


def _cost(task: Task) -> Cost:
    batch = min(task.samples, int(task.settings["batch_size"]))
    one = Passes(linearize=1, product=2)
    both = one * 2 + Passes(forward=1, inverse=1)
    return Cost(both * task.samples + one * (2 * batch), batch, linearized=True)


@audit_check(
    question="Is the memory-saving gradient the true one?",
    uses=("gradients",),
    level=Level.QUICK,
    cost=_cost,
    shares_samples=True,
)
def gradient_angle(
    context: AuditContext, *, batch_size: int = 64, keep: str = INPUT
) -> AuditResult:
    """Angle in degrees between memory-saving gradient g and true gradient h, over all parameters.

        angle = arccos( <g, h> / (|g| |h|) ),    length = | |g| - |h| | / |h|

    g is what ``memory_saving(model, keep=keep)`` computes; h is plain backpropagation. Both are at
    the same minibatches, with the same randomness. With "input", the default of ``memory_saving``,
    x and z are kept and the inputs of all layers but the first one are rebuilt. With "output" z
    alone is kept, as in the paper's code: these gradients also hold the error of the rebuilt x, and
    can be further off. The angle that the other choice has in the first minibatch is reported, too.

    The loss is ``context.loss``, which takes (z) or (z, log_det) and returns one number. By default
    it is the negative log-likelihood under a standard normal. It is the mean square of z where
    there is no log-determinant, or where those of the layers do not add up to the model's own,
    which is no fault of memory saving. Angles come from the difference of the unit vectors, which
    small angles survive.

    The verdict holds the worst minibatch against ``limits.gradient_angle`` and
    ``limits.gradient_length``; samples with NaN or Inf are left out. Where rounding x moves the
    true gradient by as much as the two gradients differ, the true gradient is not determined at
    this precision, and the verdict is undecided.

    Args:
        context: a chain of layers with parameters, and data; the parameters that require grad
            count, or all if none does.
        batch_size: samples per gradient.
        keep: what is kept between the passes, "input" or "output"; it decides.

    Returns:
        mean and largest angle, length and distance |g - h| / |h|, other_angle (of the other
        choice), a row per minibatch, a row per layer with parameters.

    Raises:
        NotApplicable: if the model has no layers() or no parameters.
        ValueError: if the loss returns anything but one differentiable number, or ``keep`` is
            neither "input" nor "output".

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), section 4 and figure 18.
    """
    model, x, loss = context.model, context.x, context.loss
    parameters = _parameters(model)
    measure = _default_loss(model, x) if loss is None else _scalar(loss)
    groups = _groups(model, parameters)
    at_once = int(min(batch_size, context.max_linearized(0)))
    usable = context.finite_rows()
    if not len(usable):
        reason = "every sample of x contains NaN or Inf already: the true gradient is not finite"
        return gradient_angle.without_answer(Verdict.NON_FINITE, reason, advice=CLEAN)
    batches = usable.split(at_once)
    saving = saving_compared_chain(model, model.composition, keep=keep)

    stored = _Stored(measure, parameters)

    first = (model.select(batches[0]), x[batches[0]])

    def compare(rows: Tensor) -> tuple[GradientComparison, list[GradientComparison]]:
        at = first if rows is batches[0] else (model.select(rows), x[rows])
        pairs = stored.pairs((saving.select(rows), at[1]), at)
        parts = [GradientComparison.of([pairs[k] for k in group.members]) for group in groups]
        return GradientComparison.of(pairs), parts

    # the first minibatch last: its true gradient is needed again
    last_first = context.parallel.map_items(batches[::-1], compare)
    compared = last_first[::-1]
    minibatches = tuple(whole.row() for whole, _ in compared)
    rounding = _rounding(stored, first, context.seed)
    others = saving_compared_chain(
        model, model.composition, keep=OUTPUT if keep == INPUT else INPUT
    )
    other = _other_choice(stored, (others.select(batches[0]), first[1]), first)
    finding = _finding(minibatches, rounding, context.limits)
    finding = dataclasses.replace(finding, reason=finding.reason + _remarks(context, other, keep))
    finding = dataclasses.replace(finding, samples=len(usable), of=len(x))
    return AuditResult(
        "gradient_angle",
        finding.verdict,
        finding.reason,
        uses={"gradients": finding},
        headline=("max_angle", "max_length_error"),
        values=_values(minibatches, rounding) | other,
        units={
            "mean_angle": "degrees",
            "max_angle": "degrees",
            "other_angle": "degrees",
            "angle": "degrees",
            **dict.fromkeys(_OF_LENGTH, "of |h|"),
        },
        per_layer=_layer_rows(groups, [parts for _, parts in compared]),
        tables={"minibatch": minibatches},
        settings={
            "loss": "default" if loss is None else getattr(loss, "__name__", type(loss).__name__),
            "keep": keep,
            "batch_size": at_once,
            "minibatches": len(batches),
            "angle_limit": context.limits.gradient_angle,
            "length_limit": context.limits.gradient_length,
            "seed": context.seed,
        },
        advice=_ADVICE if finding.verdict.failed else "",
    )


_OF_LENGTH = (
    "mean_distance",
    "max_distance",
    "max_length_error",
    "rounding_distance",
    "distance",
    "length_error",
)


def _values(minibatches: Sequence[Mapping[str, float]], rounding: float) -> dict[str, float]:
    angles = _column(minibatches, "angle")
    distances = _column(minibatches, "distance")
    return {
        "mean_angle": _mean(angles),
        "max_angle": _worst(angles),
        "mean_distance": _mean(distances),
        "max_distance": _worst(distances),
        "max_length_error": _worst(_column(minibatches, "length_error")),
        "rounding_distance": rounding,
    }


def _other_choice(
    stored: _Stored, other: At, first: tuple[AuditedModel, Tensor]
) -> dict[str, float]:
    """The angle of the choice that does not decide, in one minibatch; nothing where it raises."""
    model, _ = first
    # the last that the check does with the model, which may be in its first mode afterwards
    state = model.state or StateSnapshot(model)
    with state.preserved(), contextlib.suppress(NotApplicable, ModelError):
        pairs = stored.pairs(other, first)
        return {"other_angle": GradientComparison.of(pairs).row()["angle"]}
    return {}


def _remarks(context: AuditContext, other: Mapping[str, float], keep: str) -> str:
    """What is said besides the figure that decides."""
    text = ""
    angle = other.get("other_angle", 0.0)
    if not context.limits.verdict(angle, context.limits.gradient_angle).passed:
        kept = "z alone" if keep == INPUT else "x and z"
        off = f"off by {brief(angle)} degrees" if math.isfinite(angle) else "not finite"
        text += f"; with {kept} kept it is {off}"
    if context.loss is None and context.model.composition.log_det:
        text += f"; of z alone, since {context.model.composition.log_det}"
    return text


def _layer_rows(
    groups: Sequence[_Group], compared: Sequence[list[GradientComparison]]
) -> tuple[Mapping[str, Any], ...]:
    """One row for each layer with parameters: the worst of all minibatches."""
    rows = []
    for k, group in enumerate(groups):
        parts = [minibatch[k].row() for minibatch in compared]
        angle = _worst(_column(parts, "angle"))
        distance = _worst(_column(parts, "distance"))
        rows.append({**group.row(), "angle": angle, "distance": distance})
    return tuple(rows)


CLEAN = "Remove NaN and Inf from the data, then audit again."
_ADVICE = (
    "Train with memory_saving(model, guard=1e-3), which notices and repairs wrong gradients, or "
    "with stored activations; keep the inverse stable with a regularizer (FiniteDifferences, "
    "NormalizingFlowLoss)."
)


@dataclass(frozen=True)
class _Group:
    """The parameters of one layer, by their numbers."""

    index: int
    name: str
    members: list[int]
    parameters: int

    def row(self) -> dict[str, Any]:
        """Which layer this is, and how many parameters it has."""
        return {"index": self.index, "name": self.name, "parameters": self.parameters}


class _Stored:
    """Gradients with stored activations, beside which others are held.

    The last one is kept for the next comparison at the very same tensor, unless random numbers were
    drawn or buffers written: then every comparison needs one of its own.

    Args:
        measure: the loss of a model at a batch.
        parameters: to which the gradients belong.
    """

    def __init__(self, measure: Measured, parameters: list[Tensor]) -> None:
        self.measure, self.parameters = measure, parameters
        self._known: tuple[Tensor, list[Tensor]] | None = None

    def pairs(self, other: At, stored: At) -> list[Pair]:
        """Gradients of both, with the same random numbers, parameter by parameter.

        Args:
            other: a model and a batch.
            stored: the model with stored activations, and a batch.
        """
        surroundings = RandomAndBufferState(*other)
        g = self._gradient(other)
        is_repeatable = not surroundings.changed()
        _, x = stored
        if not is_repeatable or self._known is None or self._known[0] is not x:
            self._known = None  # frees the last one
            with surroundings.restored():
                self._known = x, self._gradient(stored)
        _, h = self._known
        if not is_repeatable:
            self._known = None
        return list(zip(g, h, strict=True))

    def _gradient(self, at: At) -> list[Tensor]:
        return _gradients(self.measure(*at), self.parameters)


def _rounding(stored: _Stored, at: At, seed: int) -> float:
    """|h(x') - h(x)| / |h(x)| with every entry of x moved by one rounding unit, up or down."""
    model, x = at
    generator = torch.Generator().manual_seed(seed)
    sign = 2 * torch.randint(2, x.shape, generator=generator, device="cpu").to(x) - 1
    moved = x * (1 + torch.finfo(x.dtype).eps * sign)
    return GradientComparison.of(stored.pairs((model, moved), at)).row()["distance"]


def _gradients(loss: Any, parameters: list[Tensor]) -> list[Tensor]:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"expected loss to return one differentiable number, got {got}: add .mean(), do not "
            "detach"
        )
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _parameters(model: Invertible) -> list[Tensor]:
    floating: list[Tensor] = [
        parameter for parameter in model.parameters() if parameter.is_floating_point()
    ]
    trainable = [parameter for parameter in floating if parameter.requires_grad]
    if not trainable:
        trainable = [parameter.requires_grad_() for parameter in floating]
    if not trainable:
        raise NotApplicable("the model has no parameters, so that training has no gradient")
    return trainable


def _default_loss(model: Invertible, x: Tensor) -> Measured:
    """The likelihood where there is a log-determinant, else the mean square."""
    if isinstance(model, AuditedModel) and model.composition.log_det:
        # memory saving adds up the layers' own: the difference would look like its error
        return _differentiable(_scalar(_mean_square))
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
    wanted = 0
    for parameter in inspect.signature(loss).parameters.values():
        wanted += parameter.kind in kinds and parameter.default is parameter.empty
    if wanted >= 2:
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


def _finding(
    minibatches: Sequence[Mapping[str, float]], rounding: float, limits: Limits
) -> Finding:
    count = len(minibatches)
    angle = _worst(_column(minibatches, "angle"))
    length = _worst(_column(minibatches, "length_error"))
    distance = _worst(_column(minibatches, "distance"))
    # whichever is further beyond, or nearer to, its limit is the figure that decides
    figure, limit, unit = angle, limits.gradient_angle, "degrees"
    if length / limits.gradient_length > angle / limits.gradient_angle:
        figure, limit, unit = length, limits.gradient_length, "of |h|"
    broken = count - _finite(_column(minibatches, "memory_saving_norm"))
    if _finite(_column(minibatches, "true_norm")) < count:
        reason = "the true gradient itself is not finite"
        verdict, figure = Verdict.NON_FINITE, math.inf
    elif broken:
        reason = f"the memory-saving gradient is not finite in {broken} of {count} minibatches"
        verdict, figure = Verdict.NON_FINITE, math.inf
    else:
        by_angle = limits.verdict(angle, limits.gradient_angle)
        verdict = Verdict.worst([by_angle, limits.verdict(length, limits.gradient_length)])
        reason = (
            f"memory-saving gradient off by {brief(angle)} degrees "
            f"(limit {limits.gradient_angle:g}), "
            f"its length by {brief(length)} (limit {limits.gradient_length:g})"
        )
        if count > 1:
            reason += f", in the worst of {count} minibatches"
        if verdict.failed and rounding >= distance:
            verdict = Verdict.UNDECIDED
            reason += (
                f"; rounding x moves the true gradient by {brief(rounding)} of its length, "
                "so that it is not determined at this precision"
            )
    return Finding(verdict, figure, limit, unit, reason, 0, 0)


def _column(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]


def _finite(values: list[float]) -> int:
    """How many of them are neither NaN nor infinite."""
    return sum(map(math.isfinite, values))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _worst(values: list[float]) -> float:
    """The largest; NaN if one of them is."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)

"""log_det: is the log-determinant that of the Jacobian, and does the inverse's cancel it."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.audited_model import AuditedModel, ModelError
from inn_guard.audits.context import AuditContext, same_up_to_rounding
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.level import Level
from inn_guard.audits.round_trip import round_trip
from inn_guard.audits.spec import audit_check
from inn_guard.audits.thresholds import worst
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import Missing, NotApplicable
from inn_guard.core.tensors import dtype_name, finite_rows
from inn_guard.execution.state import preserve_state
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.log_det import LayerLogDet, layer_log_det, stochastic_log_det
from inn_guard.report.formatting import brief
from inn_guard.report.result import AuditResult, to_full_batch
from inn_guard.report.uses import Finding
from inn_guard.report.verdict import Verdict

__all__ = ["log_det"]

ENTRIES = 4096  #: samples x dimensions that are compared in small dimensions
LEAST, USUAL, MOST = 8, 64, 256  #: samples that are compared
#: Of the dense matrices of all samples of a layer without structure; it allows for 64 samples up to
#: 256 dimensions.
DENSE_ENTRIES = 2**22
#: Up to this dimension a layer without structure is decomposed. Quadrature takes 512 products.
DENSE = {Level.QUICK: 1024, Level.STANDARD: 1024, Level.FULL: 4096}
SIGMAS = 4.0  #: standard errors that a stochastic reference may be off
#: Probability that any of the samples of a right, but random log-determinant is called wrong.
FALSE_ALARM = 1e-4
PROBES, QUADRATURE_STEPS = 8, 32  #: of the stochastic reference
DRAWS = 16  #: of a model whose log-determinant is itself random
DERIVE = "Derive the log-determinant again; training by likelihood follows this number."
SMALLER_STEPS = (
    "The log-determinant is that of the exact flow; that of the solver's steps differs. Integrate "
    "in smaller steps where log p(x) is evaluated."
)
EXACT_TRACE = (
    "The log-determinant is an estimate by random vectors. Where log p(x) is evaluated, compute "
    "the exact trace: trace=inn_guard.layers.ode.ExactTrace()"
)
FOLDS = "Keep the derivative of the map from changing sign; where it does, there is no inverse."


def _samples(dimension: int) -> int:
    """How many samples are compared by default."""
    return max(USUAL, min(MOST, ENTRIES // dimension))


def _cost(task: Task) -> Cost:
    chosen = min(task.samples, int(task.settings["samples"] or _samples(task.dimension)))
    own = Passes(forward=3, inverse=1)
    # layers without structure take a product for each row, but of fewer samples
    reference = Passes(forward=2, product=min(task.dimension, USUAL))
    passes = Passes(forward=1) * task.samples + (own + reference) * chosen
    return Cost(passes, chosen, linearized=True, vectors=2 * QUADRATURE_STEPS)


@audit_check(
    question="Is the log-determinant that of the Jacobian?",
    uses=("density",),
    level=Level.QUICK,
    cost=_cost,
)
def log_det(context: AuditContext, *, samples: int | None = None) -> AuditResult:
    """Error of the formula of log|det J|, in nats, per sample.

        error_b = | log_det(x_b) - log|det dF/dx(x_b)| |

    The reference is exact, layer by layer, by autograd in a float64 copy where there is one: the
    structure of each layer's Jacobian is measured, which makes couplings, elementwise maps and 1x1
    convolutions cheap in thousands of dimensions; layers without structure are decomposed up to
    1,024 dimensions (4,096 at level full). Layer by layer matters: one Jacobian of a whole chain
    loses digits with its condition. The model's side is the copy's, too, so that this is the
    formula's error; what float32 adds is asked by ``density``. For larger layers without structure
    the reference is stochastic Lanczos quadrature between two bounds: an error is only called one
    if it exceeds the limit beyond bounds and four standard errors, and where these are wider than
    the limit the answer is undecided.

    A log-determinant that is random itself (Hutchinson's estimator) is the mean of 16 draws, and
    judged by their spread: its error is only called one if it exceeds the limit beyond a quantile
    of Student's t, by which a right estimator is called wrong once in 10,000 audits.

    A map whose det J changes sign between samples folds: it has no inverse there, and log|det J| is
    no density. It is unstable unless these samples come back. A map without a derivative by
    autograd, as where it runs under no_grad, has no reference: the answer is undecided.

    The inverse's own log-determinant ought to be the negative at the same point. It matters for the
    density of draws, not for that of data: it is reported, and decides nothing here.

    Args:
        context: a bijective model, and data.
        samples: how many of the samples with finite latents are compared, the first ones. Default:
            64, up to 256 in small dimensions; fewer where a layer is large and has no structure.
            All samples are looked at for NaN and Inf.

    Returns:
        max_error, forward_plus_inverse; per sample log_det, reference and error; per layer its
        error.

    Raises:
        NotApplicable: if the model has no log-determinant, or is injective only.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"expected at least 1 sample; got {samples}")
    usable = context.usable_rows()
    if not len(usable):
        reason = "no sample has a finite latent: there is no log-determinant to compare"
        return log_det.without_answer(Verdict.NON_FINITE, reason)
    lost = _not_finite(context, usable)
    if isinstance(lost, tuple):
        return log_det.without_answer(Verdict.UNSTABLE, _wrong_shape(lost), advice=DERIVE)
    not_square = _not_square(context, usable)
    if not_square and not context.model.bijective:
        raise NotApplicable(not_square)
    if not_square:
        # a density that it claims to have cannot be that of x
        return log_det.without_answer(Verdict.UNDECIDED, not_square)
    if _is_random(context, usable):
        reason = "the map is random: its log-determinant and its Jacobian are of different draws"
        return log_det.without_answer(Verdict.UNDECIDED, reason)
    try:
        compared = _compare(context, usable, samples)
    except NotApplicable as no_derivative:
        # there is a formula, and nothing that it could be held against
        reason = f"the formula of the log-determinant could not be checked: {no_derivative}"
        return log_det.without_answer(Verdict.UNDECIDED, reason)
    finding = _finding(context, compared, lost=int(lost.sum()), of=len(usable))
    advice = ""
    if finding.verdict.failed:
        advice = FOLDS if compared.folded else _advice(context)
    values = _values(compared)
    return AuditResult(
        "log_det",
        finding.verdict,
        finding.reason,
        uses={"density": finding},
        headline=("max_error",),
        values=values,
        units={**dict.fromkeys(values, "nats"), "error": "nats"},
        **to_full_batch(_by_sample(compared), compared.rows, len(context.x)),
        per_layer=compared.reference.layer_rows(),
        settings={
            "samples": len(compared.rows),
            "of": len(context.x),
            "reference": compared.reference.label,
            "draws": compared.own.draws,
            "inverse": "measured"
            if isinstance(compared.cancelled, Tensor)
            else str(compared.cancelled),
            "limit": context.limits.density,
            "seed": context.seed,
        },
        advice=advice,
    )


@dataclass(frozen=True)
class _Own:
    """The model's log-determinant, (B,) float64 on the CPU."""

    value: Tensor
    standard_error: Tensor
    draws: int


@dataclass(frozen=True)
class _Layer:
    """One layer's determinant and what the layer says of it, (B,) float64 on the CPU.

    Attributes:
        index: its number.
        name: of it.
        value: log|det J|.
        unknown: how far off ``value`` may be, for want of an exact method.
        sign: of det J, up to one that all samples share; NaN where it is not known.
        own: the layer's own log-determinant, if it has one.
        dense: the size of the dense matrices that were decomposed.
    """

    index: int
    name: str
    value: Tensor
    unknown: Tensor
    sign: Tensor
    own: Tensor | Missing
    dense: int

    @property
    def place(self) -> str:
        return f"layer {self.index} ({self.name})"

    @property
    def error(self) -> float:
        """The largest one beyond what is unknown; NaN where the layer has no log-determinant."""
        if isinstance(self.own, Missing):
            return math.nan
        return worst(((self.own - self.value).abs() - self.unknown).clamp(min=0))

    @property
    def folds(self) -> bool:
        return bool((self.sign > 0).any()) and bool((self.sign < 0).any())


@dataclass(frozen=True)
class _Reference:
    """log|det J| of all layers in a row, and in which dtype it was measured."""

    layers: tuple[_Layer, ...]
    dtype: str

    @functools.cached_property
    def value(self) -> Tensor:
        return torch.stack([layer.value for layer in self.layers]).sum(0)

    @functools.cached_property
    def unknown(self) -> Tensor:
        return torch.stack([layer.unknown for layer in self.layers]).sum(0)

    @property
    def label(self) -> str:
        estimated = sum(bool((layer.unknown > 0).any()) for layer in self.layers)
        how = "exact" if not estimated else "stochastic Lanczos quadrature"
        if 0 < estimated < len(self.layers):
            how += f" of {estimated} of {len(self.layers)} layers, the others exact"
        how += ", of the whole map" if len(self.layers) == 1 else ", layer by layer"
        return f"{how}, {self.dtype}"

    def layer_rows(self) -> tuple[dict[str, Any], ...]:
        """A row for each layer, if there are several."""
        if len(self.layers) == 1:
            return ()
        return tuple(
            {"index": layer.index, "name": layer.name, "error": layer.error}
            for layer in self.layers
        )


@dataclass(frozen=True)
class _Compared:
    """Both for some samples, and what forward and inverse leave in the model's own dtype.

    Attributes:
        rows: the samples.
        own: the model's log-determinant.
        reference: that of the Jacobian.
        cancelled: the sum of forward and inverse log-determinant.
        folded: the layers whose det J changes sign.
        comes_back: whether all samples come back nevertheless.
    """

    rows: Tensor
    own: _Own
    reference: _Reference
    cancelled: Tensor | Missing
    folded: tuple[str, ...]
    comes_back: bool

    @property
    def error(self) -> Tensor:
        return (self.own.value - self.reference.value).abs()

    @property
    def allowed(self) -> Tensor:
        """What chance and the bounds of the reference may add to the error."""
        scatter = self.own.standard_error
        if self.own.draws > 1:
            # of few draws that happen to be alike the error is underestimated
            typical = scatter.square().mean().sqrt()
            scatter = _quantile(self.own.draws, len(scatter)) * scatter.clamp(min=typical)
        return scatter + self.reference.unknown


def _quantile(draws: int, samples: int) -> float:
    """Standard errors of a mean of draws that none of the samples exceeds but by a false alarm."""
    import scipy.stats  # only for random log-determinants: it takes half a second

    return float(scipy.stats.t.ppf(1 - FALSE_ALARM / (2 * samples), draws - 1))


def _not_finite(context: AuditContext, usable: Tensor) -> Tensor | tuple[int, ...]:
    """Of all samples with finite latents, whose log-determinant is not finite; or its wrong shape.

    Raises:
        NotApplicable: if the model has no log-determinant.
    """
    shapes = []

    def measure(part: Tensor) -> tuple[Tensor]:
        model, x = context.at(part)
        with torch.no_grad():
            value = model.forward_and_log_det(x)[1]
        if value.shape != (len(x),):
            shapes.append(tuple(value.shape))
            value = value.new_zeros(len(x))
        return (~value.isfinite(),)

    (lost,) = context.parallel.map(usable, measure, at_most=context.max_forward())
    return shapes[0] if shapes else lost.cpu()


def _not_square(context: AuditContext, usable: Tensor) -> str:
    """Why the Jacobian has no determinant; "" if it can have one."""
    model, x = context.at(usable[:1])
    with torch.no_grad():
        outputs = model(x)[0].numel()
    if outputs == x[0].numel():
        return ""
    return (
        f"{model.name} has {outputs} outputs for {x[0].numel()} inputs: its Jacobian has no "
        "determinant"
    )


def _is_random(context: AuditContext, usable: Tensor) -> bool:
    """Whether two calls at the first samples map them to different latents."""
    model, x = context.at(usable[:LEAST])
    with torch.no_grad():
        first, again = model(x), model(x)
    return not same_up_to_rounding(first, again, torch.finfo(x.dtype).eps ** 0.5)


def _wrong_shape(shape: tuple[int, ...]) -> str:
    return f"the log-determinant has shape {shape}, expected (B,)"


def _compare(context: AuditContext, usable: Tensor, samples: int | None) -> _Compared:
    wanted = _samples(context.x[0].numel()) if samples is None else samples
    wanted = min(wanted, len(usable))
    model, x = context.at(usable[:wanted])
    precise = _float64_copy(context, usable[:wanted])
    few = min(LEAST, wanted)
    if wanted * x[0].numel() ** 2 <= DENSE_ENTRIES:
        few = wanted  # affordable whatever structure the layers have
    reference = _reference(context, model, precise, x, torch.arange(few, device=x.device))
    more = min(wanted, _affordable(reference, x[0].numel())) if samples is None else wanted
    if more > few:
        rest = torch.arange(few, more, device=x.device)
        reference = _joined(reference, _reference(context, model, precise, x, rest))
    rows = usable[:more]
    model, x = context.at(rows)
    with torch.no_grad():
        cancelled = _forward_plus_inverse(model, x)
        if isinstance(precise, Missing):
            own = _own(model, x)
        else:
            own = _own(precise.select(torch.arange(more, device=x.device)), x.double())
    folded = tuple(layer.place for layer in reference.layers if layer.folds)
    comes_back = bool(folded) and _comes_back(context, model, x)
    return _Compared(rows, own, reference, cancelled, folded, comes_back)


def _affordable(reference: _Reference, dimension: int) -> int:
    """How many samples may be compared at the cost that the first ones have shown."""
    if bool((reference.unknown > 0).any()):
        return LEAST
    dense = max(layer.dense for layer in reference.layers)
    if dense == 0:
        return MOST
    return max(LEAST, DENSE_ENTRIES // (dense * dimension))


def _float64_copy(context: AuditContext, rows: Tensor) -> AuditedModel | Missing:
    """A copy in float64 that runs there: what a function has captured stays in its own dtype."""
    try:
        copy = context.in_float64().select(rows)
        with torch.no_grad():
            copy.forward_and_log_det(context.x[rows].double())
    except (NotApplicable, ModelError) as error:
        return Missing(str(error))
    return copy


def _own(model: AuditedModel, x: Tensor) -> _Own:
    first = model.forward_and_log_det(x)[1]
    again = model.forward_and_log_det(x)[1]
    # two evaluations of the same formula may add up in another order
    scale = first.abs().double() + x[0].numel()
    same = (first - again).abs().double() <= 100 * torch.finfo(first.dtype).eps * scale
    if bool(same.all()) or not bool(first.isfinite().all()):
        exact = torch.zeros(len(x), dtype=torch.float64)
        return _Own(first.double().cpu(), exact, 1)
    draws = [first, again]
    draws += [model.forward_and_log_det(x)[1] for _ in range(DRAWS - 2)]
    stacked = torch.stack(draws).double().cpu()
    standard_error = stacked.std(0) / math.sqrt(DRAWS)
    return _Own(stacked.mean(0), standard_error, DRAWS)


def _forward_plus_inverse(model: AuditedModel, x: Tensor) -> Tensor | Missing:
    try:
        z, forward = model.forward_and_log_det(x)
        if not bool(finite_rows(z).all()):
            return Missing("some latents are not finite")
        _, inverse = model.inverse_and_log_det(z)
    except (NotApplicable, ModelError) as error:
        return Missing(str(error))
    if forward.shape != inverse.shape:
        return Missing(f"the inverse's log-determinant has shape {tuple(inverse.shape)}")
    return (forward.double() + inverse.double()).cpu()


def _reference(
    context: AuditContext,
    model: AuditedModel,
    precise: AuditedModel | Missing,
    x: Tensor,
    rows: Tensor,
) -> _Reference:
    """Of these rows of x, in float64 where that is possible, in parts that fit the memory."""
    vectors = max(2 * QUADRATURE_STEPS, min(x[0].numel(), DENSE[context.level]))
    at_once = max(1, int(min(len(rows), context.max_linearized(vectors))))
    parts = []
    for part in rows.split(at_once):
        found = None
        if not isinstance(precise, Missing):
            # a layer without a derivative in float64 may have one in its own dtype
            with contextlib.suppress(NotApplicable, ModelError):
                found = _measured(context, precise.select(part), x[part].double())
        parts.append(found or _measured(context, model.select(part), x[part]))
    return functools.reduce(_joined, parts)


def _measured(context: AuditContext, model: AuditedModel, x: Tensor) -> _Reference:
    kind = "float64 copy" if context.x.dtype != x.dtype else dtype_name(x.dtype)
    found = []
    for k, layer in enumerate(model.layers() or (model,)):
        exact = layer_log_det(layer, x, max_dense=DENSE[context.level])
        if isinstance(exact, LayerLogDet):
            value, unknown = exact.log_abs, torch.zeros_like(exact.log_abs)
            sign, dense = exact.sign, exact.dense
        else:
            value, unknown = _quadrature(context, layer, x)
            sign, dense = torch.full_like(value, math.nan), 0
        x, own = _step(layer, x)
        found.append(_Layer(k, layer.name, value.cpu(), unknown.cpu(), sign.cpu(), own, dense))
    return _Reference(tuple(found), kind)


def _quadrature(context: AuditContext, layer: Invertible, x: Tensor) -> tuple[Tensor, Tensor]:
    found = stochastic_log_det(
        Linearization(layer, x),
        0,
        probes=PROBES,
        steps=QUADRATURE_STEPS,
        generator=context.generator(),
    )
    return found.value, found.bias + SIGMAS * found.standard_error


def _step(layer: Invertible, x: Tensor) -> tuple[Tensor, Tensor | Missing]:
    """The layer's output, and its own log-determinant."""
    with torch.no_grad():
        try:
            z, own = layer.forward_and_log_det(x)
        except (NotApplicable, ModelError) as error:
            return layer(x), Missing(str(error))
    if own.shape != (len(x),):
        return z, Missing(f"it has shape {tuple(own.shape)}")
    return z, own.double().cpu()


def _joined(first: _Reference, second: _Reference) -> _Reference:
    """Of the samples of both."""
    layers = []
    for a, b in zip(first.layers, second.layers, strict=True):
        own: Tensor | Missing = Missing("some samples have none")
        if isinstance(a.own, Tensor) and isinstance(b.own, Tensor):
            own = torch.cat([a.own, b.own])
        layers.append(
            _Layer(
                a.index,
                a.name,
                torch.cat([a.value, b.value]),
                torch.cat([a.unknown, b.unknown]),
                torch.cat([a.sign, b.sign]),
                own,
                max(a.dense, b.dense),
            )
        )
    return _Reference(tuple(layers), first.dtype)


def _comes_back(context: AuditContext, model: AuditedModel, x: Tensor) -> bool:
    try:
        errors = round_trip(model, x, batch_size=len(x)).by_feature
    except (NotApplicable, ModelError):
        return False
    return worst(errors) <= context.limits.round_trip(x.dtype)


def _finding(context: AuditContext, compared: _Compared, *, lost: int, of: int) -> Finding:
    own, reference = compared.own, compared.reference
    limit, count = context.limits.density, len(reference.value)
    figure = math.inf
    if lost or not bool(own.value.isfinite().all()):
        verdict = Verdict.NON_FINITE
        reason = f"{lost} of {of} log-determinants are NaN or Inf"
        if not lost:
            lost, of = int((~own.value.isfinite()).sum()), count
            reason = f"{lost} of {of} log-determinants are NaN or Inf in a float64 copy"
    elif compared.folded and not compared.comes_back:
        verdict = Verdict.UNSTABLE
        reason = f"det J changes sign between samples, in {', '.join(compared.folded)}"
        reason += ": the map folds, so that no inverse and no density exist there"
    elif not bool(reference.value.isfinite().all()):
        verdict = Verdict.UNDECIDED
        singular = int((~reference.value.isfinite()).sum())
        reason = (
            f"the Jacobian of {singular} of {count} samples is singular or not finite "
            f"({reference.label}): the formula could not be checked there"
        )
    else:
        figure = worst((compared.error - compared.allowed).clamp(min=0))
        verdict = context.limits.verdict(figure, limit)
        reason = _reason(compared, limit)
        unknown = worst(reference.unknown)
        if verdict.passed and unknown > limit:
            verdict, figure = Verdict.UNDECIDED, math.nan
            reason = (
                f"the log-determinant of a Jacobian without structure is known to {brief(unknown)} "
                f"nats only ({reference.label}), and within that the formula agrees"
            )
            reason += _left(compared, limit)
    return Finding(verdict, figure, limit, "nats", reason, count, len(context.x))


def _reason(compared: _Compared, limit: float) -> str:
    count = len(compared.reference.value)
    how = compared.reference.label
    scatter = compared.own.standard_error.max().item()
    if scatter > 0:
        how += f", standard error {brief(scatter)}"
    unknown = worst(compared.reference.unknown)
    if unknown > 0:
        how += f", within {brief(unknown)}"
    wrong = compared.error - compared.allowed > limit
    if bool(wrong.any()):
        text = (
            f"the log-determinant of {int(wrong.sum())} of {count} samples differs from the "
            f"Jacobian's by up to {brief(worst(compared.error))} nats ({how})"
        )
        text += _at_fault(compared.reference, limit)
    else:
        subject = "the formula of the log-determinant agrees"
        if scatter > 0:
            subject = f"the log-determinant is random; the mean of {compared.own.draws} agrees"
        text = (
            f"{subject} with the Jacobian of {count} samples "
            f"to {brief(worst(compared.error))} nats ({how})"
        )
    if compared.folded:
        text += f"; det J changes sign in {', '.join(compared.folded)}, but all samples come back"
    return text + _left(compared, limit)


def _advice(context: AuditContext) -> str:
    """What to do about a wrong log-determinant: of a solver, a finer one."""
    trace = getattr(context.model.block, "trace", None)
    if trace is None:
        return DERIVE
    x = context.x[:1]
    with preserve_state(context.model):
        vectors = len(trace.prepare(x))
    return EXACT_TRACE if vectors < x.numel() else SMALLER_STEPS


def _left(compared: _Compared, limit: float) -> str:
    """What forward and inverse log-determinant leave, if it is more than the limit."""
    if isinstance(compared.cancelled, Missing):
        return ""
    left = worst(compared.cancelled.abs())
    if left <= limit:
        return ""
    return f"; those of forward and inverse add up to {brief(left)} nats, not 0"


def _at_fault(reference: _Reference, limit: float) -> str:
    """The layers whose own log-determinants are wrong, in words."""
    if len(reference.layers) == 1:
        return ""
    wrong = [layer for layer in reference.layers if layer.error > limit]
    if wrong:
        wrong.sort(key=lambda layer: layer.error, reverse=True)
        named = [f"{layer.place} by {brief(layer.error)}" for layer in wrong[:3]]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return f": off in {', '.join(named)}{more}"
    if all(isinstance(layer.own, Tensor) for layer in reference.layers):
        return "; every layer's own is right, their sum is not"
    return ""


def _values(compared: _Compared) -> dict[str, float]:
    values = {
        "max_error": worst(compared.error),
        "largest_log_det": worst(compared.own.value.abs()),
        "standard_error": worst(compared.own.standard_error),
        "unknown": worst(compared.reference.unknown),
    }
    if isinstance(compared.cancelled, Tensor):
        values["forward_plus_inverse"] = worst(compared.cancelled.abs())
    return values


def _by_sample(compared: _Compared) -> dict[str, Tensor]:
    named = {
        "log_det": compared.own.value,
        "reference": compared.reference.value,
        "error": compared.error,
    }
    if isinstance(compared.cancelled, Tensor):
        named["forward_plus_inverse"] = compared.cancelled
    return named

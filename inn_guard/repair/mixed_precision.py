"""raise_precision(): a model whose few sensitive layers run in a finer dtype."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.audits.batch import checked_batch
from inn_guard.core.base import BaseDistribution
from inn_guard.core.context import Context, cast_context
from inn_guard.core.invertible import (
    DerivedMap,
    Invertible,
    as_log_det,
    standard_normal_log_prob,
)
from inn_guard.core.mismatch import check_rows
from inn_guard.core.missing import NotApplicable
from inn_guard.core.readable import composes
from inn_guard.core.tensors import dtype_name, finite_rows
from inn_guard.execution.state import preserve_state
from inn_guard.repair.copies import independent_copy
from inn_guard.repair.measure import Examination, open_uses
from inn_guard.repair.sensitivity import needed_layers, sensitive_first
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.comparison import Comparison, compare
from inn_guard.report.limits import Limits
from inn_guard.report.uses import checked_uses
from inn_guard.report.verdict import Verdict

__all__ = ["MixedPrecision", "PrecisionSummary", "raise_precision"]

REPEATS = 5  #: timed passes of each kind
COMPARED = 4  #: samples at which layers are compared with their model
EXACT = "Keep what the inverse loses, which restores x bit for bit: coder = ig.exact(flow)"
GUARD = "Or let gradients be exact, whatever the inverse does: ig.memory_saving(flow, exact=True)"


@dataclass(frozen=True)
class PrecisionSummary:
    """What `raise_precision` found. Prints as before against after.

    Attributes:
        comparison: the reports "before" and "after".
        reason: what was done, in one sentence.
        raised: names of the layers in the finer dtype, with their numbers.
        layers: how many layers compute; those that only move entries are not counted.
        forward_time: time of a forward pass over that of the model before.
        inverse_time: likewise of an inverse pass.
        weight_bytes: bytes of all parameters and buffers, over those before.
        advice: what to try next; () if every use passes.
    """

    comparison: Comparison
    reason: str
    raised: tuple[str, ...]
    layers: int
    forward_time: float
    inverse_time: float
    weight_bytes: float
    advice: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The verdict after, over the uses that count."""
        return self.comparison["after"].verdict

    @property
    def passed(self) -> bool:
        """Whether every counted use passes."""
        return self.verdict.passed and not self.advice

    def __str__(self) -> str:
        lines = [str(self.comparison), "", self.reason]
        lines.append(
            f"time of a pass x {self.forward_time:.2g} forward, x {self.inverse_time:.2g} inverse; "
            f"weights x {self.weight_bytes:.3g}"
        )
        for number, text in enumerate(self.advice, 1):
            lines.append(f"{number}. {text}")
        return "\n".join(lines)


class MixedPrecision(Invertible):
    """A model whose layers compute in dtypes of their own.

    Between two layers the state is in the finer of their dtypes. The ends are in the dtype of the
    data, or of the first and the last layer where that is finer: then z, or x, is float64, because
    rounding it would lose what was won. ``double()``, ``float()`` and ``to(dtype)`` change the
    dtype of every layer.

    Args:
        model: the model, whose layers are converted in place.
        plan: dtype of each layer, first layer first; one for a model without layers.
        dtype: of the data.
        context: what the model is conditioned on.

    Attributes:
        model: the converted model, of the class of the one that was given.
        plan: dtype of each layer.
        summary: what ``raise_precision`` found; None before.
    """

    summary: PrecisionSummary | None = None

    def __init__(
        self,
        model: nn.Module,
        plan: Sequence[torch.dtype],
        *,
        dtype: torch.dtype,
        context: Context = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.context = context
        self.plan = tuple(plan)
        self.dtype = dtype
        self.training = model.training
        chain = self._chain()
        self.bijective = all(layer.bijective for layer in chain)
        for layer, wanted in zip(chain, self.plan, strict=True):
            _convert(layer, wanted)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixedPrecision:  # noqa: FBT001, FBT002
        """Follow a conversion of all weights, as by ``double()``."""
        converted = {old: fn(torch.empty(0, dtype=old)).dtype for old in {*self.plan, self.dtype}}
        self.plan = tuple(converted[old] for old in self.plan)
        self.dtype = converted[self.dtype]
        super()._apply(fn, recurse)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """z = F(x)."""
        for layer in self.layers():
            x = layer(x)
        return x

    def inverse(self, z: Tensor) -> Tensor:
        """x = F^-1(z)."""
        for layer in reversed(self.layers()):
            z = layer.inverse(z)
        return z

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F(x) and log|det dF(x)/dx|, (B,)."""
        total = torch.zeros(len(x), dtype=self.dtype, device=x.device)
        for layer in self.layers():
            x, log_det = layer.forward_and_log_det(x)
            total = total + log_det
        return x, total

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """F^-1(z) and log|det dF^-1(z)/dz|, (B,)."""
        total = torch.zeros(len(z), dtype=self.dtype, device=z.device)
        for layer in reversed(self.layers()):
            z, log_det = layer.inverse_and_log_det(z)
            total = total + log_det
        return z, total

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,), with the model's own base; N(0, I) where it has none."""
        z, log_det = self.forward_and_log_det(x)
        base = self.base()
        if base is None:
            return standard_normal_log_prob(z) + log_det
        return as_log_det(base.log_prob(z), z) + log_det

    def sample(self, n: int) -> Tensor:
        """n draws of x, (n, *data), from the model's own base, with torch's global generator.

        Raises:
            NotApplicable: if the model has no base distribution.
        """
        base = self.base()
        if base is None:
            raise NotApplicable(f"{self.name} has no base distribution: pass draws to inverse(z)")
        context = base.repeated_context(n)
        with torch.no_grad():
            z = base.sampler(n, context).to(base.like)
            return self.with_context(context).inverse(z)

    def base(self) -> BaseDistribution | None:
        """The model's own base distribution, with latents in the dtype of z."""
        base = self._wrapped().base()
        if base is None:
            return None
        return dataclasses.replace(base, like=base.like.to(self._states()[-1]))

    def layers(self) -> tuple[Invertible, ...]:
        """The model's layers, each in its dtype."""
        states = self._states()
        chain = self._chain()
        return tuple(
            _InDtype(layer, self.plan[k], states[k], states[k + 1]) for k, layer in enumerate(chain)
        )

    @property
    def name(self) -> str:
        """The class name of the model."""
        return type(self.model).__name__

    def _wrapped(self) -> Invertible:
        return wrap(self.model, context=self.context)

    def _chain(self) -> tuple[Invertible, ...]:
        return _chain_of(self._wrapped(), len(self.plan))

    def _states(self) -> list[torch.dtype]:
        """dtype of x, of every state between two layers, and of z."""
        ends = [self.dtype, *self.plan, self.dtype]
        return [torch.promote_types(a, b) for a, b in itertools.pairwise(ends)]


class _InDtype(DerivedMap):
    """A layer that computes in one dtype, between states of others."""

    def __init__(
        self, inner: Invertible, own: torch.dtype, before: torch.dtype, after: torch.dtype
    ) -> None:
        super().__init__(inner.with_context(cast_context(inner.context, own)))
        self.own, self.before, self.after = own, before, after

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own map, computed in its dtype."""
        return self.inner(x.to(self.own)).to(self.after)

    def inverse(self, z: Tensor) -> Tensor:
        """Its inverse, computed in its dtype."""
        return self.inner.inverse(z.to(self.own)).to(self.before)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's own map with its log-determinant, (B,)."""
        z, log_det = self.inner.forward_and_log_det(x.to(self.own))
        return z.to(self.after), log_det

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Its inverse with the log-determinant of that, (B,)."""
        x, log_det = self.inner.inverse_and_log_det(z.to(self.own))
        return x.to(self.before), log_det

    @property
    def block(self) -> nn.Module:
        """Itself: no rule of the inner layer's class knows of the conversions."""
        return self


def _chain_of(model: Invertible, count: int) -> tuple[Invertible, ...]:
    """The model's layers, or the model as its only one."""
    if count == 1:
        return (model,)
    return model.layers()


def _convert(layer: Invertible, dtype: torch.dtype) -> None:
    """The layer's weights to a dtype, in place."""
    layer.to(dtype)
    for module in layer.modules():
        if hasattr(module, "use_cache"):
            # what nflows' Linear has cached would stay in the old dtype
            module.use_cache(mode=False)  # type: ignore[operator]


def raise_precision(  # noqa: PLR0913
    model: Any,
    x: Tensor,
    *,
    uses: str | Iterable[str] | None = None,
    rest: torch.dtype | None = None,
    limits: Limits | None = None,
    context: Context = None,
    prior: Any = None,
    seed: int = 0,
) -> MixedPrecision:
    """The model with the fewest layers in a finer dtype that make it fit for the uses.

        mixed = ig.raise_precision(flow, x, uses=["reconstruction"])
        print(mixed.summary)
        z = mixed(x); x = mixed.inverse(z); mixed.log_prob(x); mixed.sample(100)

    Layers are ordered by how much their rounding adds to the error of the uses, to first order, as
    in ``jacobian.rounding_error``. With h_k the state after layer k, A_k the Jacobian of the way
    back from it, and u the unit roundoff:

        reconstruction, sampling   |A_k delta_k|, delta_k the rounding of layer k
        density                    |d log p / d h_k| |h_k| u

    The shortest beginning of this order whose audit passes is found by bisection. So every answer
    is measured. All layers in the finer dtype are tried first: where that does not pass, no dtype
    helps, the model is returned with its dtypes unchanged, and ``summary.advice`` says what does.

    Layers that share weights are raised together. Layers that only move entries run in the dtype of
    their neighbours and are not counted.

    Args:
        model: a torch.nn.Module that ``wrap`` accepts; it is copied.
        x: data, (B, *data), in the dtype of the model.
        uses: which uses must pass. Default: those that the model declares, as in ``audit``.
        rest: dtype of the layers that are not raised. Default: that of x. Pass ``torch.bfloat16``
            for speed: then layers are raised to the dtype of x, and only if that is not enough to
            float64. log p(x) is then also held against the model's own in float64, because
            rounded weights are another model.
        limits: up to which figure the model is fit for a use. Default: ``Limits()``.
        context: what the model is conditioned on, one row for each sample.
        prior: where latents are drawn from, as in ``audit``. Default: the model's own base.
        seed: of everything random.

    Returns:
        an Invertible with the model's parameters, modes and base; its ``summary`` has the reports
        before and after, the layers that were raised, and the cost.

    Raises:
        TypeError: if the model is no module or cannot be copied.
        ValueError: if x has another dtype than the model, or ``rest`` is finer than it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model that is a torch.nn.Module; got {type(model).__name__}")
    own = wrap(model, context=context)
    x = checked_batch(own, x).detach().clone()
    check_rows(own.context, x)
    rest = rest or x.dtype
    if not rest.is_floating_point or torch.finfo(rest).eps < torch.finfo(x.dtype).eps:
        raise ValueError(
            f"expected rest as a dtype no finer than that of x, {dtype_name(x.dtype)}; got {rest}: "
            "pass torch.bfloat16, or leave it out"
        )
    search = _Search(model, own, x, rest, limits or Limits(), prior, seed, uses)
    with preserve_state(own):
        return search.run()


class _Search:
    """The search for the fewest layers."""

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        own: Invertible,
        x: Tensor,
        rest: torch.dtype,
        limits: Limits,
        prior: Any,
        seed: int,
        uses: Any,
    ) -> None:
        counted = None if uses is None else checked_uses(uses)
        self.model, self.x, self.rest, self.seed = model, x, rest, seed
        self.own, self.limits, self.prior = own, limits, prior
        self.examination = Examination(counted, limits, prior, type(model).__name__)
        with torch.no_grad():
            self.names, self.groups, self.movers = _structure(own, x)

    def run(self) -> MixedPrecision:
        """The model with the fewest raised layers."""
        before = self.examination.report(self.own, self.x, seed=self.seed)
        unchanged = self.made(set(), self.x.dtype, self.x.dtype)
        plain = self.made(set(), self.rest, self.rest)
        if self.passes(plain):
            return self.summarised(plain, before, "No layer has to be raised: every use passes.")
        for finer in dict.fromkeys((self.x.dtype, torch.float64)):
            if torch.finfo(finer).eps >= torch.finfo(self.rest).eps:
                continue
            every = self.made({*range(len(self.groups))}, finer, self.rest)
            if self.passes(every):
                return self.fewest(every, finer, before)
        tried = "All layers in float64 do not pass either: no dtype helps."
        if self.x.dtype == torch.float64:
            tried = "There is no dtype finer than float64."
        return self.summarised(unchanged, before, tried)

    def fewest(
        self, every: MixedPrecision, finer: torch.dtype, before: AuditReport
    ) -> MixedPrecision:
        """Bisection along the order of sensitivity, from none, which fails, to all, which pass."""
        order, shares = self.order()
        fails, passes, best = 0, len(order), every
        middle = needed_layers(shares, roundoff=torch.finfo(self.rest).eps / 2)
        while passes - fails > 1:
            middle = min(max(middle, fails + 1), passes - 1)
            tried = self.made(set(order[:middle]), finer, self.rest)
            if self.passes(tried):
                passes, best = middle, tried
            else:
                fails = middle
            middle = (fails + passes) // 2
        raised = [k for group in order[:passes] for k in self.groups[group]]
        reason = (
            f"{len(raised)} of {self.computing} layers in {dtype_name(finer)}, the others in "
            f"{dtype_name(self.rest)}."
        )
        if len(raised) == self.computing:
            which = "The only layer" if len(raised) == 1 else f"All {len(raised)} layers"
            reason = f"{which} in {dtype_name(finer)}: fewer did not pass."
        return self.summarised(best, before, reason, raised=sorted(raised))

    @property
    def computing(self) -> int:
        """How many layers compute."""
        return sum(map(len, self.groups))

    def order(self) -> tuple[list[int], list[float]]:
        """Groups of layers, the most sensitive first, with the errors per unit roundoff."""
        shares = sensitive_first(
            self.own,
            self.x,
            limits=self.limits,
            uses=self.examination.uses,
            prior=self.prior,
            seed=self.seed,
        )
        of_group = [math.hypot(*(shares[k] for k in group)) for group in self.groups]
        order = sorted(range(len(self.groups)), key=lambda group: -of_group[group])
        return order, [of_group[group] for group in order]

    def made(self, raised: set[int], finer: torch.dtype, rest: torch.dtype) -> MixedPrecision:
        """A copy of the model with these groups of layers in the finer dtype."""
        plan: list[torch.dtype | None] = [None] * len(self.names)
        for number, group in enumerate(self.groups):
            for k in group:
                plan[k] = finer if number in raised else rest
        bare = self.model
        context = self.own.context
        if isinstance(bare, Invertible):
            bare = bare.with_context(None)
        return MixedPrecision(
            independent_copy(bare), _filled(plan, self.x.dtype), dtype=self.x.dtype, context=context
        )

    def passes(self, mixed: MixedPrecision) -> bool:
        """Whether every counted use passes."""
        try:
            report = self.examination.look(mixed, self.data(mixed), seed=self.seed)
        except (RuntimeError, TypeError, ValueError):
            return False  # a dtype in which this model does not run at all
        passed = report.verdict.passed and not open_uses(report)
        return passed and self.is_the_same_density(mixed, report)

    def is_the_same_density(self, mixed: MixedPrecision, report: AuditReport) -> bool:
        """Whether log p is that of the weights before they were rounded."""
        counted = "density" in report.uses and report.uses["density"].counted
        if not counted or self.rest == self.x.dtype:
            return True
        rows = finite_rows(self.x)
        part, x = self.own.select(rows.nonzero()[:, 0]), self.x[rows]
        try:
            with torch.no_grad():
                true = part.to_dtype(torch.float64).log_prob(x.double())
                found = mixed.select(rows.nonzero()[:, 0]).eval().log_prob(x)
        except NotApplicable:
            return True
        return bool(((found.double() - true).abs() <= self.limits.density).all())

    def data(self, mixed: MixedPrecision) -> Tensor:
        """x in a dtype that the audit takes: that of some weight."""
        dtypes = {p.dtype for p in mixed.parameters() if p.is_floating_point()}
        if not dtypes or self.x.dtype in dtypes:
            return self.x
        return self.x.to(max(dtypes, key=lambda dtype: torch.finfo(dtype).bits))

    def summarised(
        self,
        mixed: MixedPrecision,
        before: AuditReport,
        reason: str,
        *,
        raised: Sequence[int] = (),
    ) -> MixedPrecision:
        """The model with its summary."""
        x = self.data(mixed)
        after = self.examination.report(mixed, x, seed=self.seed)
        forward, inverse = _time_ratios(self.own, self.x, mixed, x)
        mixed.summary = PrecisionSummary(
            comparison=compare({"before": before, "after": after}),
            reason=reason,
            raised=tuple(f"layer {k} ({self.names[k]})" for k in raised),
            layers=self.computing,
            forward_time=forward,
            inverse_time=inverse,
            weight_bytes=_bytes(mixed) / max(1, _bytes(self.own)),
            advice=_advice(after),
        )
        return mixed


def _structure(own: Invertible, x: Tensor) -> tuple[list[str], list[list[int]], list[int]]:
    """Names of the layers, groups of those that compute and share weights, and those that move."""
    rows = finite_rows(x).nonzero()[:COMPARED, 0]
    part, state = own.select(rows), x[rows]
    chain = part.layers()
    if not chain or not len(rows) or not composes(part, chain, state):
        return [own.name], [[0]], []
    movers: list[int] = []
    groups: list[tuple[set[int], list[int]]] = []
    for k, layer in enumerate(chain):
        after = layer(state)
        weights = {id(p) for p in layer.parameters()}
        if not weights and _only_moved(state, after):
            movers.append(k)
        else:
            shared = [group for group in groups if group[0] & weights]
            layers = sorted([k, *(one for group in shared for one in group[1])])
            groups = [group for group in groups if not group[0] & weights]
            groups.append((weights.union(*(group[0] for group in shared)), layers))
        state = after
    if not groups:
        return [own.name], [[0]], []
    return [layer.name for layer in chain], [layers for _, layers in groups], movers


def _only_moved(before: Tensor, after: Tensor) -> bool:
    if before.numel() != after.numel():
        return False
    return torch.equal(before.flatten(1).sort(1).values, after.flatten(1).sort(1).values)


def _filled(plan: Sequence[torch.dtype | None], outer: torch.dtype) -> list[torch.dtype]:
    """The plan with the dtypes of layers that only move: the finer of their neighbours'."""
    filled = []
    for k, wanted in enumerate(plan):
        earlier = next((one for one in reversed(plan[:k]) if one is not None), outer)
        later = next((one for one in plan[k + 1 :] if one is not None), outer)
        filled.append(wanted or torch.promote_types(earlier, later))
    return filled


def _bytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _time_ratios(
    before: Invertible, x: Tensor, after: Invertible, converted: Tensor
) -> tuple[float, float]:
    """Times of a forward and an inverse pass after over before; NaN where a pass raises."""
    ratios = []
    with torch.no_grad():
        for inverse in (False, True):
            try:
                first, second = _passes(before, x, inverse), _passes(after, converted, inverse)
                times = [(_seconds(first, x), _seconds(second, x)) for _ in range(REPEATS)]
            except (RuntimeError, ValueError, TypeError, NotApplicable):
                ratios.append(math.nan)
                continue
            old, new = zip(*times, strict=True)
            ratios.append(statistics.median(new) / max(statistics.median(old), 1e-9))
    return ratios[0], ratios[1]


def _passes(model: Invertible, x: Tensor, inverse: bool) -> Callable[[], Tensor]:  # noqa: FBT001
    if not inverse:
        return lambda: model(x)
    z = model(x)
    return lambda: model.inverse(z)


def _seconds(run: Callable[[], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    run()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def _advice(report: AuditReport) -> tuple[str, ...]:
    """What helps where no dtype does."""
    left = {use.use for use in open_uses(report)}
    if not left:
        return ()
    advice = []
    if "reconstruction" in left:
        advice.append(EXACT)
    if "gradients" in left:
        advice.append(GUARD)
    advice += [text for text in report.advice if "ig.raise_precision" not in text]
    return tuple(dict.fromkeys(advice))

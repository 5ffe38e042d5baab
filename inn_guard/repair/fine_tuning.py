"""stabilize(): a trained model that fails a use, fine-tuned until it passes."""

from __future__ import annotations

import copy
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from inn_guard.adapters import wrap
from inn_guard.audits.priors import base_of
from inn_guard.audits.run import PATIENCE, is_watched
from inn_guard.core.base import BaseDistribution, seeded
from inn_guard.core.context import Context, select_rows
from inn_guard.core.invertible import Invertible, InvertibleWrapper
from inn_guard.core.missing import NotApplicable
from inn_guard.core.tensors import finite_rows
from inn_guard.execution.state import preserve_state
from inn_guard.repair.copies import independent_copy
from inn_guard.repair.measure import Examination, badness, excess, open_uses
from inn_guard.repair.penalties import Penalty, is_trainable, penalties_for
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.comparison import Comparison, compare
from inn_guard.report.limits import Limits
from inn_guard.report.uses import checked_uses
from inn_guard.report.verdict import Verdict
from inn_guard.training.regularizer_hook import RegularizerHook

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Look", "Stabilized", "stabilize"]

Loss = Callable[[nn.Module, Any], Tensor]
Part = Callable[[nn.Module], Any]

AUDITED = 256  #: rows of the first batch that are audited
KEPT = 4  #: batches at which the loss is compared before and after
WARM_UP = 20  #: steps in which the learning rate rises, at most a quarter of all
NO_GRADIENT = (
    "the directions of the model run under torch.no_grad, detach, or write in place. Nothing was "
    "changed: let gradients through, then call stabilize again."
)
ASSUMED = (
    "The loss was the negative log-likelihood under N(0, I), since the model has no base: pass "
    "its loss if it was trained otherwise."
)
EXACT = "Or keep what the inverse loses, which restores x bit for bit: coder = ig.exact(flow)"


@dataclass(frozen=True)
class Look:
    """One audit of the model while it is fine-tuned.

    Attributes:
        step: optimizer steps made before it.
        loss: without penalties, mean over the steps since the last look; NaN before the first one.
        coefficients: use -> coefficient of its penalty in these steps.
        verdicts: use -> verdict, of the uses that count.
        figures: use -> figure, to be held against the use's limit.
    """

    step: int
    loss: float
    coefficients: dict[str, float]
    verdicts: dict[str, Verdict]
    figures: dict[str, float]


@dataclass(frozen=True)
class Stabilized:
    """What `stabilize` made of a model, and the way there. Prints as before against after.

    Attributes:
        model: the repaired copy, of the class of the model that was given.
        comparison: the reports "before" and "after".
        reason: how it ended, in one sentence.
        steps: optimizer steps made, of which the model keeps the first ``kept_step``.
        kept_step: after how many steps the model is kept: at the best look.
        skipped_steps: how many further steps were left out because a gradient was not finite.
        loss_before: loss at the first batches, in eval mode; NaN if it could not be computed.
        loss_after: of the repaired copy at the same batches.
        looks: the audits on the way, the first one before any step.
        advice: what to try next; () if every use passes.
        interrupted: whether a KeyboardInterrupt ended it.
    """

    model: nn.Module
    comparison: Comparison
    reason: str
    steps: int
    kept_step: int
    skipped_steps: int
    loss_before: float
    loss_after: float
    looks: tuple[Look, ...] = field(repr=False)
    advice: tuple[str, ...] = ()
    interrupted: bool = False

    @property
    def before(self) -> AuditReport:
        """The report on the model that was given."""
        return self.comparison["before"]

    @property
    def after(self) -> AuditReport:
        """The report on the repaired copy."""
        return self.comparison["after"]

    @property
    def verdict(self) -> Verdict:
        """The verdict on the repaired copy, over the uses that count."""
        return self.after.verdict

    @property
    def passed(self) -> bool:
        """Whether every counted use passes."""
        return self.verdict.passed

    def __str__(self) -> str:
        lines = [str(self.comparison), "", self.reason]
        if math.isfinite(self.loss_before):
            lines.append(f"loss {self.loss_before:.4g} before, {self.loss_after:.4g} after")
        for number, text in enumerate(self.advice, 1):
            lines.append(f"{number}. {text}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"{self.comparison._repr_html_()}<p>{self.reason}</p>"

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Both reports on one self-contained page; see ``Comparison.to_html``."""
        self.comparison.to_html(path)

    def to_frame(self) -> pd.DataFrame:
        """One row per report and use; see ``Comparison.to_frame``."""
        return self.comparison.to_frame()


def stabilize(  # noqa: PLR0913
    model: Any,
    batches: Any,
    *,
    loss: Loss | None = None,
    uses: str | Iterable[str] | None = None,
    limits: Limits | None = None,
    part: Part | None = None,
    context: Callable[[Any], Context] | None = None,
    prior: Any = None,
    x: Tensor | None = None,
    steps: int = 200,
    every: int = 20,
    coefficient: float | None = None,
    learning_rate: float = 5e-4,
    clip: float = 10.0,
    tolerance: float = 0.01,
    seed: int = 0,
    progress: bool | None = None,
) -> Stabilized:
    """Fine-tune a copy of a trained model until it is fit for the uses.

        steady = ig.stabilize(flow, loader, uses=["sampling"])
        print(steady)
        flow = steady.model

    Each step of Adam minimises loss + coefficient * penalty. The penalty belongs to the use that
    fails:

        sampling                    D mean log(1 + |J_F^-1 v|^2 / D) at draws from the base
        reconstruction, gradients   D/2 log(mean |z|^2 / D) - mean log|det J_F| at the data

    The first is ``FiniteDifferences(direction="inverse", at="prior", form="log")``. The second
    needs no inverse and so is finite where the inverse overflows; where a model has no
    log-determinant, the first form at the data takes its place. Density and other inputs have no
    penalty: if they alone fail, no step is made.

    After every ``every`` steps the counted uses are audited. A use passes if its verdict is stable
    or marginal. A coefficient is tried for at least 20 steps, and multiplied by 3 if the figure of
    its use has not fallen by that factor in them. When all uses pass, in an audit with other
    random numbers too, the coefficients are divided by 3 at each further look. The repair ends as
    soon as all uses pass and the loss is at most ``tolerance`` above that before, and otherwise
    after ``steps`` steps. Kept is the state with which most uses pass and, among those with which
    all do, the one of the smallest loss.

    **What is changed.** Nothing in ``model``: a deep copy is trained and returned, in the best
    state. It is trained in the mode in which the model comes: in eval mode dropout and the
    statistics of BatchNorm stay still. Parameters without ``requires_grad`` stay as they are. A
    step whose gradient is not finite is left out.

    **What ends it early.** A KeyboardInterrupt ends the repair with a warning, and the best state
    so far is returned. What ``loss`` or ``batches`` raise is raised; if possible, the attribute
    ``stabilized`` of that exception holds the result so far. When an iterator ends, so does the
    repair; a list or DataLoader starts again.

    **Random numbers.** While ``loss`` and ``batches`` run, torch's global generators of the CPU and
    of the model's device are seeded with ``seed``. They come out as they went in. Generators of
    numpy and Python are left to ``loss`` and ``batches``.

    Args:
        model: a torch.nn.Module that ``wrap`` accepts, or that holds one (see ``part``).
        batches: what to train on: a DataLoader, a list of batches, or an iterator of them. A batch
            is a tensor (B, *data), or a tuple that begins with one.
        loss: (model, batch) -> scalar, of the copy, as in training. Default: the mean negative
            log-likelihood of the batch in nats; under N(0, I), as in ``audit``, if the model has no
            base distribution, which the result says.
        uses: which uses must pass. Default: those that the model declares, as in ``audit``.
        limits: up to which figure the model is fit for a use. Default: ``Limits()``.
        part: model -> its invertible part, which is audited and penalised, such as
            ``lambda net: net.inn`` of a classifier. Default: the model itself.
        context: batch -> what the invertible part is conditioned on. Default: nothing.
        prior: where latents are drawn from, as in ``audit``. Default: the model's own base.
        x: data to audit, (B, *data). Default: the first 256 rows of the first batch. With a
            context it must be left out.
        steps: how many at most. A tenth of the training's is usually enough.
        every: how many steps between two looks.
        coefficient: of every penalty in the first steps. Default: 0.1 for sampling, else 1e-3.
        learning_rate: of Adam, after a rise over the first 20 steps or quarter of the steps.
        clip: largest norm of the gradient of all parameters.
        tolerance: increase of the loss that ends the repair once the uses pass, relative to the
            loss before, or absolute where that is below 1.
        seed: of everything random.
        progress: whether to show a progress bar. Default: after three seconds, in terminals and
            notebooks.

    Returns:
        the repaired copy with the reports before and after. Where a use does not pass, the result
        says so and what to try; no exception is raised.

    Raises:
        TypeError: if the model is no module or cannot be copied, or a batch holds no tensor.
        ValueError: if there is no batch, no loss, no gradient of it, no parameter to train, or a
            setting is out of range.

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), section 3.2: finite differences, in training.
    """
    settings = _Settings(steps, every, coefficient, learning_rate, clip, tolerance, seed)
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model that is a torch.nn.Module; got {type(model).__name__}")
    if x is not None and context is not None:
        raise ValueError("expected x or context, got both: leave x out, or put it into batches")
    copied = independent_copy(model)
    trainable = [parameter for parameter in copied.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "expected at least one parameter with requires_grad=True; all are frozen: call "
            "model.requires_grad_(True)"
        )
    counted = None if uses is None else checked_uses(uses)
    repair = _Repair(
        model=copied,
        part=part or _itself,
        loss=loss,
        context=context or _no_context,
        prior=prior,
        examination=Examination(counted, limits, prior, type(model).__name__),
        settings=settings,
        batches=_Batches(batches),
    )
    shown = is_watched() if progress is None else progress
    delay = 0.0 if progress else PATIENCE
    with (
        seeded(seed, trainable[0].device),
        tqdm(total=steps, desc="stabilize", delay=delay, disable=not shown, leave=False) as bar,
    ):
        return repair.run(bar, x)


@dataclass(frozen=True)
class _Settings:
    """How `stabilize` trains; see there."""

    steps: int
    every: int
    coefficient: float | None
    learning_rate: float
    clip: float
    tolerance: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "every"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"expected {name} as a whole number, at least 1; got {count!r}")
        for name in ("coefficient", "learning_rate", "clip", "tolerance"):
            size = getattr(self, name)
            if name == "coefficient" and size is None:
                continue
            is_number = isinstance(size, (int, float)) and not isinstance(size, bool)
            if not is_number or not 0 < size < math.inf:
                raise ValueError(f"expected a positive finite {name}; got {size!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"expected seed as a whole number, at least 0; got {self.seed!r}")


def _itself(model: nn.Module) -> nn.Module:
    return model


def _no_context(batch: Any) -> None:
    return None


class _Batches:
    """Batches one after the other; what can be iterated again begins anew at its end."""

    def __init__(self, source: Any) -> None:
        if isinstance(source, (Tensor, nn.Module, str)) or not isinstance(source, Iterable):
            raise TypeError(
                "expected batches as a DataLoader, a list of batches or an iterator of them; got "
                f"a {type(source).__name__}: pass DataLoader(dataset, batch_size=128), or "
                "[x] for a single batch"
            )
        self._source = source
        # a DataLoader draws from the global generator when its iteration begins
        self._iterator: Iterator[Any] = iter(())
        self._ahead: list[Any] = []

    def first(self, count: int) -> list[Any]:
        """The first batches, at most ``count``, which still come out of ``next``.

        Raises:
            ValueError: if there is none at all.
        """
        self._iterator = iter(self._source)
        self._ahead = list(itertools.islice(self._iterator, count))
        if not self._ahead:
            raise ValueError("expected at least one batch, got none")
        return list(self._ahead)

    def next(self) -> Any:
        """The next batch; None at the end of an iterator."""
        if self._ahead:
            return self._ahead.pop(0)
        batch = next(self._iterator, None)
        if batch is None and self._iterator is not self._source:
            self._iterator = iter(self._source)
            batch = next(self._iterator, None)
        return batch


class _WithBase(InvertibleWrapper):
    """The same map with the caller's prior as its base."""

    def __init__(self, inner: Invertible, base: BaseDistribution) -> None:
        super().__init__(inner)
        self._base = base

    def base(self) -> BaseDistribution:
        """The caller's prior."""
        return self._base


@dataclass
class _Best:
    """The best state so far.

    Attributes:
        step: after how many steps.
        rank: the smaller, the better; the loss decides last.
        loss: at the first batches.
        state: a copy of the model's tensors.
    """

    step: int
    rank: tuple[int, float, float]
    loss: float
    state: dict[str, Any]


@dataclass
class _Repair:
    """One repair: what is trained, what it is held against, and how far it has come."""

    model: nn.Module
    part: Part
    loss: Loss | None
    context: Callable[[Any], Context]
    prior: Any
    examination: Examination
    settings: _Settings
    batches: _Batches
    kept: list[Any] = field(init=False)
    audited: Tensor = field(init=False)
    before: AuditReport = field(init=False)
    best: _Best = field(init=False)
    wrapped: Invertible | None = None
    loss_before: float = math.nan
    steps: int = 0
    skipped: int = 0
    looks: list[Look] = field(default_factory=list)
    penalties: list[Penalty] = field(default_factory=list)

    def run(self, bar: Any, x: Tensor | None) -> Stabilized:
        """Audit, train and audit until the uses pass."""
        self.kept = self.batches.first(KEPT)
        self.audited = self._data(self.kept[0])[:AUDITED] if x is None else x
        self.before = self.examination.report(
            self._audited_map(), self.audited, seed=self.settings.seed
        )
        self._record(self.before, math.nan)
        problem = self._why_no_step()
        if not problem:
            self.loss_before = self._loss_at_kept()
        self._keep(self.before, self.loss_before)
        if problem:
            return self._result(problem)
        try:
            reason = self._train(bar)
        except KeyboardInterrupt:
            warnings.warn("stabilize was interrupted; the best state is returned", stacklevel=3)
            return self._result("Interrupted.", interrupted=True)
        except Exception as error:
            with suppress(Exception):  # the error itself matters more
                error.stabilized = self._result(f"Ended by {type(error).__name__}.")  # type: ignore[attr-defined]
            raise
        return self._result(reason)

    def _why_no_step(self) -> str:
        """Why training cannot help; "" if it may."""
        failing = [use.use for use in open_uses(self.before)]
        if not failing and not self.before.verdict.passed:
            return "No use that counts can be measured of this model: nothing was changed."
        if not failing:
            return "Every use that counts passes already: nothing was changed."
        if not bool(finite_rows(self.audited).any()):
            return "No sample is finite: nothing was changed. Pass batches of finite data."
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                return f"The weights hold NaN or Inf ({name}), which no gradient step repairs."
        settings = self.settings
        with preserve_state(self.model):
            model = self._audited_map()
            penalties = penalties_for(
                failing, model, self.audited, coefficient=settings.coefficient, seed=settings.seed
            )
            self.penalties = [p for p in penalties if is_trainable(p, model, self.audited)]
        for penalty in self.penalties:
            penalty.figure = max(
                excess(use) for use in open_uses(self.before) if use.use in penalty.uses
            )
        if not penalties:
            return f"No penalty is known for {' and '.join(failing)}: nothing was changed."
        if not self.penalties:
            return f"No penalty for {' and '.join(failing)} has a gradient: {NO_GRADIENT}"
        return ""

    def _train(self, bar: Any) -> str:
        settings = self.settings
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=settings.learning_rate)
        hook = RegularizerHook(self._audited_map(), [])  # for its step alone
        losses: list[float] = []
        warm_up = min(WARM_UP, max(1, settings.steps // 4))
        for step in range(1, settings.steps + 1):
            batch = self.batches.next()
            if batch is None:
                self._look(losses)
                return f"The batches ended after {self.steps} steps{self._ending()}"
            # the moments of Adam begin at zero: its first steps would be too long
            for group in optimizer.param_groups:
                group["lr"] = min(1.0, step / warm_up) * settings.learning_rate
            value = self._task_loss(batch)
            if not value.requires_grad:
                raise ValueError(
                    "expected a loss with a gradient; got one without: let the forward run with "
                    "gradients (without torch.no_grad and detach), or pass loss="
                )
            if hook.step(value + self._penalty(batch), optimizer, clip=settings.clip):
                self.steps += 1
                losses.append(value.item())
            self.skipped = hook.skipped_steps
            bar.update()
            if step % settings.every and step < settings.steps:
                continue
            if not losses:
                return f"No gradient of the last {settings.every} steps was finite{self._ending()}"
            if self._look(losses):
                break
            losses = []
        return f"Trained for {self.steps} steps{self._ending()}"

    def _ending(self) -> str:
        passes = self.best.rank[0] == 0
        return ": every use that counts passes." if passes else ", which was not enough."

    def _look(self, losses: list[float]) -> bool:
        """Audit, adapt the coefficients, keep the state if it is the best; whether to end."""
        if not losses:
            return False
        seed, model = self.settings.seed, self._audited_map()
        report = self.examination.look(model, self.audited, seed=seed + self.steps)
        if not open_uses(report):
            # passing once in many looks may be luck of the draws
            report = self.examination.look(model, self.audited, seed=seed)
        self._record(report, sum(losses) / len(losses))
        loss = self._loss_at_kept()
        open_now = [use.use for use in open_uses(report)]
        self._keep(report, loss)
        for penalty in self.penalties:
            mine = [use for use in open_uses(report) if use.use in penalty.uses]
            if mine:
                penalty.adapt(max(map(excess, mine)), self.steps)
            elif not open_now:
                penalty.relax()
        return not open_now and loss <= self._accepted_loss()

    def _accepted_loss(self) -> float:
        return self.loss_before + self.settings.tolerance * max(1.0, abs(self.loss_before))

    def _keep(self, report: AuditReport, loss: float) -> None:
        """Keep the current state if it is better than the best one."""
        rank = (*badness(report), loss if math.isfinite(loss) else math.inf)
        if hasattr(self, "best") and rank >= self.best.rank:
            return
        state = {name: _copied(value) for name, value in self.model.state_dict().items()}
        self.best = _Best(self.steps, rank, loss, state)

    def _record(self, report: AuditReport, loss: float) -> None:
        counted = [use for use in report.uses.values() if use.counted]
        self.looks.append(
            Look(
                step=self.steps,
                loss=loss,
                coefficients={
                    use: penalty.coefficient for penalty in self.penalties for use in penalty.uses
                },
                verdicts={use.use: use.verdict for use in counted},
                figures={use.use: use.figure for use in counted},
            )
        )

    def _result(self, reason: str, *, interrupted: bool = False) -> Stabilized:
        """The model in its best state, with the reports before and after."""
        after = self.before
        for parameter in self.model.parameters():
            parameter.grad = None
        if self.steps:
            self.model.load_state_dict(self.best.state)
        if self.best.step:
            after = self.examination.report(
                self._audited_map(), self.audited, seed=self.settings.seed
            )
        return Stabilized(
            model=self.model,
            comparison=compare({"before": self.before, "after": after}),
            reason=f"{reason} {ASSUMED}" if self._assumes_normal() and self.steps else reason,
            steps=self.steps,
            kept_step=self.best.step,
            skipped_steps=self.skipped,
            loss_before=self.loss_before,
            loss_after=self.best.loss,
            looks=tuple(self.looks),
            advice=_advice(after, self.settings, trained=self.steps > 0),
            interrupted=interrupted,
        )

    def _map(self, context: Context) -> Invertible:
        """The invertible part in this context, with the caller's prior as its base."""
        model = self._wrapped(context)
        if self.prior is None:
            return model
        return _WithBase(model, base_of(model, self.audited, prior=self.prior))

    def _wrapped(self, context: Context) -> Invertible:
        """The part in this context; how it is to be called is found out once, on the data."""
        if self.wrapped is None:
            self.wrapped = wrap(self.part(self.model), context=context, x=self.audited)
        return self.wrapped if context is None else self.wrapped.with_context(context)

    def _audited_map(self) -> Invertible:
        rows = torch.arange(len(self.audited))
        return self._map(select_rows(self.context(self.kept[0]), rows))

    def _data(self, batch: Any) -> Tensor:
        """The data x of a batch: the batch itself, or its first entry."""
        x = batch
        if isinstance(batch, (tuple, list)) and batch:
            x = batch[0]
        if not isinstance(x, Tensor):
            raise TypeError(
                "expected batches of tensors (B, *data), or tuples that begin with one; got a "
                f"{type(x).__name__}"
            )
        return x.to(next(self.model.parameters()).device)

    def _penalty(self, batch: Any) -> Tensor:
        model, x = self._map(self.context(batch)), self._data(batch)
        return torch.stack([penalty(model, x) for penalty in self.penalties]).sum()

    def _task_loss(self, batch: Any) -> Tensor:
        if self.loss is None:
            return self._negative_log_likelihood(batch)
        value = self.loss(self.model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"expected loss to return a scalar tensor; got {value!r}")
        return value.reshape(())

    def _negative_log_likelihood(self, batch: Any) -> Tensor:
        model = self._map(self.context(batch))
        try:
            return -model.log_prob(self._data(batch)).mean()
        except NotApplicable as error:
            raise ValueError(
                f"expected a loss, because {model.name} has no likelihood of its own ({error}): "
                "pass loss=lambda model, batch: ..., the loss that it was trained with"
            ) from error

    def _assumes_normal(self) -> bool:
        """Whether the loss is the likelihood of a model that has no base of its own."""
        return self.loss is None and self._audited_map().base() is None

    def _loss_at_kept(self) -> float:
        """Mean loss at the first batches in eval mode, with the same random numbers each time."""
        device = next(self.model.parameters()).device
        with preserve_state(self.model), seeded(self.settings.seed, device):
            self.model.eval()
            values = [self._task_loss(batch).item() for batch in self.kept]
        return sum(values) / len(values)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _advice(report: AuditReport, settings: _Settings, *, trained: bool) -> tuple[str, ...]:
    """What to try where a use is still open."""
    left = {use.use for use in open_uses(report)}
    if not left:
        return ()
    advice = []
    if trained:
        advice.append(f"Train longer, if the figures still fall: steps={3 * settings.steps}.")
    advice += [text for text in report.advice if "ig.stabilize" not in text]
    if "reconstruction" in left:
        advice.append(EXACT)
    return tuple(advice)

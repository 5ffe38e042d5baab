r"""Repairs of the models of the census that fail: what each costs, and what it cures.

    inn-guard bench census.repairs --preset smoke
    inn-guard bench census.repairs --rounds 0 --out benchmarks/results/census/repairs_round_0

Every trained float32 model of the committed census with a failing use belongs to the group of its
flow, data, depth and steps; a round takes one seed of each group. The model is trained again, and
repaired in four ways:

* ``regularized``: trained anew for as many steps, with finite differences at every fifth step, of
  the inverse at draws where sampling fails, and of both directions at the data where anything else
  does;
* ``stabilize``: ``ig.stabilize`` for a tenth of the steps;
* ``raise_precision``: ``ig.raise_precision``, without any training;
* ``exact``: ``ig.exact``, which restores held-out rows. It has no part in draws or densities.

Verdicts before and after are those of the level quick, of the same held-out rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor, nn

import inn_guard as ig
from benchmarks.census.data import load
from benchmarks.census.flows import FLOWS
from benchmarks.census.rows import CHECKED_USES, FAILED, PASSED, failed, read_parts
from benchmarks.census.training import Training, bits, seeded
from benchmarks.census.truth import truths
from benchmarks.common.runner import Row, collect, main
from inn_guard.report.audit_report import AuditReport
from inn_guard.training.regularizer_hook import Regularizer

__all__ = ["PRESETS", "REPAIRS", "Config", "failing_models", "run"]

COEFFICIENT = 1.0
SHARE = 0.1  #: of the training's steps, for stabilize
LOOKS = 4  #: audits during stabilize
GROUP = ["flow", "data", "depth", "steps"]


@dataclass(frozen=True)
class Config:
    """Which failing models are repaired, and how all were trained."""

    rounds: tuple[int, ...] = (0,)  # 0 takes the first seed of every group, 1 the second
    models: tuple[str, ...] = ()  # "flow / data / depth / seed / steps", in place of the rounds
    flows: tuple[str, ...] = ()  # default: all
    sets: tuple[str, ...] = ()  # default: all
    deepest: int = 16  # deeper models are left out
    width: int = 64
    batch_size: int = 64
    learning_rate: float = 1e-3
    rows: int = 128


PRESETS = {
    "smoke": {"models": ("our Glow / moons / 2 / 0 / 4",), "width": 8, "rows": 16},
    "cpu": {},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One model of the census."""

    flow: str
    data: str
    depth: int
    seed: int
    steps: int
    weights: str = ""  #: checksum of the committed row

    @property
    def key(self) -> str:
        """Unique among the models."""
        return f"{self.flow} / {self.data} / {self.depth} / {self.seed} / {self.steps}"


@dataclass(frozen=True)
class Trained:
    """A failing model and what its repairs need."""

    config: Config
    case: Case
    flow: nn.Module
    train: Tensor
    test: Tensor
    seconds: float  #: of processor time, that the training took
    before: AuditReport

    @property
    def failing(self) -> tuple[str, ...]:
        """The uses that fail, of those that have a truth."""
        return tuple(u for u in CHECKED_USES if self.before.uses[u].verdict.label in FAILED)


@dataclass(frozen=True)
class Outcome:
    """What a repair made.

    Attributes:
        verdicts: use -> (verdict, figure) of the repaired model.
        model: the repaired model, if there is one.
        cost: column -> what the repair took.
    """

    verdicts: Mapping[str, tuple[str, float]]
    model: nn.Module | None = None
    cost: Row = field(default_factory=dict)


def failing_models(frame: pd.DataFrame) -> pd.DataFrame:
    """Trained float32 models with a failing use; the column round numbers the seeds of a group."""
    rows = frame[(frame["dtype"] == "float32") & (frame["steps"] > 0) & (frame["raised"] == "")]
    any_fails = pd.concat([failed(rows, use) for use in CHECKED_USES], axis=1).any(axis=1)
    bad = rows[any_fails].sort_values([*GROUP, "seed"])
    return bad.assign(round=bad.groupby(GROUP).cumcount())


def cases(config: Config) -> dict[str, Case]:
    """The models named, or those of the rounds."""
    if config.models:
        return {name: _parsed(name) for name in config.models}
    rows = failing_models(read_parts())
    rows = rows[rows["round"].isin(config.rounds) & (rows["depth"] <= config.deepest)]
    if config.flows:
        rows = rows[rows["flow"].isin(config.flows)]
    if config.sets:
        rows = rows[rows["data"].isin(config.sets)]
    found = [
        Case(row.flow, row.data, row.depth, row.seed, row.steps, row.weights)
        for row in rows.sort_values("depth", kind="stable").itertuples()
    ]
    return {case.key: case for case in found}


def _parsed(name: str) -> Case:
    flow, data, *numbers = name.split(" / ")
    depth, seed, steps = map(int, numbers)
    return Case(flow, data, depth, seed, steps)


# ---------------------------------------------------------------------------------- the repairs


def trained(
    config: Config, case: Case, penalties: tuple[Regularizer, ...] = ()
) -> tuple[nn.Module, Tensor, Tensor, float]:
    """(flow, training rows, held-out rows, seconds of processor time of the training)."""
    split = load(case.data, root="", held_out=config.rows, seed=case.seed)
    kind = FLOWS[case.flow]
    train, test = split.train, split.test
    if not kind.images:
        train, test = train.flatten(1), test.flatten(1)
    with seeded(case.seed):
        flow = kind.build(tuple(train.shape[1:]), case.depth, config.width)
        training = Training(
            flow,
            train,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            seed=case.seed,
            penalties=penalties,
        )
        start = time.process_time()
        training.go_on(case.steps)
        seconds = time.process_time() - start
    return flow, train, test, seconds


def regularized(model: Trained) -> Outcome:
    """Trained anew with penalties that belong to the failing uses."""
    penalties: list[Regularizer] = []
    if "sampling" in model.failing:
        penalties.append(
            ig.FiniteDifferences(
                COEFFICIENT, direction="inverse", at="prior", form="log", seed=model.case.seed
            )
        )
    if set(model.failing) - {"sampling"}:
        penalties.append(ig.FiniteDifferences(COEFFICIENT, form="log", seed=model.case.seed))
    flow, _, test, seconds = trained(model.config, model.case, tuple(penalties))
    cost = {"repair_steps": model.case.steps, "time_factor": seconds / model.seconds}
    return Outcome(verdicts(audited(flow, test)), flow, cost)


def stabilized(model: Trained) -> Outcome:
    """Fine-tuned for at most a tenth of the steps."""
    steps = max(1, round(SHARE * model.case.steps))
    start = time.process_time()
    steady = ig.stabilize(
        model.flow,
        _batches(model.train, model.config.batch_size, model.case.seed),
        loss=_negative_log_likelihood,
        uses=model.failing,
        x=model.test,
        steps=steps,
        every=max(1, steps // LOOKS),
        learning_rate=model.config.learning_rate,
        seed=model.case.seed,
    )
    seconds = time.process_time() - start
    cost = {"repair_steps": steady.kept_step, "time_factor": seconds / model.seconds}
    return Outcome(verdicts(audited(steady.model, model.test)), steady.model, cost)


def raised(model: Trained) -> Outcome:
    """Layers in float64 as far as needed; its times are those of a pass over the model before."""
    mixed = ig.raise_precision(model.flow, model.test, uses=model.failing, seed=model.case.seed)
    summary = mixed.summary
    assert summary is not None
    cost = {
        "raised_layers": len(summary.raised),
        "layers": summary.layers,
        "time_factor": (summary.forward_time + summary.inverse_time) / 2,
    }
    return Outcome(verdicts(audited(mixed, model.test)), mixed, cost)


def exact(model: Trained) -> Outcome:
    """Held-out rows through integers and back; its time is that of both ways in floats."""
    coder = ig.exact(model.flow)
    coder.encode(model.test)  # the first batch takes longer, for it is checked
    start = time.process_time()
    z, kept = coder.encode(model.test)
    back = coder.decode(z, kept)
    seconds = time.process_time() - start
    own = ig.wrap(model.flow)
    with torch.no_grad():
        start = time.process_time()
        own.inverse(own(model.test))
        plain = time.process_time() - start
    found = dict(verdicts(model.before))
    found["reconstruction"] = ("stable", 0.0)
    if not torch.equal(back, model.test):
        found["reconstruction"] = ("unstable", math.inf)
    stored = sum(layer.reason != "" for layer in kept.layers)
    cost = {
        "kept_bits": kept.bits_per_dimension,
        "stored_layers": stored,
        "time_factor": seconds / plain,
    }
    return Outcome(found, None, cost)


REPAIRS: dict[str, Callable[[Trained], Outcome]] = {
    "regularized": regularized,
    "stabilize": stabilized,
    "raise_precision": raised,
    "exact": exact,
}


def _negative_log_likelihood(flow: nn.Module, batch: Tensor) -> Tensor:
    return -ig.wrap(flow).log_prob(batch).mean()


def _batches(train: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield train[torch.randint(len(train), (size,), generator=generator)]


def audited(flow: nn.Module, x: Tensor) -> AuditReport:
    """The uses that have a truth."""
    return ig.audit(flow, x, level="quick", uses=CHECKED_USES)


def verdicts(report: AuditReport) -> dict[str, tuple[str, float]]:
    """Use -> (verdict, figure)."""
    return {use: (report.uses[use].verdict.label, report.uses[use].figure) for use in CHECKED_USES}


def measure(config: Config, case: Case) -> Iterator[Row]:
    """Train one model, repair it in four ways; a row for each."""
    flow, train, test, seconds = trained(config, case)
    before = audited(flow, test)
    model = Trained(config, case, flow, train, test, seconds, before)
    common: Row = {
        "flow": case.flow,
        "data": case.data,
        "depth": case.depth,
        "seed": case.seed,
        "steps": case.steps,
        "same_weights": before.settings["weights"] == case.weights,
        "failing": " ".join(model.failing),
        "bits_before": bits(flow, test),
    }
    for use, (label, figure) in verdicts(before).items():
        common |= {f"{use}_before": label, f"{use}_before_figure": figure}
    for name, repair in REPAIRS.items():
        yield {**common, "repair": name, **_repaired(model, repair)}


def _repaired(model: Trained, repair: Callable[[Trained], Outcome]) -> Row:
    """What one repair did; a repair that raises is a row that says so."""
    if not model.failing and model.case.weights:
        return {"refused": "the model does not fail when it is trained again"}
    try:
        outcome = repair(model)
    except Exception as error:  # a benchmark of hours goes on
        return {"refused": f"{type(error).__name__}: {error}"[:200]}
    row: Row = {"refused": "", **outcome.cost, "bits_after": bits(model.flow, model.test)}
    now_good = {use for use, (label, _) in outcome.verdicts.items() if label in PASSED}
    now_bad = {use for use, (label, _) in outcome.verdicts.items() if label in FAILED}
    row["cured"] = " ".join(use for use in model.failing if use in now_good)
    row["broken"] = " ".join(u for u in CHECKED_USES if u in now_bad and u not in model.failing)
    for use, (label, figure) in outcome.verdicts.items():
        row |= {f"{use}_after": label, f"{use}_after_figure": figure}
    if outcome.model is not None:
        row["bits_after"] = bits(outcome.model, model.test)
        for use, truth in truths(outcome.model, model.test).items():
            row |= {f"true_{use}_after": truth.answer, f"true_{use}_after_figure": truth.figure}
    return row


def run(config: Config) -> pd.DataFrame:
    """Four rows per model."""
    return collect(config, cases(config), measure)


if __name__ == "__main__":
    main(__name__)

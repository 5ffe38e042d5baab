"""Training a classifier explodes the inverse of an affine INN; either regularizer prevents it.

Real digits, three nets (ours, FrEIA's and nflows' affine couplings), each without regularizer, with
bi-directional finite differences (FD) and with the normalizing-flow loss (NF), audited on held-out
digits while they train.

    inn-guard bench exploding_inverses.digits_classifier --preset cpu --reports demo-report

This differs from the paper (Behrmann et al., 2021, table 10) in: digits instead of CIFAR-10,
vectors and MLPs instead of images and convolutions, Adam 1e-3 instead of 1e-4, and gradients
clipped to norm 100. The clipping is for FrEIA's blocks: their fresh net has a condition number of
1e7 already (ours 5, nflows' 4), and its first finite-difference penalties are so large that without
clipping training ends at 64 % accuracy, still unstable.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import math
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

import inn_guard as ig
from benchmarks.common.digits import Digits, digits
from benchmarks.common.fit import Batch, FitSettings, fit
from benchmarks.common.runner import Row, main
from benchmarks.exploding_inverses.digits_nets import NETS, Classifier
from benchmarks.exploding_inverses.digits_report import draw, final_table, write_index
from benchmarks.exploding_inverses.stability import spectrum_row
from inn_guard.audits.jacobian_spectrum import jacobian_spectrum
from inn_guard.training.regularizer_hook import Regularizer
from inn_guard.training.regularizers import FiniteDifferences, NormalizingFlowLoss

__all__ = ["PRESETS", "Config", "draw", "run"]


@dataclass(frozen=True)
class Config:
    """One training per net and regularizer."""

    nets: tuple[str, ...] = tuple(NETS)
    regularizers: tuple[str, ...] = ("none", "FD", "NF")
    epochs: int = 120  # paper: 200
    batch_size: int = 128  # as in the paper
    learning_rate: float = 1e-3  # paper: 1e-4, decayed
    clip: float = 100.0  # norm of the gradient; paper: none
    blocks: int = 16  # paper: 3 levels of 16
    width: int = 128  # as in the paper (channels)
    fd: float = 1e-3  # coefficient; the paper's grid is 1e-3, 1e-4, 5e-5
    fd_fraction: float = 1.0  # share of the batch that FD penalises; paper: all
    nf: float = 1e-4  # coefficient; the paper's grid is 1e-3, 1e-4, 1e-5
    every: int = 10  # K; the paper's are 1, 5, 10
    checkpoints: int = 4  # audits of each run, evenly spaced, the last one at the end
    audited: int = 128  # held-out digits in each audit
    seed: int = 0
    workers: int = 2  # processes, of one thread each
    reports: str = ""  # folder for one HTML page per run and an index; "" writes none


PRESETS = {
    # Seconds: two small nets, one epoch
    "smoke": {
        "nets": ("plain", "nflows"), "epochs": 1, "blocks": 2, "width": 8, "checkpoints": 1,
        "audited": 16, "workers": 1,
    },
    "cpu": {},  # four minutes on two cores
}  # fmt: skip


def run(config: Config) -> pd.DataFrame:
    """One row per run and checkpoint."""
    cases = [(net, regularizer) for net in config.nets for regularizer in config.regularizers]
    rows: dict[tuple[str, str], list[Row]] = {}
    with tqdm(total=len(cases), desc="training and auditing", unit="run", disable=None) as bar:
        for case, result in _measured(config, cases):
            rows[case] = result
            bar.update()
            bar.write(_line(result[-1]))
    frame = pd.DataFrame(itertools.chain.from_iterable(rows[case] for case in cases))
    print(final_table(frame).to_string(index=False))
    if config.reports:
        print(f"reports: {write_index(frame, Path(config.reports))}")
    return frame


def _line(row: Row) -> str:
    words = []
    for key, value in row.items():
        if isinstance(value, float):
            words.append(f"{key} {value:.3g}")
        else:
            words.append(str(value))
    return " ".join(words)


def _measured(
    config: Config, cases: list[tuple[str, str]]
) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    """Every case with its rows, in the order in which they are finished."""
    if config.workers == 1:
        for case in cases:
            yield case, measure(config, *case)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(config.workers, mp_context=spawn) as pool:
        futures = {pool.submit(_quietly, config, *case): case for case in cases}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()


def _quietly(config: Config, net: str, regularizer: str) -> list[Row]:
    """In a worker: one thread, and no progress bars of its own."""
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(io.StringIO()):
        return measure(config, net, regularizer)


def measure(config: Config, net: str, regularizer: str) -> list[Row]:
    """Train one net; one row per checkpoint."""
    data = digits(seed=config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Classifier(NETS[net](config.blocks, config.width))
    hook = ig.RegularizerHook(model.inn, _regularizers(config)[regularizer], every=config.every)

    def loss(batch: Batch) -> torch.Tensor:
        x, labels = batch.tensors
        z = model.inn(x)
        return nn.functional.cross_entropy(model.head(z), labels) + hook(x, z=z)

    rows: list[Row] = []

    def checkpoint(step: int) -> float:
        page = None
        if config.reports and step == steps:
            page = Path(config.reports) / f"{net}_{regularizer}.html"
        row = audited(model, data, config, page)
        rows.append({"net": net, "regularizer": regularizer, "step": step, **row})
        return 1 - row["test_accuracy"]

    steps = config.epochs * (len(data.train_images) // config.batch_size)
    settings = FitSettings(
        steps=steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        clip=config.clip,
        validate_every=max(1, steps // config.checkpoints),
        seed=config.seed,
    )
    try:
        images = (data.train_images, data.train_labels)
        fit(model, loss, images, settings=settings, validate=checkpoint)
    except FloatingPointError:  # a loss of NaN ends the run, and what it left behind is a result
        checkpoint(steps)
    return rows


def _regularizers(config: Config) -> dict[str, list[Regularizer]]:
    return {
        "none": [],
        "FD": [FiniteDifferences(config.fd, fraction=config.fd_fraction, seed=config.seed)],
        "NF": [NormalizingFlowLoss(config.nf)],
    }


def audited(model: Classifier, data: Digits, config: Config, page: Path | None) -> Row:
    """Accuracy on all held-out digits; audits on the first ``audited`` of them.

    All audits are made if there is a page to write.
    """
    x = data.test_images[: config.audited]
    model.eval()
    with torch.no_grad():
        correct = model(data.test_images).argmax(1) == data.test_labels
    report = ig.audit(model.inn, x, checks=_checks(config))
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        whole = ig.audit(
            model.inn, x, checks=["log_det", "layer_blame", "precision", "gradient_angle"]
        )
        results = (*report.results, *whole.results[1:])
        title = page.stem.replace("_", " couplings, regularizer ")
        dataclasses.replace(report, results=results, model=title).to_html(page)
    trip, spectrum = report["reconstruction"], report["jacobian_spectrum"]
    errors = trip.per_sample["max_error"].double().nan_to_num(math.inf, posinf=math.inf)
    return {
        "test_accuracy": correct.float().mean().item(),
        "worst_error": trip.values["max_error"],
        "median_error": errors.median().item(),
        **spectrum_row(spectrum),
        "verdict": report.verdict.label,
    }


def _checks(config: Config) -> list[str | functools.partial]:
    """The round trip, and the Jacobian of every sample; the level "standard" takes 32."""
    return ["reconstruction", functools.partial(jacobian_spectrum, samples=config.audited)]


if __name__ == "__main__":
    main(__name__)

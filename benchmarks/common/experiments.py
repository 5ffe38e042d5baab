"""The table of experiments, for ``inn-guard bench`` and the README of this folder.

python -m benchmarks.common.experiments        # writes the table into README.md
"""

from __future__ import annotations

import importlib
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from inn_guard.execution.files import atomic_write

__all__ = ["EXPERIMENTS", "Experiment", "find", "listing", "readme_table", "write_readme"]

README = Path(__file__).parents[1] / "README.md"
REFERENCE = Path(__file__).parents[1] / "reference"
HEAD = ("experiment", "claim", "paper")


@dataclass(frozen=True)
class Experiment:
    """One script.

    Attributes:
        name: folder.script, as typed after ``inn-guard bench``.
        claim: what it measures.
        paper: whose table or figure that is.
        reference: file in ``reference/`` with the paper's numbers; "" where there are none.
    """

    name: str
    claim: str
    paper: str = ""
    reference: str = ""

    @property
    def module(self) -> Any:
        """The script's module, as described in ``runner.py``."""
        return importlib.import_module(f"benchmarks.{self.name}")

    @property
    def stem(self) -> str:
        """What its results are called: injflow_table1."""
        return self.name.replace(".", "_")

    def published(self) -> pd.DataFrame:
        """The paper's numbers; empty where there are none."""
        if not self.reference:
            return pd.DataFrame()
        return pd.read_csv(REFERENCE / self.reference)


EXPERIMENTS = (
    Experiment(
        "exploding_inverses.digits_classifier",
        "training explodes the inverse of an affine INN, FD or NF keeps it at equal accuracy",
        "Behrmann 2021, table 10",
        "cifar10_classifiers_table9.csv",
    ),
    Experiment(
        "exploding_inverses.cifar10_classifiers",
        "the same on CIFAR-10: couplings, mixings, regularizers and their coefficients",
        "Behrmann 2021, tables 9, 10, figures 14 to 17",
        "cifar10_classifiers_table9.csv",
    ),
    Experiment(
        "exploding_inverses.regularizer_cost",
        "what finite differences every 1, 5 or 10 steps add to an epoch",
        "Behrmann 2021, table 11",
        "regularizer_cost_table11.csv",
    ),
    Experiment(
        "exploding_inverses.gradient_angles",
        "memory-saving gradients deviate as training explodes the inverse; FD or NF prevent it",
        "Behrmann 2021, figure 18",
    ),
    Experiment(
        "exploding_inverses.glow_likelihood",
        "Glow by maximum likelihood: is its inverse there on data, samples and other images",
        "Behrmann 2021, figures 9, 10, table 5",
    ),
    Experiment(
        "exploding_inverses.dequantization",
        "valid training samples whose reconstruction fails, on two affine flows and a residual one",
        "Behrmann 2021, figures 11, 12",
    ),
    Experiment(
        "exploding_inverses.attack_growth",
        "what the attack finds in affine flows against their depth and training",
        "Behrmann 2021, figure 11",
    ),
    Experiment(
        "exploding_inverses.checkerboard",
        "three flows of a 2-D checkerboard: where the inverse fails, densities, certified bounds",
        "Behrmann 2021, figures 2, 7, 8",
    ),
    Experiment(
        "exploding_inverses.toy_regression",
        "regression onto a line flattens the plane; the normalizing-flow loss keeps the inverse",
        "Behrmann 2021, figure 13",
    ),
    Experiment(
        "exploding_inverses.flowgan",
        "Glow by likelihood, as a GAN's generator, and both: likelihood, samples, inverse on data",
        "Behrmann 2021, table 13",
        "flowgan_table13.csv",
    ),
    Experiment(
        "exploding_inverses.share_of_batch",
        "finite differences on a share of the batch, against all of it",
    ),
    Experiment(
        "exploding_inverses.lost_draws",
        "a penalty on the inverse alone repairs lost draws, one on both directions does not",
    ),
    Experiment(
        "exploding_inverses.adaptive_coefficient",
        "an adaptive coefficient holds a target condition number without a search",
    ),
    Experiment(
        "exploding_inverses.audit_hook_cost",
        "the default AuditHook every 100 steps costs less than one per cent of training",
    ),
    Experiment(
        "precision.rounding_forecast",
        "the forecast of the round-trip error in five number formats, 128 stacks of layers",
    ),
    Experiment(
        "attacks.strategies",
        "which search finds the worst dequantized samples at equal cost",
        "Behrmann 2021, appendix E",
    ),
    Experiment(
        "repair.classifiers",
        "exploded classifiers invert again after a tenth of their training's steps",
        "Behrmann 2021, tables 9, 10",
    ),
    Experiment(
        "repair.density_flows",
        "trained flows that lose draws pass after a tenth of their training's steps",
    ),
    Experiment(
        "census.census",
        "which default flows can be trusted for what: five uses, depths, training, precisions",
    ),
    Experiment(
        "census.repairs",
        "models of the census that fail, repaired in four ways: what it costs, what it cures",
    ),
    Experiment(
        "census.price",
        "penalties and hard bounds against likelihood and condition number, three data sets",
    ),
    Experiment("attacks.step_cost", "what one step of the attack costs, in forward passes"),
    Experiment("lipschitz.soundness", "certificates against 40-digit truth and dense matrices"),
    Experiment("lipschitz.adversary", "bounds of altered models against gradient ascent"),
    Experiment("lipschitz.tightness", "bounds of random blocks over the largest ratios found"),
    Experiment(
        "lipschitz.toys",
        "2-D flows of 16 blocks bracketed by branch and bound",
        "Behrmann 2021, table 3, appendix C",
    ),
    Experiment(
        "lipschitz.depth",
        "Table 3, certified bounds and witnesses against depth",
        "Behrmann 2021, table 3",
    ),
    Experiment(
        "lipschitz.convolutions",
        "a 16-block convolutional flow on 3x32x32",
        "Behrmann 2021, table 3",
    ),
    Experiment(
        "performance.extremes",
        "extreme singular values to 1 %, against row-by-row autograd and numpy's SVD",
    ),
    Experiment("performance.goals", "every figure of performance beside its goal"),
    Experiment(
        "performance.spectra_promise",
        "runs in which some sample's extreme singular value is off by 1 %, and their speed",
    ),
    Experiment("performance.audits", "what an audit costs in forward passes, and what the import"),
    Experiment(
        "performance.looks", "singular values during training, from the vectors of the last look"
    ),
    Experiment(
        "performance.ill_conditioned",
        "the smallest singular value at condition numbers of 1e8 to 1e15, in float32",
    ),
    Experiment(
        "performance.full_jacobian", "full Jacobian and spectrum against row-by-row autograd"
    ),
    Experiment(
        "performance.foreign", "extreme singular values of other libraries' nets, layer by layer"
    ),
    Experiment("performance.growth", "growth with depth and dimension"),
    Experiment("performance.processes", "one audit on one, two and four processes"),
    Experiment("performance.scale", "audits within a memory budget, up to 196,608 dimensions"),
    Experiment(
        "performance.memory_saving",
        "memory, time, gradient error of a training step; stored activations, checkpoints, MemCNN",
    ),
    Experiment(
        "performance.regularizer_cost",
        "a regularized training step against one without",
        "Behrmann 2021, table 11",
        "regularizer_cost_table11.csv",
    ),
    Experiment(
        "exact.lossless",
        "8-bit images through trained nets and back without a wrong bit, exploded inverses too",
    ),
    Experiment(
        "exact.round_trips",
        "10 million values through every model of the test suite and back in exact mode",
    ),
    Experiment(
        "injflow.table1",
        "InjFlow and its baselines",
        "Kumar 2020, table 1",
        "injflow_table1_fid.csv",
    ),
    Experiment(
        "nif.tables",
        "a flow against the same flow with a noisy injective prior; noise s and temperature",
        "Cunningham 2020, tables 1, 2",
        "nif_tables.csv",
    ),
    Experiment(
        "aef.against_vae",
        "autoencoders within flows against identical VAEs",
        "Silvestri 2023, table 1",
        "aef_tables.csv",
    ),
    Experiment(
        "aef.curves", "likelihood of AEFs and of identical VAEs against the steps of training"
    ),
    Experiment(
        "aef.denoising", "denoising by models trained on noisy images", "Silvestri 2023, figure 7"
    ),
)


NAMES = tuple(one.name for one in EXPERIMENTS)


def find(name: str) -> Experiment:
    """The experiment of that name: folder.script, folder_script, or the script if it is unique.

    Raises:
        LookupError: if there is none or more than one.
    """
    found = []
    for one in EXPERIMENTS:
        if name in (one.name, one.stem):
            return one
        if one.name.endswith(f".{name}"):
            found.append(one)
    if len(found) == 1:
        return found[0]
    expected = "the name of an experiment"
    if found:
        expected = f"one of {', '.join(one.name for one in found)}"
    raise LookupError(f"expected {expected}, got {name!r}; inn-guard bench lists them")


def listing() -> str:
    """All experiments with what they measure, as text."""
    width = max(map(len, NAMES)) + 2
    blocks = []
    for one in EXPERIMENTS:
        text = one.claim
        if one.paper:
            text += f" ({one.paper})"
        lines = textwrap.wrap(text, 110 - width)
        blocks.append(f"{one.name:{width}}" + f"\n{'':{width}}".join(lines))
    return "\n".join(blocks)


def readme_table() -> str:
    """The table in Markdown, a row per experiment."""
    rows = [HEAD, ("---",) * len(HEAD)]
    rows += [(f"`{one.name}`", one.claim, one.paper) for one in EXPERIMENTS]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def write_readme() -> None:
    """Put the table in place of the one in README.md."""
    lines = README.read_text(encoding="utf-8").splitlines()
    table = readme_table().splitlines()
    first = after = lines.index(table[0])
    while after < len(lines) and lines[after].startswith("|"):
        after += 1
    lines[first:after] = table
    with atomic_write(README) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_readme()

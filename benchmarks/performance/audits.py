"""What audits of a flow cost, in its own forward passes, and what the import of the package adds.

The flow has 16 blocks of nflows (a permutation and an affine coupling each), 8 dimensions, and is
trained for a moment. Processor time of one thread. Every ratio is one audit over forward passes of
the batch that are timed right before and after it; medians of the rounds. An audit counts whole:
with the looks at state and batch, and what the garbage collector does meanwhile.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import AffineCouplingTransform, CompositeTransform, RandomPermutation
from torch import Tensor, nn

import inn_guard as ig
from benchmarks.common.runner import Row, collect, main
from benchmarks.performance.measurement import processor_seconds

ROOT = Path(__file__).parents[2]
#: case -> forward passes that it may cost; of the import, the share of torch's time
GOALS = {"dry run": 10.0, "quick": 200.0, "standard": 350.0, "full": 2000.0, "import": 0.1}


@dataclass(frozen=True)
class Config:
    """The flow and how often it is audited."""

    blocks: int = 16
    dimension: int = 8
    hidden: int = 64  # width of the couplings' networks
    batch: int = 64
    steps: int = 100  # of training
    rounds: int = 5
    rounds_of_full: int = 1  # of the level "full", which takes as long as all others together
    cases: tuple[str, ...] = tuple(GOALS)


PRESETS = {
    "smoke": {"blocks": 2, "hidden": 8, "steps": 2, "rounds": 1, "cases": ("dry run", "quick")},
    # a minute of one idle core; without the level full, which takes another
    "short": {"rounds": 3, "cases": ("dry run", "quick", "standard")},
    "cpu": {},  # the claim's sizes
}


def flow_and_data(config: Config) -> tuple[nn.Module, Tensor]:
    """The trained flow, and a batch of its data: 16 Gaussians of deviation 0.05."""
    torch.manual_seed(0)
    steps: list[nn.Module] = []
    for _ in range(config.blocks):
        mask = torch.arange(config.dimension) % 2
        steps.append(RandomPermutation(config.dimension))
        steps.append(AffineCouplingTransform(mask, lambda n, m: ResidualNet(n, m, config.hidden)))
    flow = Flow(CompositeTransform(steps), StandardNormal([config.dimension]))
    centres = torch.randn(16, config.dimension)

    def draw(count: int) -> Tensor:
        noise = 0.05 * torch.randn(count, config.dimension)
        return centres[torch.randint(16, (count,))] + noise

    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    for _ in range(config.steps):
        optimizer.zero_grad()
        (-flow.log_prob(draw(256)).mean()).backward()
        optimizer.step()
    return flow.eval(), draw(config.batch)


def measure(config: Config, case: str) -> list[Row]:
    """One row."""
    torch.set_num_threads(1)
    cost = import_share(config.rounds) if case == "import" else forward_passes(config, case)
    unit = "of torch's import" if case == "import" else "forward passes"
    return [{"cost": cost, "goal": GOALS[case], "unit": unit, "met": cost <= GOALS[case]}]


def forward_passes(config: Config, case: str) -> float:
    """The audit's time over that of a forward pass, median of the rounds."""
    flow, x = flow_and_data(config)
    model = ig.wrap(flow)
    settings = {"dry_run": True} if case == "dry run" else {"level": case}

    def audit() -> object:
        return ig.audit(flow, x, progress=False, **settings)

    audit()  # what is imported and compiled once is no cost of an audit
    ratios = []
    for _ in range(config.rounds_of_full if case == "full" else config.rounds):
        before = seconds_of_a_pass(model, x)
        seconds, _ = processor_seconds(audit)
        ratios.append(2 * seconds / (before + seconds_of_a_pass(model, x)))
    return statistics.median(ratios)


@torch.no_grad()
def seconds_of_a_pass(model: nn.Module, x: Tensor, repeats: int = 30) -> float:
    seconds, _ = processor_seconds(lambda: [model(x) for _ in range(repeats)])
    return seconds / repeats


def import_share(rounds: int) -> float:
    """What ``import inn_guard`` adds to ``import torch``, as a share of it; in new processes."""
    seconds: dict[str, list[float]] = {"import torch": [], "import torch, inn_guard": []}
    for _ in range(2 * rounds + 1):
        for statement, found in seconds.items():
            before = os.times()
            subprocess.run([sys.executable, "-c", statement], check=True, cwd=ROOT)
            after = os.times()
            found.append(
                after.children_user
                + after.children_system
                - before.children_user
                - before.children_system
            )
    torch_alone, both = (statistics.median(found[1:]) for found in seconds.values())
    return max(0.0, both / torch_alone - 1)


def run(config: Config) -> pd.DataFrame:
    frame = collect(config, config.cases, measure)
    print(frame.to_string(index=False))
    return frame


if __name__ == "__main__":
    main(__name__)

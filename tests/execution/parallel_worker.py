"""Each of two processes of tests/execution/test_parallel.py; one JSON file of answers per rank."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import inn_guard as ig
from inn_guard.audits.dequantization_attack import Restarts, SpectralAscent
from inn_guard.audits.dequantization_attack.audit import dequantization_attack
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.execution.parallel import WorkSharing, register_fsdp_methods
from inn_guard.jacobian.dense import composed_jacobian
from inn_guard.jacobian.singular_values import full_jacobian
from inn_guard.layers import MLP, AdditiveCoupling
from inn_guard.layers.chain import Chain
from tests.cases.toys import Linear, Warp

CHECKS = (
    "reconstruction",
    "log_det",
    "jacobian_spectrum",
    "layer_blame",
    "precision",
    "gradient_angle",
    "full_spectrum",
    functools.partial(
        dequantization_attack, strategy=Restarts(3, SpectralAscent(budget=40)), samples=3
    ),
)
STEPS = 4


def model() -> Chain:
    generator = torch.Generator().manual_seed(5)
    matrix = torch.eye(6, dtype=torch.float64) + 0.3 * torch.randn(
        6, 6, generator=generator, dtype=torch.float64
    )
    return Chain(Warp(6), Linear(matrix), Warp(6, seed=1))


def couplings() -> Chain:
    torch.manual_seed(0)
    return Chain(
        *(AdditiveCoupling.on_halves(6, lambda kept, out: MLP([kept, 4, out])) for _ in range(2))
    )


def data(batch: int = 7, seed: int = 3) -> Tensor:
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regularizers(group=None) -> list:
    return [ig.FiniteDifferences(1e-2, seed=3, group=group)]


def train(net: nn.Module, hook: ig.RegularizerHook, batches: list[Tensor]) -> dict[str, list]:
    """A few steps; gradients of every step, and which steps the hook found due."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    gradients, due = [], []
    for x in batches:
        z = net(x)
        penalty = hook(x, z=z)
        due.append(penalty.requires_grad)
        optimizer.zero_grad()
        (z.square().mean() + penalty).backward()
        gradients.append([_whole(p.grad).flatten().tolist() for p in net.parameters()])
        optimizer.step()
    return {"gradients": gradients, "due": due}


def _whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def batches(part: slice) -> list[Tensor]:
    return [data(8, seed=10 + step)[part] for step in range(STEPS)]


def message(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _raises_on_rank_1() -> int:
    if dist.get_rank() == 1:
        raise NotApplicable("one of them cannot")
    return 0


def _raises_what_cannot_be_sent() -> int:
    class Local(Exception):
        pass

    if dist.get_rank() == 1:
        raise Local("not to be pickled")
    return 0


def ddp(mine: slice, group) -> dict[str, list]:
    net = model()
    wrapped = DistributedDataParallel(net, process_group=group)
    return train(wrapped, ig.RegularizerHook(net, regularizers(group), every=2), batches(mine))


def fsdp(mine: slice, group) -> dict[str, list]:
    net = model()
    for layer in net.layers():
        fully_shard(layer)
    fully_shard(net)
    return train(
        net,
        ig.RegularizerHook(register_fsdp_methods(net), regularizers(group), every=2),
        batches(mine),
    )


def spectrum(net: Chain, group) -> dict[str, list]:
    """All singular values of one sample, and the rows or columns that this process formed."""
    formed = []

    def composed(part, x, *, columns):
        formed.append(len(columns))
        return composed_jacobian(part, x, columns=columns)

    def full(function, x, *, rows):
        formed.append(len(rows))
        return full_jacobian(function, x, rows=rows)

    module = sys.modules["inn_guard.audits.full_spectrum"]
    with (
        mock.patch.object(module, "composed_jacobian", composed),
        mock.patch.object(module, "full_jacobian", full),
    ):
        report = ig.audit(net, data(1), checks=["full_spectrum"], group=group)
    return {
        "formed": formed,
        "values": report["full_spectrum"].per_sample["singular_values"].tolist(),
    }


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    group = dist.group.WORLD
    shares = WorkSharing(group)
    rows = torch.arange(5)
    mine = slice(4 * rank, 4 * rank + 4)
    answers = {
        "report": json.loads(ig.audit(model(), data(), checks=CHECKS, group=group).to_json()),
        "few": json.loads(
            ig.audit(model(), data(1), checks=CHECKS[:3], group=group, memory=1e4).to_json()
        ),
        "dry": ig.audit(model(), data(), group=group, dry_run=True)["dry_run"].settings[
            "processes"
        ],
        "composed": spectrum(couplings(), group),
        "rows": spectrum(model(), group),
        "mapped": shares.map(rows, lambda part: (10.0 * part, part), at_most=1)[0].tolist(),
        "dealt": shares.map_items("abc", lambda letter: f"{letter}{rank}"),
        "other data": message(
            lambda: ig.audit(model(), data(seed=rank), checks=["reconstruction"], group=group)
        ),
        "raised": message(lambda: shares.all_gather(_raises_on_rank_1)),
        "local": message(lambda: shares.all_gather(_raises_what_cannot_be_sent)),
        "ddp": ddp(mine, group),
        "fsdp": fsdp(mine, group),
    }
    (folder / f"{rank}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

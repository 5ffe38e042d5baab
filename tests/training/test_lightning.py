"""The Lightning callback: the numbers of a plain loop, on schedule, logged."""

from __future__ import annotations

import copy
import importlib
import logging
import warnings
from pathlib import Path

import normflows as nf
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import inn_guard as ig
from tests.docs.blocks import blocks


def _import_lightning():
    """Lightning, also with a torchvision (MemCNN requires one) that was built for another torch.

    Lightning's metrics import torchvision, which fails at operators that its own library defines.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        fragment = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        warnings.simplefilter("ignore")
    return importlib.import_module("lightning.pytorch")


pl = _import_lightning()
from inn_guard.training.lightning import StabilityCallback  # noqa: E402

STEPS, FEATURES = 12, 4


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def flow() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = []
    for _ in range(3):
        layers += [
            nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 16, 4])),
            nf.flows.Permute(FEATURES),
        ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(FEATURES), layers).double()


def data() -> torch.Tensor:
    return torch.randn(8 * STEPS, FEATURES, generator=torch.Generator().manual_seed(1))


def penalties(model: torch.nn.Module) -> ig.RegularizerHook:
    return ig.RegularizerHook(model, [ig.FiniteDifferences(1e-2)], every=3)


class Module(pl.LightningModule):
    def __init__(self, flow: torch.nn.Module) -> None:
        super().__init__()
        self.flow = flow
        self.hook = penalties(flow)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return -ig.wrap(self.flow).log_prob(x).mean() + self.hook(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)

    def train_dataloader(self):
        return DataLoader(TensorDataset(data()), batch_size=8)


def fit(module: Module, *callbacks, **settings) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, precision="64-true", logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        **settings,
    )  # fmt: skip
    trainer.fit(module)
    return trainer


def plain_loop(model: torch.nn.Module) -> list:
    records: list = []
    audit = ig.AuditHook(model, every=4, record=records.append)
    hook = penalties(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for x in data().split(8):
        loss = -ig.wrap(model).log_prob(x).mean() + hook(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        audit(x)
    return records


def test_a_run_gives_the_numbers_of_a_plain_loop():
    module, model = Module(flow()), flow()
    callback = StabilityCallback(lambda module: module.flow, every=4)
    fit(module, callback)
    records = plain_loop(model)
    assert (
        [record.step for record in callback.records]
        == [record.step for record in records]
        == [0, 4, 8]
    )
    for ours, theirs in zip(callback.records, records, strict=True):
        assert ours.row() == theirs.row()
    for ours, theirs in zip(module.flow.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.thorough
def test_training_does_not_notice_the_audits():
    with_audits, without = Module(flow()), Module(flow())
    fit(with_audits, StabilityCallback(lambda module: module.flow, every=2))
    fit(without)
    for ours, theirs in zip(with_audits.parameters(), without.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.thorough
def test_every_number_is_logged():
    module = Module(flow())
    callback = StabilityCallback(lambda module: module.flow, every=5, checks=["reconstruction"])
    trainer = fit(module, callback)
    logged = trainer.callback_metrics
    assert logged["inn_guard/failed"] == 0
    last = callback.records[-1].report["reconstruction"].values["max_error"]
    assert float(logged["inn_guard/reconstruction/max_error"]) == pytest.approx(last, rel=1e-6)


@pytest.mark.thorough
def test_accumulated_batches_are_one_step():
    callback = StabilityCallback(lambda module: module.flow, every=1)
    fit(Module(flow()), callback, accumulate_grad_batches=4)
    assert [record.step for record in callback.records] == [0, 1, 2]


def test_a_batch_may_carry_a_context():
    seen = []

    def check(model, x):
        seen.append(model.context)
        return ig.AUDITS["reconstruction"](model, x)

    module = Module(flow())
    conditional = ig.wrap(encode=lambda x, c: x + c, decode=lambda z, c: z - c)
    callback = StabilityCallback(
        lambda _: conditional, batch=lambda b: (b[0], 2 * b[0]), checks=[check]
    )
    fit(module, callback, limit_train_batches=1)
    assert torch.equal(seen[0], 2 * data()[:8])


def test_actions_are_taken():
    unstable = ig.wrap(encode=lambda x: 2 * x, decode=lambda z: z * torch.nan)
    callback = StabilityCallback(lambda _: unstable, every=1, actions=[ig.actions.RaiseError()])
    with pytest.raises(ig.actions.StabilityError):
        fit(Module(flow()), callback)


@pytest.mark.thorough
def test_a_checkpoint_resumes_the_schedule(tmp_path):
    callback = StabilityCallback(lambda module: module.flow, every=4)
    trainer = fit(Module(flow()), callback, limit_train_batches=6)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=False)["callbacks"]["StabilityCallback"]
    resumed = StabilityCallback(lambda module: module.flow, every=4)
    resumed.load_state_dict(copy.deepcopy(state))
    resumed.on_fit_start(trainer, Module(flow()))
    assert resumed.state_dict() == state
    assert resumed.state_dict()["step"] == 6


def test_the_guides_example_is_such_a_module():
    page = Path(__file__).parents[2] / "docs" / "guides" / "training.md"
    (code,) = [block.code for block in blocks(page) if "LightningModule" in block.code]
    names = {"ig": ig, "torch": torch}
    exec(compile(code, str(page), "exec"), names)
    density = names["Density"](flow())
    assert density.training_step((data()[:8],), 0).requires_grad

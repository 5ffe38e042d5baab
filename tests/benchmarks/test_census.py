"""The census: flows, data, and a truth that tells sound models from broken ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import inn_guard as ig
from benchmarks.census import price, truth
from benchmarks.census.census import is_checked, uses_of
from benchmarks.census.data import DATA, load
from benchmarks.census.flows import FLOWS
from benchmarks.census.training import Training, bits, seeded
from benchmarks.common.image_files import MissingData
from inn_guard.layers.chain import Chain
from inn_guard.layers.linear import InvertibleLinear


@pytest.fixture(autouse=True)
def _as_in_a_benchmark():
    torch.set_default_dtype(torch.float32)


def sample(name: str, *, rows: int = 12) -> Tensor:
    """Rows of the shape that a flow takes: of a table, or images where it takes only these."""
    generator = torch.Generator().manual_seed(0)
    if not FLOWS[name].tables:
        return torch.randn(rows, 1, 8, 8, generator=generator)
    return torch.randn(rows, 4, generator=generator)


def built(name: str, x: Tensor) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = FLOWS[name].build(tuple(x.shape[1:]), 2, 8)
    flow.train()
    with torch.no_grad():
        ig.wrap(flow).log_prob(x)
    return flow.eval()


@pytest.mark.parametrize("name", FLOWS)
def test_the_layers_of_the_truth_are_the_model(name):
    x = sample(name).double()
    flow = built(name, x.float()).double()
    model = ig.wrap(flow)
    steps = truth._both_ways(flow)
    with torch.no_grad():
        z = truth.encode(steps, x)[0]
        torch.testing.assert_close(z, model(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(truth.decode(steps, z), model.inverse(z), rtol=1e-9, atol=1e-9)
    if name != "our NIF":
        with torch.no_grad():
            own = truth._log_prob(flow, x)
            torch.testing.assert_close(own, model.log_prob(x), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("name", ["nflows RealNVP", "FrEIA GLOW", "normflows RealNVP", "zuko MAF"])
def test_fresh_flows_are_fit_for_every_use(name):
    x = sample(name)
    found = truth.truths(built(name, x), x)
    assert {one.answer for one in found.values()} == {"fit"}
    assert found["density"].figure < 1e-3


class Faulty(InvertibleLinear):
    """A linear map with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(4)
        self.fault = fault

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward_and_log_det(x)
        return z, log_det + 0.3 * (self.fault == "log-determinant")

    def inverse(self, z: Tensor) -> Tensor:
        x = super().inverse(z)
        if self.fault == "inverse":
            return 1.05 * x
        if self.fault == "tails":
            return torch.where((z[:, :1] > 2.5), math.nan, x)
        return x


@pytest.mark.parametrize(
    ("fault", "unfit"),
    [
        ("none", set()),
        ("log-determinant", {"density"}),
        ("inverse", {"sampling", "reconstruction", "gradients"}),
        ("tails", {"sampling"}),
    ],
)
def test_the_truth_finds_planted_faults(fault, unfit):
    torch.manual_seed(0)
    x = torch.randn(64, 4).clamp(-1, 1)
    flow = Chain(InvertibleLinear(4), Faulty(fault)).eval()
    found = truth.truths(flow, x)
    assert {use for use, one in found.items() if one.answer == "unfit"} == unfit


def test_the_density_of_a_noisy_injective_flow_is_that_of_its_covariance():
    x = sample("our NIF")
    flow = built("our NIF", x)
    assert truth.density(flow, x).answer == "fit"
    with torch.no_grad():
        precise = truth._nif_by_covariance(flow.double(), x.double())
    assert truth._density_truth(precise + 0.3, precise, formula=0.0, dtype=x.dtype).answer == (
        "unfit"
    )


def test_what_a_library_cannot_compute_in_a_dtype_is_unknown():
    x = sample("normflows MAF").bfloat16()
    found = truth.truths(built("normflows MAF", x.float()).bfloat16(), x)
    assert {found[use].answer for use in ("sampling", "reconstruction", "gradients")} == {"unknown"}


def test_a_dense_jacobian_is_that_of_the_map():
    matrix = torch.randn(3, 3, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    rows = truth.dense_jacobian(lambda t: (t @ matrix.T).square(), x)
    expected = 2 * (x @ matrix.T)[:, :, None] * matrix
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("name", [name for name in DATA if name != "patches"])
def test_data_are_standardised_and_the_same_again(name):
    split = load(name, root="", held_out=32, seed=3)
    assert len(split.test) == 32
    assert split.train.dtype == torch.float32
    assert bool(split.train.isfinite().all())
    assert split.train.std().item() == pytest.approx(1, abs=0.01)
    assert split.checksum == load(name, root="", held_out=32, seed=3).checksum
    assert split.checksum != load(name, root="", held_out=32, seed=4).checksum


def test_missing_images_and_unknown_data_are_refused(tmp_path):
    with pytest.raises(MissingData):
        load("patches", root=str(tmp_path), held_out=8, seed=0)
    with pytest.raises(ValueError, match=r"expected data out of moons, .*; got 'mnist'"):
        load("mnist", root="", held_out=8, seed=0)


@pytest.mark.parametrize("name", FLOWS)
def test_a_seed_determines_the_weights_of_every_flow(name):
    shape = tuple(sample(name).shape[1:])
    flows = []
    for _ in range(2):
        with seeded(3):
            flows.append(FLOWS[name].build(shape, 2, 8))
    first, second = (flow.state_dict() for flow in flows)
    for key, value in first.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, second[key]), key


def test_training_goes_on_where_it_was_and_leaves_out_steps_that_are_not_finite():
    x = sample("zuko RealNVP", rows=64)
    settings = {"batch_size": 16, "learning_rate": 1e-3, "seed": 0}
    whole, parts = built("zuko RealNVP", x), built("zuko RealNVP", x)
    Training(whole, x, **settings).go_on(6)
    training = Training(parts, x, **settings)
    training.go_on(2)
    training.go_on(6)
    assert bits(whole, x) == bits(parts, x)
    assert training.skipped == 0
    broken = Training(parts, x * math.nan, **settings)
    broken.go_on(3)
    assert broken.skipped == 3
    assert bits(parts, x) == bits(whole, x)


def test_a_penalty_is_part_of_every_fifth_step():
    x = sample("zuko RealNVP", rows=64)
    calls = []

    def penalty(model, batch, z=None):
        calls.append(len(batch))
        return model(batch).square().mean()

    settings = {"batch_size": 16, "learning_rate": 1e-3, "seed": 0}
    plain, penalised = built("zuko RealNVP", x), built("zuko RealNVP", x)
    Training(plain, x, **settings).go_on(7)
    Training(penalised, x, **settings, penalties=[penalty]).go_on(7)
    assert calls == [16, 16]
    assert bits(plain, x) != bits(penalised, x)


def test_the_condition_number_is_that_of_a_known_matrix():
    turned = torch.linalg.qr(torch.randn(3, 3))[0] @ torch.diag(torch.tensor([5.0, 1.0, 0.05]))
    layer = nn.Linear(3, 3, bias=False)
    layer.weight.data = turned
    assert price.log10_condition(layer, torch.randn(6, 3)) == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("treatment", price.TREATMENTS)
def test_every_treatment_makes_a_flow_that_inverts(treatment):
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    made = price.TREATMENTS[treatment]
    flow = price.build(4, made, depth=2, width=8)
    settings = {"batch_size": 16, "learning_rate": 1e-3, "seed": 0}
    before = flow(x)
    Training(flow, x, **settings, penalties=made.penalties(0)).go_on(6)
    with torch.no_grad():
        z = flow(x)
        assert not torch.allclose(z, before)
        torch.testing.assert_close(flow.inverse(z), x, rtol=1e-4, atol=1e-4)


def test_checked_rows_are_the_same_in_every_run_and_as_many_as_asked_for():
    keys = [f"model {k}" for k in range(2000)]
    checked = sum(is_checked(key, 10) for key in keys)
    assert 150 < checked < 250
    assert all(is_checked(key, 1) for key in keys[:10])
    assert [is_checked(key, 10) for key in keys] == [is_checked(key, 10) for key in keys]


def test_a_row_has_verdict_figure_and_interval_of_every_use():
    x = sample("our Glow", rows=32)
    row = uses_of(ig.audit(built("our Glow", x), x, level="quick", uses=("density", "sampling")))
    assert row["density"] == row["sampling"] == "stable"
    assert row["sampling_rate_high"] < 1e-3 <= row["density_share_high"]
    assert row["density_above"] == 0
    assert row["reconstruction_figure"] < 1e-4

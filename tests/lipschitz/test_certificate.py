"""Certificates survive a file, are checked without the optimiser, and forgeries are found."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from FrEIA import modules as freia
from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform
from safetensors.torch import save_file
from torch import nn

from inn_guard import wrap
from inn_guard.execution import deadline
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.networks import MLP, ConvNet
from inn_guard.lipschitz.bounds import lipschitz_bounds
from inn_guard.lipschitz.certificate import Certificate
from inn_guard.lipschitz.fingerprint import fingerprint, weights_hash
from inn_guard.lipschitz.lipsdp.chain import Chain as LinearChain
from inn_guard.lipschitz.networks.conditioner import Proof, SearchBudget
from inn_guard.lipschitz.whole_network import Factor
from inn_guard.numerics.intervals import Box
from inn_guard.numerics.rounding import Upper
from tests.cases.trials import first

CHECKER = Path(__file__).parents[2] / "tools" / "check_certificate.py"
EFFORT = SearchBudget(steps=40, seconds=3.0)


def dense() -> Chain:
    return Chain(
        *(
            p
            for _ in range(2)
            for p in (AdditiveCoupling(MLP([2, 8, 2], activation=nn.SiLU)), InvertibleLinear(4))
        )
    )


def image() -> Chain:
    return Chain(
        *(
            p
            for _ in range(2)
            for p in (AdditiveCoupling(ConvNet(2, 6, 2, activation=nn.ELU)), InvertibleLinear(4))
        )
    )


@pytest.fixture(
    params=[
        pytest.param((dense, (4,)), id="dense"),
        pytest.param((image, (4, 5, 5)), id="image", marks=pytest.mark.thorough),
    ]
)
def certified(request):
    make, shape = request.param
    torch.manual_seed(1)  # nets whose best bound is the recursion's, which carries a proof
    model = make()
    return model, lipschitz_bounds(model, Box.everywhere(shape), seconds=5.0, effort=EFFORT)


def checked(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, CHECKER, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_file_and_checker(certified, tmp_path):
    model, bounds = certified
    bounds.certificate.save(tmp_path / "c.npz")
    loaded = Certificate.load(tmp_path / "c.npz")
    assert loaded.bounds == bounds.certificate.bounds
    assert loaded.check()
    assert loaded.weights == weights_hash(model.state_dict())
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    result = checked(tmp_path / "c.npz", tmp_path / "w.safetensors")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "VALID" in result.stdout
    assert any(factor.proof is not None for factor in loaded.forward)


def test_forgeries_are_found(certified, tmp_path):
    model, bounds = certified
    bounds.certificate.save(tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as file:
        arrays = dict(file)
    name = next(key for key in arrays if key.endswith("weight"))
    forged = {**arrays, name: 1.5 * arrays[name]}
    np.savez(tmp_path / "f.npz", **forged)
    assert not Certificate.load(tmp_path / "f.npz").check()
    assert checked(tmp_path / "f.npz").returncode == 1
    with torch.no_grad():
        next(model.parameters()).add_(1e-9)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    result = checked(tmp_path / "c.npz", tmp_path / "w.safetensors")
    assert result.returncode == 1
    assert "NOT those" in result.stdout


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match="certificate"):
        Certificate.load(tmp_path / "x.npz")


# ------------------------------------------------------------------- what the certificate speaks of


def glow(clamp: float = 2.0, clamp_activation: object = "ATAN") -> nn.Module:
    torch.manual_seed(3)

    def network(n: int, m: int) -> nn.Module:
        return nn.Sequential(nn.Linear(n, 4), nn.LeakyReLU(0.1), nn.Linear(4, m))

    return freia.GLOWCouplingBlock(
        [(4,)], subnet_constructor=network, clamp=clamp, clamp_activation=clamp_activation
    )


def spline() -> nn.Module:
    torch.manual_seed(3)
    return PiecewiseRationalQuadraticCouplingTransform(
        torch.tensor([0, 1, 0, 1]),
        lambda n, m: _Ignoring(nn.Linear(n, m)),
        num_bins=2,
        tails="linear",
        tail_bound=2.0,
    )


class _Ignoring(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x, context=None):
        return self.network(x)


@pytest.fixture
def work(monkeypatch):
    """The clock of work, as outside of the tests."""
    monkeypatch.setattr(deadline, "now", deadline._work_done)


UNIT_BOX = Box(-torch.ones(4), torch.ones(4))


def set_attribute(name: str, value: object):
    return lambda model: setattr(model, name, value)


def set_slope(model: nn.Module) -> None:
    model.subnet1[1].negative_slope = 0.2


def replace_clamp(model: nn.Module) -> None:
    model.f_clamp = torch.tanh


def normalised() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    return AdditiveCoupling(net).eval()


def set_batch_norm_eps(model: nn.Module) -> None:
    model.network[1].eps = 1.0


CHANGED = {
    "a larger clamp": (glow, set_attribute("clamp", 20.0)),
    "a smaller clamp": (glow, set_attribute("clamp", 1.0)),
    "a slope": (glow, set_slope),
    "another function": (glow, replace_clamp),
    "tail_bound": (spline, set_attribute("tail_bound", 1.0)),
    "min_derivative": (spline, set_attribute("min_derivative", 0.5)),
    "eps": (normalised, set_batch_norm_eps),
}


@pytest.mark.parametrize("name", first(3, CHANGED))
def test_a_certificate_is_no_longer_that_of_a_model_whose_attributes_changed(name, work):
    make, change = CHANGED[name]
    model = make()
    certificate = lipschitz_bounds(model, UNIT_BOX, seconds=0.1).certificate
    assert certificate.check(model)
    with torch.no_grad():
        wrap(model)(torch.zeros(2, 4))
    assert certificate.check(model)
    change(model)
    assert not certificate.check(model)


def test_a_function_is_known_by_its_code():
    size = 1.0

    def clamp(u):
        return size * torch.tanh(u)

    model = glow(clamp_activation=clamp)
    before = fingerprint(model)
    assert fingerprint(glow(clamp_activation=clamp)) == before
    assert fingerprint(glow(clamp_activation=lambda u: torch.tanh(u))) != before
    size = 2.0
    assert fingerprint(model) != before


def test_a_mode_that_changes_the_map_is_found(work):
    model = normalised()
    certificate = lipschitz_bounds(model, UNIT_BOX, seconds=0.1).certificate
    assert not certificate.check(model.train())


def test_a_forged_file_with_honest_proofs_of_other_chains_does_not_pass(tmp_path, work):
    """Zero matrices and tiny bounds, all factors with a chain, under the model's own hashes."""
    torch.manual_seed(0)
    model = AdditiveCoupling(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)))
    honest = lipschitz_bounds(model, UNIT_BOX, seconds=0.1).certificate
    zero = LinearChain(4, (), torch.zeros(1, 4, 4, dtype=torch.float64))
    proof = Proof(Upper(1e-3), zero, ())
    small = (Factor(0, 1, 1e-3, proof),)
    forged = replace(honest, forward=small, inverse=small, leaves={})
    forged.save(tmp_path / "f.npz")
    loaded = Certificate.load(tmp_path / "f.npz")
    assert loaded.check()
    assert not loaded.unproved
    assert not loaded.check(model)
    assert not replace(honest, leaves=dict.fromkeys(("forward", "inverse"), 1.0)).check(model)


def test_a_certificate_in_a_few_dimensions_is_checked_by_branch_and_bound(tmp_path, work):
    torch.manual_seed(0)
    model = AdditiveCoupling(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    box = Box(-torch.ones(2), torch.ones(2))
    certificate = lipschitz_bounds(model, box, seconds=0.5).certificate
    certificate.save(tmp_path / "c.npz")
    assert Certificate.load(tmp_path / "c.npz").check(model)
    assert certificate.leaves


def test_bounds_depend_on_the_budget_of_work_alone(monkeypatch, work):
    monkeypatch.setattr("time.monotonic", lambda: pytest.fail("the clock on the wall was read"))
    model = glow()
    first = lipschitz_bounds(model, UNIT_BOX, seconds=0.1)
    again = lipschitz_bounds(model, UNIT_BOX, seconds=0.1)
    assert (first.forward, first.inverse) == (again.forward, again.inverse)

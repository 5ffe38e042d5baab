"""Certificates survive a file, are checked without the optimiser, and forgeries are found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.networks import MLP, ConvNet
from inn_guard.lipschitz.bounds import lipschitz_bounds
from inn_guard.lipschitz.certificate import Certificate, weights_hash
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.numerics.intervals import Box

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

"""Hostile certificate files: damaged, forged, huge; none passes with a bound below the truth."""

from __future__ import annotations

import importlib.util
import io
import json
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.networks import MLP
from inn_guard.lipschitz import certificate as certificates
from inn_guard.lipschitz.bounds import lipschitz_bounds
from inn_guard.lipschitz.certificate import Certificate
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.numerics.intervals import Box
from inn_guard.numerics.rounding import largest_eigenvalue
from tests.cases.trials import first

CHECKER = Path(__file__).parents[2] / "tools" / "check_certificate.py"
many = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)


def net() -> Chain:
    torch.manual_seed(1)
    parts = [
        (AdditiveCoupling(MLP([2, 8, 2], activation=nn.SiLU)), InvertibleLinear(4))
        for _ in range(2)
    ]
    return Chain(*(part for pair in parts for part in pair))


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A model, its bounds, and the arrays of its certificate."""
    model = net()
    bounds = lipschitz_bounds(
        model, Box.everywhere((4,)), seconds=0.5, effort=SearchBudget(steps=8, seconds=0.3)
    )
    path = tmp_path_factory.mktemp("certificate") / "c.npz"
    bounds.certificate.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    assert Certificate.load(path).check(model)
    assert any(name.endswith("multipliers") for name in arrays)
    return model, bounds, path.read_bytes(), arrays


@pytest.fixture(scope="module")
def checker():
    specification = importlib.util.spec_from_file_location("check_certificate", CHECKER)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.main


def header_of(arrays):
    return json.loads(arrays["header"].tobytes())


def with_header(arrays, header):
    return {**arrays, "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}


def assert_no_false_pass(path, known, checker):
    """Refused, found to be wrong, or its bounds are no less than the witnessed ones."""
    model, bounds, _, _ = known
    lower = (bounds.lower_forward, bounds.lower_inverse)
    code = checker(path)
    assert code in (0, 1, 2, 3)
    try:
        loaded = Certificate.load(path)
    except ValueError:
        assert code != 0
        return
    if loaded.check(model) and not loaded.unproved:
        assert all(claimed >= least for claimed, least in zip(loaded.bounds, lower, strict=True))
    if code == 0:
        assert all(
            claimed * (1 + 1e-5) >= least
            for claimed, least in zip(loaded.bounds, lower, strict=True)
        )


@pytest.mark.thorough
@many
@given(place=st.integers(0, 10**6), junk=st.binary(max_size=40), cut=st.integers(0, 10**5))
def test_damaged_files(known, checker, tmp_path, place, junk, cut):
    whole = known[2]
    place %= len(whole)
    (tmp_path / "c.npz").write_bytes(whole[:place] + junk + whole[place + cut % 500 :])
    assert_no_false_pass(tmp_path / "c.npz", known, checker)


DAMAGE = {
    "nan": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 0, np.nan, a),
    "infinite": lambda a: a + np.inf,
    "huge": lambda a: a * 1e200,
    "negative": lambda a: -a,
    "smaller": lambda a: a * 0.5,
    "larger": lambda a: a * 1.5,
    "flat": np.ravel,
    "cut": lambda a: a[..., :-1],
    "wide": lambda a: np.repeat(a, 2, -1),
    "empty": lambda a: a[..., :0],
    "float32": lambda a: a.astype(np.float32),
    "text": lambda a: a.astype(str),
    "one number": lambda a: np.asarray(a.flat[0]),
}


@pytest.mark.parametrize("how", first(5, DAMAGE))
def test_tampered_arrays(known, checker, tmp_path, how):
    arrays = known[3]
    for name in [
        name
        for name in arrays
        if name.startswith(("forward.0.1.", "inverse.0.output")) and arrays[name].size
    ]:
        np.savez(tmp_path / "c.npz", **{**arrays, name: DAMAGE[how](arrays[name])})
        assert_no_false_pass(tmp_path / "c.npz", known, checker)


def entries(header):
    return [entry for side in ("forward", "inverse") for entry in header[side]]


def less(header):
    for entry in entries(header):
        entry["bound"] = (0.5 * float.fromhex(entry["bound"])).hex()


def negative_errors(header):
    less(header)
    for entry in entries(header):
        entry["errors"] = [(-1e3).hex() for _ in entry["errors"]]


def negative_last_error(header):
    less(header)
    for entry in entries(header):
        entry["error"] = (-1e3).hex()


def left_out(header):
    header["forward"] = []


def from_later_on(header):
    entries(header)[0]["layers"][0] += 1


def without_proof(header):
    less(header)
    for entry in entries(header):
        entry["chain"] = False


def fewer_steps(header):
    for entry in entries(header):
        entry["errors"] = entry["errors"][:-1]


FORGERIES = {
    "less": less,
    "errors below zero": negative_errors,
    "last error below zero": negative_last_error,
    "no factors": left_out,
    "a gap": from_later_on,
    "no proof": without_proof,
    "fewer steps": fewer_steps,
    "nan": lambda header: entries(header)[0].update(bound="nan"),
    "below zero": lambda header: entries(header)[0].update(bound="-0x1p3"),
    "a number for text": lambda header: entries(header)[0].update(bound=0.5),
    "huge size": lambda header: entries(header)[0].update(size=10**12),
    "other format": lambda header: header.update(format="inn_guard Lipschitz certificate 1"),
    "no weights": lambda header: header.pop("weights"),
    "lists": lambda header: header.update(forward={"0": 1}, inverse="x"),
}


@pytest.mark.parametrize("how", FORGERIES)
def test_forged_headers_do_not_pass(known, checker, tmp_path, how):
    model, _, _, arrays = known
    header = header_of(arrays)
    FORGERIES[how](header)
    np.savez(tmp_path / "c.npz", **with_header(arrays, header))
    assert checker(tmp_path / "c.npz") != 0
    try:
        loaded = Certificate.load(tmp_path / "c.npz")
    except ValueError:
        return
    assert loaded.unproved or not loaded.check(model)


@many
@given(data=st.data())
def test_any_json_for_a_header(known, checker, tmp_path, data):
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=6,
    )
    arrays = known[3]
    header = header_of(arrays)
    place = data.draw(
        st.sampled_from(["format", "weights", "leaves", "forward", "inverse", "entry", "all"])
    )
    value = data.draw(values)
    if place == "all":
        header = value
    elif place == "entry":
        entry = data.draw(st.sampled_from(entries(header)))
        entry[data.draw(st.sampled_from(sorted(entry)))] = value
    else:
        header[place] = value
    np.savez(tmp_path / "c.npz", **with_header(arrays, header))
    assert_no_false_pass(tmp_path / "c.npz", known, checker)


def test_other_weights_are_found_out(known, checker, tmp_path):
    model, _, whole, _ = known
    (tmp_path / "c.npz").write_bytes(whole)
    other = net()
    with torch.no_grad():
        next(other.parameters()).add_(1e-12)
    assert Certificate.load(tmp_path / "c.npz").check(model)
    assert not Certificate.load(tmp_path / "c.npz").check(other)
    assert not Certificate.load(tmp_path / "c.npz").check(
        Chain(*model.layers(), InvertibleLinear(4))
    )
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    assert checker(tmp_path / "c.npz", tmp_path / "w.safetensors") == 1


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_nothing_is_unpickled(known, checker, tmp_path):
    mark, arrays = tmp_path / "executed", known[3]
    for name in ("header", next(name for name in arrays if name.endswith("weight"))):
        evil = np.empty(1, dtype=object)
        evil[0] = Evil(mark)
        np.savez(tmp_path / "c.npz", **{**arrays, name: evil})
        with pytest.raises(ValueError, match="whole Lipschitz certificate"):
            Certificate.load(tmp_path / "c.npz")
        assert checker(tmp_path / "c.npz") == 2
    np.save(tmp_path / "d.npy", evil)
    with pytest.raises(ValueError, match="whole Lipschitz certificate"):
        Certificate.load(tmp_path / "d.npy")
    assert not mark.exists()


def test_files_that_would_fill_the_memory_are_refused(known, tmp_path):
    _, _, whole, arrays = known
    (tmp_path / "c.npz").write_bytes(whole)
    with (
        mock.patch.object(certificates, "LARGEST", 1000),
        pytest.raises(ValueError, match="more than 1000"),
    ):
        Certificate.load(tmp_path / "c.npz")
    promising = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        promising, {"descr": "<f8", "fortran_order": False, "shape": (2**60,)}
    )
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as file:
        for name in arrays:
            file.writestr(f"{name}.npy", promising.getvalue())
    with pytest.raises(ValueError, match="whole Lipschitz certificate"):
        Certificate.load(tmp_path / "d.npz")


def test_paths_that_point_elsewhere(known, tmp_path):
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as file:
        file.writestr("../../escaped.npy", b"x")
        file.writestr("/etc/escaped.npy", b"x")
    with pytest.raises(ValueError, match="whole Lipschitz certificate"):
        Certificate.load(tmp_path / "c.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["c.npz"]
    for missing in (tmp_path, tmp_path / "none.npz"):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            Certificate.load(missing)


def test_a_matrix_beyond_the_range_has_no_finite_bound():
    assert largest_eigenvalue(1e200 * torch.eye(3, dtype=torch.float64)) >= 1e200
    assert largest_eigenvalue(torch.full((3, 3), 1e308, dtype=torch.float64)) == float("inf")

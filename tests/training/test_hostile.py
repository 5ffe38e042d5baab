"""Hostile checkpoints and unfinished results: read whole, or refused with nothing changed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.common.checkpoint import load_checkpoint, save_checkpoint
from benchmarks.common.runner import _read_finished

many = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model(torch.randn(4, 3, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "c.safetensors"
    save_checkpoint(path, *trained(), progress={"steps": 1})
    return path


def load_or_change_nothing(path) -> bool:
    """Whether it was loaded; if not, model and optimizer are as before."""
    model, optimizer = trained()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    try:
        load_checkpoint(path, model, optimizer)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[0][name])
        after = optimizer.state_dict()
        assert after["param_groups"] == before[1]["param_groups"]
        for index, state in after["state"].items():
            assert all(
                torch.equal(tensor, before[1]["state"][index][key]) for key, tensor in state.items()
            )
        return False
    # what was loaded can go on
    model(torch.randn(4, 3, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    return True


def test_a_whole_checkpoint_is_loaded(saved):
    assert load_or_change_nothing(saved)


@many
@given(place=st.integers(0, 10**5), junk=st.binary(max_size=30), cut=st.integers(0, 300))
def test_damaged_checkpoints(saved, tmp_path, place, junk, cut):
    whole = saved.read_bytes()
    place %= len(whole)
    (tmp_path / "c.safetensors").write_bytes(whole[:place] + junk + whole[place + cut :])
    load_or_change_nothing(tmp_path / "c.safetensors")


def header_of(path) -> dict:
    with safe_open(path, framework="pt") as handle:
        return json.loads(handle.metadata()["inn_guard"])


@many
@given(data=st.data())
def test_any_header(saved, tmp_path, data):
    header, value = header_of(saved), data.draw(anything)
    place = data.draw(
        st.sampled_from(["format", "progress", "groups", "scalars", "setting", "all"])
    )
    if place == "setting":
        group = header["groups"][0]
        group[data.draw(st.sampled_from(sorted(group)))] = value
    elif place == "all":
        header = value
    else:
        header[place] = value
    save_file(
        load_file(saved), tmp_path / "c.safetensors", metadata={"inn_guard": json.dumps(header)}
    )
    load_or_change_nothing(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    "name", ["optimizer.0.exp_avg", "optimizer.0.step", "optimizer.9.exp_avg", "optimizer.x.y"]
)
def test_states_that_do_not_fit_the_parameters(name, saved, tmp_path):
    tensors = load_file(saved) | {name: torch.zeros(5)}
    save_file(
        tensors, tmp_path / "c.safetensors", metadata={"inn_guard": json.dumps(header_of(saved))}
    )
    assert not load_or_change_nothing(tmp_path / "c.safetensors")


def test_an_optimizer_that_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(1e-3))
    with pytest.raises(ValueError, match="lr=1e-3"):
        save_checkpoint(tmp_path / "c.safetensors", model, optimizer, progress={})
    assert not list(tmp_path.iterdir())


@many
@given(junk=st.binary(max_size=60), line=anything)
def test_what_is_no_finished_case_is_not_taken_for_one(junk, line, tmp_path):
    good = json.dumps({"case": "a", "rows": [{"x": 1}]}).encode()
    junk = junk.replace(b'"case"', b"")
    lines = [
        junk,
        json.dumps(line).encode(),
        json.dumps({"case": "b", "rows": line}).encode(),
        good,
    ]
    (tmp_path / "run.jsonl").write_bytes(b"\n".join(lines))
    finished = _read_finished(tmp_path / "run.jsonl")
    assert finished.pop("a") == [{"x": 1}]
    assert all(isinstance(row, dict) for rows in finished.values() for row in rows)

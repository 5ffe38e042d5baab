"""Models and weights: found, fitting, or refused in words."""

from __future__ import annotations

import pickle
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from inn_guard.cli.models import load_weights, make_model, own_dtype
from inn_guard.cli.usage import WrongUsage
from tests.cli.nets import Scale

NETS = "tests.cli.nets"


def test_factories_classes_and_ready_models():
    assert isinstance(make_model(f"{NETS}:stable", seed=0), Scale)
    assert isinstance(make_model(f"{NETS}:Scale", seed=0), Scale)
    assert make_model(f"{NETS}:ready", seed=0) is make_model(f"{NETS}:ready", seed=0)
    assert isinstance(make_model("torch:nn.Identity", seed=0), nn.Identity)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nets", "expected --model package.module:factory"),
        (":f", "expected --model package.module:factory"),
        ("no_such_package_anywhere:f", "there is no module 'no_such_package_anywhere'"),
        (f"{NETS}:nothing", "has no 'nothing'"),
        (f"{NETS}:not_callable", "expected .* to be a function that makes the model, got int"),
        (
            f"{NETS}:raises",
            r"raises\(\) raised ValueError: first line\nsecond line \(nets.py, line \d+\)",
        ),
        (f"{NETS}:leaves", r"leaves\(\) raised SystemExit"),
        (f"{NETS}:needs", "missing 1 required positional argument: 'width'"),
    ],
)
def test_what_cannot_be_made_is_said(name, words):
    with pytest.raises(WrongUsage, match=words):
        make_model(name, seed=0)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "import no_such_library",
            "importing broken_net raised ModuleNotFoundError: .*no_such_library",
        ),
        ("1 +", "importing broken_net raised SyntaxError"),
        ("raise SystemExit(0)", "importing broken_net raised SystemExit"),
    ],
)
def test_modules_that_cannot_be_imported(code, words, tmp_path, monkeypatch):
    (tmp_path / "broken_net.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(WrongUsage, match=words):
        make_model("broken_net:f", seed=0)


def saved(path, state):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_weights_are_loaded(name, tmp_path):
    model = Scale()
    load_weights(model, saved(tmp_path / name, {"scale": torch.arange(4.0)}))
    assert model.scale.tolist() == [0, 1, 2, 3]


def test_weights_under_a_usual_name_and_of_another_dtype_are_said(tmp_path, capsys):
    model = Scale()
    load_weights(
        model,
        saved(tmp_path / "w.pt", {"epoch": 3, "state_dict": {"scale": torch.arange(4.0).half()}}),
    )
    assert model.scale.tolist() == [0, 1, 2, 3]
    told = capsys.readouterr().err
    assert "under 'state_dict'" in told
    assert "torch.float16: converted" in told


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, r"of 1 weights 1 missing \(scale\)"),
        ({"scale": torch.ones(4), "a.b": torch.ones(1)}, r"of 1 weights 1 unexpected \(a.b\)"),
        (
            {f"k{i}": torch.ones(1) for i in range(9)},
            r"1 missing \(scale\) and 9 unexpected \(k0, k1, k2, k3, …\)",
        ),
        ({"scale": torch.ones(3)}, r"scale has shape \(3,\), expected \(4,\)"),
    ],
)
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_weights_that_do_not_fit_are_refused_and_the_model_kept(state, words, name, tmp_path):
    model = Scale()
    with pytest.raises(WrongUsage, match=words):
        load_weights(model, saved(tmp_path / name, state))
    assert model.scale.tolist() == [2, 2, 2, 2]


def test_things_that_are_no_weights(tmp_path):
    with pytest.raises(WrongUsage, match="there is no file"):
        load_weights(Scale(), tmp_path / "none.pt")
    with pytest.raises(WrongUsage, match="expected weights by name"):
        load_weights(Scale(), saved(tmp_path / "w.pt", torch.ones(4)))
    with pytest.raises(WrongUsage, match="scale is a int, not a tensor"):
        load_weights(Scale(), saved(tmp_path / "i.pt", {"scale": 3}))
    with pytest.raises(WrongUsage, match=r"needs a torch.nn.Module, but the factory made a int"):
        load_weights(3, tmp_path / "w.pt")


class Bomb:
    def __reduce__(self):
        return (exec, ("import builtins; builtins.exploded = True",))


def test_pickled_code_is_never_run(tmp_path):
    import builtins

    (tmp_path / "w.pt").write_bytes(pickle.dumps({"scale": Bomb()}))
    torch.save({"scale": Bomb()}, tmp_path / "z.pt")
    for name in ("w.pt", "z.pt"):
        with pytest.raises(WrongUsage, match="cannot be read as weights"):
            load_weights(Scale(), tmp_path / name)
    assert not hasattr(builtins, "exploded")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_damaged_files(name, tmp_path):
    whole = saved(tmp_path / name, {"scale": torch.ones(4)}).read_bytes()
    for content in (
        b"",
        b"\x00" * 64,
        whole[: len(whole) // 2],
        b"\xff" * 9 + whole,
        b"PK\x03\x04",
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WrongUsage, match="cannot be read as weights"):
            load_weights(Scale(), tmp_path / name)


def test_own_dtype():
    assert own_dtype(Scale().double()) is torch.float64
    assert own_dtype(nn.Identity()) is torch.get_default_dtype()
    assert own_dtype(3) is torch.get_default_dtype()

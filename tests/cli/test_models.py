"""Models and weights: found, fitting, or refused in words."""

from __future__ import annotations

import pickle
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from inn_guard.cli.models import load_weights, make, own_dtype, parse_arguments
from inn_guard.cli.usage import WrongUsage
from tests.cli.nets import Scale

FILE = "tests/cli/nets.py"

NETS = "tests.cli.nets"


def test_factories_classes_and_ready_models():
    assert isinstance(make(f"{NETS}:stable", seed=0), Scale)
    assert isinstance(make(f"{NETS}:Scale", seed=0), Scale)
    assert make(f"{NETS}:ready", seed=0) is make(f"{NETS}:ready", seed=0)
    assert isinstance(make("torch:nn.Identity", seed=0), nn.Identity)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nets", "expected MODEL as package.module:factory"),
        (":f", "expected MODEL as package.module:factory"),
        ("no_such_package_anywhere:f", "there is no module 'no_such_package_anywhere'"),
        (f"{NETS}:nothing", "has no 'nothing'"),
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
        make(name, seed=0)


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
        make("broken_net:f", seed=0)


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


def test_a_factory_in_a_file_with_arguments():
    model = make(f"{FILE}:needs", seed=0, arguments={"width": 7})
    assert model.scale.shape == (7,)
    assert make(f"{NETS}:Scale", seed=0, arguments={"scale": 3.0}).scale.tolist() == [3] * 4


def test_a_file_finds_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "sizes_of_this_net.py").write_text("WIDTH = 5\n")
    (tmp_path / "net_in_a_file.py").write_text(
        "from torch import nn\nfrom sizes_of_this_net import WIDTH\n"
        "def make():\n    return nn.Linear(WIDTH, WIDTH)\n"
    )
    assert make(f"{tmp_path / 'net_in_a_file.py'}:make", seed=0).in_features == 5


def test_files_that_cannot_be_imported(tmp_path):
    with pytest.raises(WrongUsage, match="there is no file"):
        make(f"{tmp_path / 'none.py'}:f", seed=0)
    (tmp_path / "broken.py").write_text("1 +")
    with pytest.raises(WrongUsage, match=r"broken.py raised SyntaxError"):
        make(f"{tmp_path / 'broken.py'}:f", seed=0)


def test_arguments_are_literals_or_strings():
    words = ["layers=8", "widths=(64, 64)", "activation=tanh", "url=a=b", "bias=False"]
    assert parse_arguments(words) == {
        "layers": 8,
        "widths": (64, 64),
        "activation": "tanh",
        "url": "a=b",
        "bias": False,
    }
    for wrong in (["layers"], ["=3"], ["a b=3"], ["a=1", "a=2"]):
        with pytest.raises(WrongUsage, match="--arg"):
            parse_arguments(wrong)


def test_arguments_need_a_factory():
    with pytest.raises(WrongUsage, match=r"--arg is for a factory, but .* is a Scale"):
        make(f"{NETS}:ready", seed=0, arguments={"width": 3})
    with pytest.raises(WrongUsage, match="unexpected keyword argument 'height'"):
        make(f"{NETS}:needs", seed=0, arguments={"height": 3})


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "net.flow."])
def test_a_prefix_of_all_weights_is_removed_and_said(prefix, tmp_path, capsys):
    model = Scale()
    state = {f"{prefix}scale": torch.arange(4.0), "ema": torch.ones(1)}
    load_weights(model, saved(tmp_path / "w.pt", {"state_dict": state}))
    assert model.scale.tolist() == [0, 1, 2, 3]
    told = capsys.readouterr().err
    assert f"whose names begin with '{prefix}', leaving out 1 others" in told


def test_of_two_prefixes_the_usual_one_is_taken_and_the_other_said(tmp_path, capsys):
    model = Scale()
    state = {"ema.scale": torch.ones(4), "model.scale": torch.arange(4.0)}
    load_weights(model, saved(tmp_path / "w.pt", state))
    assert model.scale.tolist() == [0, 1, 2, 3]
    assert "(also found: 'ema.')" in capsys.readouterr().err


def test_a_prefix_of_some_weights_is_none(tmp_path):
    with pytest.raises(WrongUsage, match=r"1 missing \(scale\)"):
        load_weights(Scale(), saved(tmp_path / "w.pt", {"module.shift": torch.ones(4)}))


def test_a_checkpoint_of_lightning_is_loaded_without_its_prefix(tmp_path, capsys):
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self, width):
            super().__init__()
            self.save_hyperparameters()
            self.flow = Scale(features=width)

        def training_step(self, batch, index):
            return self.flow(batch).sum()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    trainer = pl.Trainer(
        max_steps=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    module = Module(4)
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(4, 4)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = Scale()
    load_weights(model, tmp_path / "last.ckpt")
    assert torch.equal(model.scale, module.flow.scale)
    told = capsys.readouterr().err
    assert "under 'state_dict' in last.ckpt" in told
    assert "whose names begin with 'flow.'" in told

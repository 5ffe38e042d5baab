"""wrap(): which adapter it takes, what it refuses, and that it leaves the user's module alone."""

from __future__ import annotations

import importlib
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from inn_guard.adapters import ADAPTERS, wrap
from inn_guard.adapters.callables import ForwardAndInverse
from inn_guard.core.invertible import Invertible
from inn_guard.execution.state import changed_state
from tests.cases.functions import Coupling


class Double(Invertible):
    def forward(self, x):
        return 2 * x

    def inverse(self, z):
        return z / 2


def test_an_invertible_passes_through():
    model = Double()
    assert wrap(model) is model
    context = torch.zeros(2)
    assert wrap(model, context=context).context is context
    assert model.context is None


def test_every_adapter_exists_and_has_adapt():
    for path in ADAPTERS.values():
        assert callable(importlib.import_module(path).adapt)


def test_importing_wrap_imports_no_foreign_library():
    code = (
        "import sys, inn_guard.adapters; "
        "print([m for m in ('nflows', 'FrEIA') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )


def test_detection_goes_by_the_modules_of_all_bases():
    foreign = type("Transform", (), {"__module__": "nflows_like.transforms"})
    with pytest.raises(TypeError, match=r"got nflows_like.transforms.Transform"):
        wrap(foreign())  # a prefix of the name is not the package

    class Mine(torch.distributions.transforms.ExpTransform):
        pass

    assert wrap(Mine()).name == "Mine"


def test_a_module_with_forward_and_inverse_is_taken_as_it_is():
    model = wrap(Coupling())
    assert isinstance(model, ForwardAndInverse)
    assert type(model.block) is Coupling
    assert model.name == "Coupling"
    assert model.layers() == ()


@pytest.mark.parametrize("model", [nn.Linear(2, 2), 3.0, lambda x: x, {"lr": 0.1}])
def test_an_unknown_model_is_refused_with_the_way_out(model):
    name = type(model).__name__
    message = rf"expected an Invertible, .*got .*{name}; call wrap\(encode=f, decode=g\)"
    with pytest.raises(TypeError, match=message):
        wrap(model)


class Classifier(nn.Module):
    """A head behind an invertible trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = Coupling()
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (Coupling, "got the class Coupling; pass an instance of it"),
        ("flow.pt", r"got the path 'flow.pt'; build the model, load its weights"),
        (pathlib.Path("flow.pt"), "got the path"),
        (nn.Linear(2, 2).state_dict(), r"call model.load_state_dict\(state_dict\)"),
        (torch.zeros(5, 2), r"pass the model first and the data second: audit\(model, x\)"),
        ([Coupling(), Coupling()], r"call wrap\(layers=model\)"),
        (nn.Sequential(Coupling(), Coupling()), r"call wrap\(layers=model\)"),
        (nn.Sequential(Coupling(), nn.Linear(2, 2)), "whose part 1 is a Linear without an inverse"),
        (nn.DataParallel(nn.Linear(2, 2)), r"wrap\(model.module\)"),
        (Classifier(), r"or pass its invertible part: wrap\(model.trunk\)"),
    ],
)
def test_advice_fits_what_was_passed(model, advice):
    with pytest.raises(TypeError, match=advice):
        wrap(model)


def test_the_advice_works():
    parts = nn.Sequential(Coupling(), Coupling()).double()
    assert len(wrap(layers=parts).layers()) == 2
    assert wrap(Classifier().trunk).name == "Coupling"


def test_several_latents_are_refused():
    def encode(x):
        return [x[:, :1].expand(-1, 3), x[:, 1:].expand(-1, 2)]

    model = wrap(encode=encode, decode=lambda z: z)
    with pytest.raises(TypeError, match=r"\(4, 3\), \(4, 2\): it looks like several latents: con"):
        model(torch.zeros(4, 2))
    three = wrap(encode=lambda x: (x, x, x), decode=lambda z: z)
    with pytest.raises(TypeError, match="several latents: concatenate them"):
        three(torch.zeros(4, 2))


def test_a_compiled_model_is_reported_under_its_own_name():
    module = Coupling()
    compiled = wrap(torch.compile(module))
    assert compiled.name == "Coupling"
    # compiled code frees its graph after one backward pass: it has no spectrum
    assert compiled.block is module


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ({}, "got nothing"),
        ({"encode": abs}, "got encode"),
        ({"decode": abs}, "got decode"),
        ({"encode": abs, "layers": [Double()]}, "got encode and layers"),
        ({"layers": [Double()], "log_det": abs}, "got layers"),
    ],
)
def test_half_a_map_is_refused(arguments, got):
    with pytest.raises(TypeError, match=f"expected both directions of a map, {got}"):
        wrap(**arguments)


def test_a_model_and_callables_together_are_refused():
    with pytest.raises(TypeError, match="expected either a model or callables"):
        wrap(Double(), decode=abs)


def test_wrapping_changes_nothing_in_the_module():
    net = Coupling()
    net.net[0].eval()
    hook = net.register_forward_hook(lambda *_: None)
    hooks, state = dict(net._forward_hooks), dict(net.state_dict())
    modes = [module.training for module in net.modules()]
    with changed_state(net) as changed:
        model = wrap(net)
        pair = wrap(encode=net, decode=net.inverse, layers=[net])
    assert changed == []
    assert modes == [module.training for module in net.modules()]
    assert dict(net._forward_hooks) == hooks
    assert list(net.state_dict()) == list(state)
    assert model.training
    assert pair.training
    assert {id(p) for p in model.parameters()} == {id(p) for p in net.parameters()}
    hook.remove()


def test_training_flag_is_that_of_the_module():
    assert not wrap(Coupling().eval()).training

"""The pytest plug-in, run as a user runs it, and `assert_stable`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import inn_guard as ig

pytest_plugins = ["pytester"]

NETS = """
import pytest, torch
import inn_guard as ig
import normflows as nf
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock
from nflows import transforms
from nflows.nn.nets import ResidualNet

torch.set_num_threads(1)
torch.set_default_dtype(torch.float32)

def nflows_model(gain=1.0):
    torch.manual_seed(0)
    net = lambda n, m: ResidualNet(n, m, 8)
    model = transforms.AffineCouplingTransform(torch.arange(4) % 2, net)
    with torch.no_grad():
        model.transform_net.final_layer.bias.mul_(gain)
    return model

def freia_model():
    torch.manual_seed(0)
    def subnet(n, m):
        return torch.nn.Sequential(torch.nn.Linear(n, 8), torch.nn.ReLU(), torch.nn.Linear(8, m))
    model = SequenceINN(4)
    model.append(AllInOneBlock, subnet_constructor=subnet)
    return model

def normflows_model():
    torch.manual_seed(0)
    block = nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4]))
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [block])

class Forgetful(torch.nn.Module):
    def forward(self, x):
        return x.round()
    def inverse(self, z):
        return z
"""


TESTS = """
@pytest.mark.parametrize("make", [nflows_model, freia_model, normflows_model])
@pytest.mark.inn_guard(checks=["density", "reconstruction"])
def test_fit(inn_guard, make):
    inn_guard(make(), torch.randn(32, 4))

@pytest.mark.inn_guard(checks=["reconstruction"])
def test_unfit(inn_guard):
    inn_guard(Forgetful(), torch.randn(32, 4))

@pytest.mark.inn_guard(checks=["density"], limits={"density": 1e-12})
def test_strict_limits(inn_guard):
    inn_guard(nflows_model(), torch.randn(32, 4))

@pytest.mark.inn_guard(use=["reconstruction"])
def test_misspelt(inn_guard):
    pass

@pytest.mark.inn_guard(checks=["reconstruction"])
@pytest.mark.parametrize("make", [nflows_model, freia_model, Forgetful])
def test_shape(make):
    make()(torch.randn(32, 4))

@pytest.mark.inn_guard(skip=True)
def test_left_out():
    Forgetful()(torch.randn(32, 4))

def test_without_models():
    torch.nn.Linear(2, 2)(torch.randn(3, 2))
"""


def run(pytester, *options):
    """In a process of its own, as users do."""
    pytester.makepyfile(test_flows=NETS + TESTS)
    return pytester.runpytest_subprocess("-p", "pytest_inn_guard", *options)


def test_fixture_marker_and_models_that_tests_call(pytester):
    result = run(pytester, "--inn-guard", "--junit-xml=report.xml")
    result.assert_outcomes(passed=8, failed=2, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*expected pytest.mark.inn_guard with uses, limits*got use*",
            "*reconstruction*FAILS*",
            "test_flows.py::test_shape?Forgetful?: unstable: Forgetful*reconstruction: worst of*",
            "test_flows.py::test_fit?nflows_model?: stable: AffineCouplingTransform (nflows)*",
            "8 models audited, 3 not fit for their uses",
        ]
    )
    written = (pytester.path / "report.xml").read_text()
    assert '<property name="inn_guard" value="stable: AffineCouplingTransform' in written


@pytest.fixture(autouse=True)
def _this_checkout(monkeypatch):
    """The processes import the plug-in from here, whatever is installed."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.mark.thorough
def test_strictly_a_test_of_an_unfit_model_fails(pytester):
    run(pytester, "--inn-guard-strict").assert_outcomes(passed=7, failed=3, errors=1)
    silent = run(pytester)
    silent.assert_outcomes(passed=8, failed=2, errors=1)


def test_a_model_that_fails_shows_its_report():
    class Forgetful(torch.nn.Module):
        def forward(self, x):
            return x.round()

        def inverse(self, z):
            return z

    x = torch.randn(32, 3)
    with pytest.raises(AssertionError, match=r"(?s)verdict is unstable.*reconstruction +FAILS"):
        ig.assert_stable(Forgetful(), x, uses=["reconstruction"])
    loose = ig.Limits(reconstruction=100.0)
    report = ig.assert_stable(Forgetful(), x, uses=["reconstruction"], limits=loose)
    assert report.verdict.passed


def test_an_undecided_verdict_fails():
    double = ig.wrap(encode=lambda x: 2 * x, decode=lambda z: z / 2)
    with pytest.raises(AssertionError, match="the verdict is undecided"):
        ig.assert_stable(double, torch.randn(8, 3), checks=[])

"""Inputs off the data against closed forms, and models that hang, raise or return NaN there; the
watchdog itself.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter

import FrEIA.framework
import FrEIA.modules
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows.nn.nets import ResidualNet
from nflows.transforms import AffineCouplingTransform, CompositeTransform
from torch import nn
from torch.distributions import constraints

from inn_guard.adapters import wrap
from inn_guard.audits import Level
from inn_guard.audits.audited_model import AuditedModel
from inn_guard.audits.fault_tolerant import Guarded
from inn_guard.audits.out_of_distribution import input_families as families
from inn_guard.audits.out_of_distribution.audit import out_of_distribution
from inn_guard.audits.out_of_distribution.input_families import BASE_FAMILIES, DATA_FAMILIES
from inn_guard.audits.out_of_distribution.radius_search import smallest_failing_radii
from inn_guard.core.invertible import Invertible
from inn_guard.execution.time_limit import TimedOut, time_limit
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.report.limits import Limits
from inn_guard.report.verdict import Verdict
from tests.cases.trials import first
from tests.execution.clocks import hangs


class Scale(Invertible):
    """z = 2 x, with its log-determinants; subclasses break it somewhere."""

    def forward(self, x):
        return 2 * x

    def inverse(self, z):
        return z / 2

    def forward_and_log_det(self, x):
        return self.forward(x), torch.full((len(x),), x[0].numel() * math.log(2))

    def inverse_and_log_det(self, z):
        return self.inverse(z), torch.full((len(z),), -z[0].numel() * math.log(2))


class Ball(Scale):
    """Invertible inside a ball around 0; beyond it the inverse stays on the sphere."""

    def __init__(self, radius):
        super().__init__()
        self.radius = radius

    def inverse(self, z):
        x = z / 2
        length = x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1))
        return torch.where(length > self.radius, x / length * self.radius, x)


def rows(result):
    return {row["family"]: row for row in result.tables["families"]}


def data(*shape):
    x = torch.randn(*(shape or (24, 5)))
    x = (x - x.mean(0)) / x.std(0, correction=0)  # every feature has the same deviation
    return x / x.flatten(1).norm(dim=1).median()  # centre 0, radius 1


# closed forms


def test_a_good_map_passes_everywhere_and_its_figures_are_known():
    result = out_of_distribution(Scale(), data(), level=Level.FULL)
    assert result.verdict is Verdict.STABLE
    table = rows(result)
    assert all(row["verdict"] == "passes" and row["max_error"] == 0 for row in table.values())
    assert result.values["invertible_radius"] == math.inf
    assert result.values["likelihood_radius"] == math.inf
    for row in table.values():
        assert row["log_det"] == pytest.approx(5 * math.log(2))
        assert row["log10_sigma_max"] == pytest.approx(math.log10(2))
        assert row["log10_sigma_min"] == pytest.approx(math.log10(2))


@pytest.mark.parametrize("radius", [3.0, 17.0, 300.0])
def test_the_radius_where_a_map_stops_being_invertible(radius):
    """Beyond the ball the first error above 1 % of the scale is met a few per cent further out."""
    result = out_of_distribution(Ball(radius), data())
    assert radius <= result.values["invertible_radius"] <= 1.15 * radius
    assert bool((result.per_sample["invertible_radius"] >= radius).all())
    assert rows(result)["data"]["verdict"] == "passes"


def test_the_radius_where_a_likelihood_stops_holding():
    """log-determinants that leave D ln 2 |x| / 100 nats, i.e. |x| / 100 bits per dimension: 0.1 at
    radius 10.
    """

    class Drifting(Scale):
        def inverse_and_log_det(self, z):
            x, log_det = super().inverse_and_log_det(z)
            return x, log_det + z[0].numel() * math.log(2) * x.flatten(1).norm(dim=1) / 100

    result = out_of_distribution(Drifting(), data())
    assert result.values["likelihood_radius"] == pytest.approx(10, rel=0.05)
    assert result.values["invertible_radius"] == math.inf
    assert "log p(x) holds to 1" in result.reason


def test_the_search_halves_down_to_the_first_failure():
    limits = torch.tensor([0.2, 1.0, 37.0, 1e9, 1e-9])
    (found,) = smallest_failing_radii(lambda radii: radii[None] > limits, 5)
    assert bool((found.fails[:3] >= limits[:3]).all())
    assert bool((found.fails[:3] <= 1.02 * limits[:3]).all())
    assert bool((found.holds[:3] <= limits[:3]).all())
    assert found.fails[3] == math.inf
    assert found.holds[3] == found.limit
    assert found.holds[4] == 0


@given(seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_halvings_that_share_a_call_find_what_single_ones_do(seed):
    # what fails comes and goes with the radius, differently in every direction
    generator = torch.Generator().manual_seed(seed)
    phase = 6 * torch.rand(2, 5, generator=generator)
    calls = Counter()

    def at(at_once):
        def fails(radii):
            calls[at_once] += 1
            return (3 * radii.log()[None] + phase[:, None]).sin() > 0.8

        return smallest_failing_radii(fails, 5, at_once=at_once)

    for single, shared in zip(at(1), at(16), strict=True):
        assert torch.equal(single.fails, shared.fails)
        assert torch.equal(single.holds, shared.holds)
    assert calls[16] <= 4 < calls[1]


@pytest.mark.parametrize("name", DATA_FAMILIES)
def test_families_keep_shape_dtype_and_their_place(name):
    family, x = DATA_FAMILIES[name], torch.rand(6, 3, 8, 8, dtype=torch.float32)
    made = family.make(x, torch.Generator().manual_seed(0))
    assert made.shape == x.shape
    assert made.dtype == x.dtype
    inside = bool(((made >= x.min() - 1e-6) & (made <= x.max() + 1e-6)).all())
    assert inside == family.scope.in_range
    assert torch.equal(made, family.make(x, torch.Generator().manual_seed(0)))


def test_what_the_families_are():
    x, generator = torch.randn(4, 2, 8, 8), torch.Generator().manual_seed(0)
    assert torch.equal(
        families.shuffled(x, generator).flatten(1).sort(1).values, x.flatten(1).sort(1).values
    )
    assert not torch.equal(families.shuffled(x, generator), x)
    torch.testing.assert_close(families.blurred(x * 0 + 0.7, generator), x * 0 + 0.7)
    assert families.blurred(x, generator).std() < 0.5 * x.std()
    torch.testing.assert_close(families.inverted(families.inverted(x, generator), generator), x)
    assert set(families.rademacher(x, generator).unique().tolist()) == {
        x.min().item(),
        x.max().item(),
    }
    z = 7 + 3 * torch.randn(200, 50)
    made = BASE_FAMILIES["base, temperature 1.5"].make(z, generator)
    torch.testing.assert_close(made.std(0), 1.5 * z.std(0))
    torch.testing.assert_close(made.mean(0), z.mean(0))


def test_the_families_of_a_table_have_the_range_of_every_feature():
    units, offset = torch.tensor([1e-6, 1.0, 1e6]), torch.tensor([1e-6, -5.0, 0.0])
    x = torch.randn(16, 3)
    for name, family in DATA_FAMILIES.items():
        if family.fits(x):
            plain = family.make(x, torch.Generator().manual_seed(0))
            other = family.make(x * units + offset, torch.Generator().manual_seed(0))
            torch.testing.assert_close((other - offset) / units, plain, msg=name)


def test_what_means_nothing_is_left_out_and_said_so():
    result = out_of_distribution(Scale(), data())
    assert "blurred" in result.settings["left_out"]
    assert "blurred" not in rows(result)
    assert "blurred" in rows(out_of_distribution(Scale(), data(6, 1, 8, 8)))


# findings


def test_a_family_that_fails_while_the_data_pass_decides():
    """The corners of the data's range lie further out than any of them."""
    x = data(64, 5)
    x = x / x.norm(dim=1, keepdim=True)
    result = out_of_distribution(Ball(1.2), x)
    table = rows(result)
    assert table["data"]["verdict"] == "passes"
    assert table["rademacher noise"]["verdict"] == "not invertible"
    assert result.verdict is Verdict.UNSTABLE
    assert "families fail: " in result.reason
    assert "rademacher noise (not invertible)" in result.reason
    assert table["scale x 100"]["decides"] == "no"
    assert table["rademacher noise"]["decides"] == "yes"
    finding = result.uses["other_inputs"]
    failing = [row for row in result.tables["families"][1:] if row["decides"] == "yes"]
    share = sum(row["verdict"] != "passes" for row in failing) / len(failing)
    assert finding.figure == pytest.approx(share)
    assert (finding.samples, finding.of, finding.limit) == (32, 64, 0)


def test_the_share_that_may_fail_is_a_limit():
    x = data(64, 5)
    x = x / x.norm(dim=1, keepdim=True)
    result = out_of_distribution(Ball(1.2), x, limits=Limits(other_inputs=1.0))
    assert result.verdict is Verdict.STABLE
    assert "families fail" in result.reason


def test_hot_latents_decide_nothing():
    x = data()
    result = out_of_distribution(Ball(2.0), 0.1 * x)
    assert rows(result)["base, temperature 2"]["verdict"] == "not invertible"
    assert rows(result)["base, temperature 2"]["decides"] == "no"
    assert result.verdict is Verdict.STABLE


def test_failures_beyond_the_range_are_told_but_do_not_decide():
    result = out_of_distribution(Ball(40.0), data())
    assert result.verdict is Verdict.STABLE
    assert "beyond the data's range these fail" in result.reason
    assert "scale x 100" in result.reason


def test_data_that_fail_themselves_are_the_verdict():
    result = out_of_distribution(Ball(0.1), data())
    assert result.verdict is Verdict.UNSTABLE
    assert "the data themselves fail already" in result.reason


def test_nan_and_exceptions_are_counted_where_they_happen():
    class Brittle(Scale):
        def inverse(self, z):
            if bool((z.abs().flatten(1).amax(1) > 60).any()):
                raise ValueError("outside of the domain")
            return torch.where(z.abs() > 20, math.nan, z / 2)

    x = data()
    far, farther = 15 + 0 * x[:3], 50 + 0 * x[:3]
    mixed = torch.cat([x[:1], farther[:1], x[:1]])
    result = out_of_distribution(
        Brittle(), x, others={"far": far, "farther": farther, "mixed": mixed}
    )
    assert result.verdict is Verdict.NON_FINITE
    table = rows(result)
    assert table["data"]["non_finite"] == 0
    assert table["far"]["non_finite"] == table["farther"]["non_finite"] == 3
    assert table["mixed"]["non_finite"] == 1
    assert "outside of the domain" in result.settings["failures"]


class Positive(Scale):
    """Refuses what is not positive, as the logarithm of a count would, or answers NaN."""

    def __init__(self, *, raises):
        super().__init__()
        self.raises = raises

    def forward(self, x):
        if self.raises and bool((x <= 0).any()):
            raise ValueError("expected positive numbers")
        return x.log()

    def inverse(self, z):
        return z.exp()

    def forward_and_log_det(self, x):
        return self.forward(x), -x.log().sum(1)

    def inverse_and_log_det(self, z):
        return self.inverse(z), z.sum(1)


def test_inputs_that_the_model_refuses_are_left_out():
    x = data().exp()
    result = out_of_distribution(Positive(raises=True), x)
    assert result.verdict is Verdict.STABLE, result.reason
    assert "contrast x 5: the model refuses" in result.settings["left_out"]
    assert rows(result)["rademacher noise"]["samples"] == 24
    assert out_of_distribution(Positive(raises=False), x).values["invertible_radius"] < 10


@pytest.mark.parametrize("domain", [constraints.positive, lambda x: (x > 0).all(1)])
def test_inputs_outside_of_the_domain_are_left_out(domain):
    x = data().exp()
    result = out_of_distribution(Positive(raises=False), x, domain=domain)
    assert result.verdict is Verdict.STABLE, result.reason
    assert "contrast x 5: outside of the domain" in result.settings["left_out"]
    assert result.values["invertible_radius"] == math.inf


def test_the_domain_holds_the_data_and_answers_with_one_bool_per_sample():
    with pytest.raises(ValueError, match="24 of 24 samples outside"):
        out_of_distribution(Scale(), data(), domain=constraints.simplex)
    with pytest.raises(TypeError, match="24 bools"):
        out_of_distribution(Scale(), data(), domain=lambda x: x.sum())
    with pytest.raises(TypeError, match=r"constraints\.simplex"):
        out_of_distribution(Scale(), data(), domain="simplex")


def test_other_sets_must_look_like_the_data():
    with pytest.raises(ValueError, match="like those of x"):
        out_of_distribution(Scale(), data(), others={"wrong": torch.zeros(3, 7)})


def test_an_injective_map_is_judged_by_its_latents():
    class Padded(Invertible):
        bijective = False

        def forward(self, x):
            return x[:, :2]

        def inverse(self, z):
            return torch.cat([z, torch.zeros_like(z)], dim=1)

    result = out_of_distribution(Padded(), data(24, 4))
    assert result.verdict is Verdict.STABLE
    assert "none in both directions" in result.settings["left_out"]


def test_images_beside_what_came_back():
    result = out_of_distribution(Scale(), data(6, 1, 8, 8))
    assert result.images["input"].shape == result.images["reconstruction"].shape
    assert len(result.images["input"]) == 1 + sum(
        family.scope.in_range for family in DATA_FAMILIES.values()
    )


def test_no_finite_data():
    assert out_of_distribution(Scale(), data() * math.nan).verdict is Verdict.NON_FINITE


def freia():
    net = FrEIA.framework.SequenceINN(6)
    for _ in range(3):
        net.append(FrEIA.modules.AllInOneBlock, subnet_constructor=nn.Linear)
    return net


def nflows():
    masks = (((torch.arange(6) + k) % 2).int() for k in range(4))
    return CompositeTransform(
        [AffineCouplingTransform(mask, lambda n, m: ResidualNet(n, m, 16)) for mask in masks]
    )


def ours():
    return Chain(*(AffineCoupling(MLP([3, 16, 6])) for _ in range(3)))


@pytest.mark.parametrize("make", first(1, [nflows, freia, ours]), ids=["nflows", "FrEIA", "ours"])
def test_libraries(make):
    torch.manual_seed(0)
    model, x = wrap(make().float().eval()), data(16, 6).float()
    result = out_of_distribution(model, x, samples=8, level=Level.FULL)
    table = rows(result)
    assert table["data"]["verdict"] == "passes"
    assert 0 < table["data"]["max_error"] < 1e-4
    assert table["data"]["log10_sigma_min"] < table["data"]["log10_sigma_max"]
    assert result.values["invertible_radius"] > 1


# the watchdog


class Hanging(Scale):
    """Loops forever on latents beyond a size, as an adaptive solver does on NaN."""

    def inverse(self, z):
        while bool((z.abs() > 100).any()):
            hangs()
        return z / 2


def test_a_loop_is_interrupted_in_any_thread():
    def loop():
        try:
            while True:
                time.sleep(0.001)
        except Exception:  # does not see the interruption
            raise AssertionError from None

    def watched(found):
        with pytest.raises(TimedOut, match="after 0"), time_limit(0.1):
            loop()
        found.append(True)

    found: list[bool] = []
    watched(found)
    thread = threading.Thread(target=watched, args=(found,))
    thread.start()
    thread.join()
    assert found == [True, True]


def test_quick_calls_are_not_disturbed_and_late_interruptions_are_taken_back():
    for _ in range(200):
        try:
            with time_limit(0.002):
                total = sum(range(2000))
        except TimedOut:
            continue
        assert total == 1999000
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:  # an interruption left behind would surface here
        pass


def test_code_that_swallows_the_interruption_is_interrupted_again():
    def stubborn():
        swallowed = 0
        while True:
            try:
                time.sleep(0.001)
            except BaseException:
                swallowed += 1
                if swallowed == 2:
                    raise

    with pytest.raises(TimedOut), time_limit(0.1):
        stubborn()


def test_exceptions_of_the_code_itself_pass():
    with pytest.raises(KeyError), time_limit(5.0):
        raise KeyError("mine")


def test_a_call_that_hangs_is_given_up_and_the_others_are_not(only_hangs_time_out):
    guarded = Guarded(AuditedModel(Hanging()), data(), seconds=0.2)
    z = torch.ones(3, 5)
    assert torch.equal(guarded.inverse(z), z / 2)
    z[1] = 1e3
    assert guarded.inverse(z).isnan().all()
    assert guarded.failures.counts == {"interrupted after 0.2 s": 3}
    z[1] = math.nan
    assert guarded.inverse(z).isnan().any(1).tolist() == [False, True, False]


def test_an_audit_of_a_map_that_hangs_ends(only_hangs_time_out):
    result = out_of_distribution(Hanging(), data())
    assert rows(result)["scale x 100"]["verdict"] == "not finite"
    assert rows(result)["data"]["verdict"] == "passes"
    assert "interrupted" in result.settings["failures"]
    assert result.values["invertible_radius"] < math.inf

"""Models that no adapter knows: what is recognised is what the model means, or an error says what
to pass. The truth is the Jacobian, and the two maps that each model is made of."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

import inn_guard as ig
from inn_guard.adapters.conventions.recognise import Unrecognised
from inn_guard.adapters.conventions.recognised import Recognised
from inn_guard.execution.state import changed_state
from tests.cases.functions import FEATURES, Coupling
from tests.oracles import transforms as reference


class Flow(nn.Module):
    """Two couplings: ``there`` is data -> latent, ``back`` its inverse, each with its log-det."""

    def __init__(self) -> None:
        super().__init__()
        self.couplings = nn.ModuleList([Coupling(), Coupling()])

    def there(self, x):
        total = 0.0
        for coupling in self.couplings:
            x, log_det = coupling(x)
            total = total + log_det
        return x, total

    def back(self, z):
        total = 0.0
        for coupling in reversed(self.couplings):
            z, log_det = coupling.inverse(z)
            total = total + log_det
        return z, total

    def density(self, x):
        z, log_det = self.there(x)
        return -0.5 * z.square().sum(1) - FEATURES / 2 * math.log(2 * math.pi) + log_det


class Reverse(Flow):
    def forward(self, x, reverse=False):
        return self.back(x)[0] if reverse else self.there(x)


class Rev(Flow):
    def forward(self, x, rev: bool):
        return self.back(x) if rev else self.there(x)


class InverseFlag(Flow):
    def forward(self, *xs, inverse=False):
        (x,) = xs
        return self.back(x) if inverse else self.there(x)


class FlagAmongKeywords(Flow):
    def forward(self, x, **options):
        return self.back(x) if options.get("reverse") else self.there(x)


class Mode(Flow):
    def forward(self, inputs, cond_inputs=None, mode="direct", logdets=None):
        assert mode in ("direct", "inverse")
        z, log_det = self.there(inputs) if mode == "direct" else self.back(inputs)
        return z, log_det.unsqueeze(1)


class EncodeDecode(Flow):
    def encode(self, x):
        return self.there(x)

    def decode(self, z):
        return self.back(z)[0]


class Extras(Flow):
    def forward(self, x):
        z, log_det = self.there(x)
        return z, -0.5 * z.square().sum(1), log_det, {"hidden": 2 * z}

    def inverse(self, z):
        return self.back(z)


class LogDetFirst(Flow):
    def forward(self, x):
        return self.there(x)[::-1]

    def inverse(self, z):
        return self.back(z)[::-1]


class ListOfLatents(Flow):
    def forward(self, x):
        z, log_det = self.there(x)
        return [z[:, :2], z[:, 2:].reshape(-1, 2, FEATURES // 2 - 1)], log_det

    def reverse(self, latents):
        first, rest = latents
        return self.back(torch.cat([first, rest.flatten(1)], 1))[0]


class LatentsAsArguments(Flow):
    def forward(self, x):
        z, log_det = self.there(x)
        return z[:, :2], z[:, 2:], log_det

    def inverse(self, first, rest):
        return self.back(torch.cat([first, rest], 1))[0]


class StepsOnTheWay(Flow):
    def forward(self, x):
        steps, total = [x], torch.zeros(len(x))
        for coupling in self.couplings:
            x, log_det = coupling(x)
            steps.append(x)
            total = total + log_det
        return steps, total

    def backward(self, z):
        return [z, self.back(z)[0]], -self.there(self.back(z)[0])[1]


class Summed(Flow):
    def forward(self, x):
        z, log_det = self.there(x)
        return z, log_det.sum()

    def inverse(self, z):
        x, log_det = self.back(z)
        return x, log_det.sum()


class Mean(Flow):
    def forward(self, x):
        z, log_det = self.there(x)
        return z, log_det.mean()

    def inverse(self, z):
        return self.back(z)[0]


class PerDimension(Flow):
    """log|det| before the sum over dimensions, here spread evenly."""

    def forward(self, x):
        z, log_det = self.there(x)
        return z, log_det.unsqueeze(1).expand_as(z) / FEATURES

    def inverse(self, z):
        return self.back(z)[0]


class RunningDensity(Flow):
    def forward(self, x, logpx=None):
        z, log_det = self.there(x)
        return z if logpx is None else (z, logpx - log_det.unsqueeze(1))

    def inverse(self, y, logpy=None):
        x, log_det = self.back(y)
        return x if logpy is None else (x, logpy - log_det.unsqueeze(1))


class RunningLogDet(Flow):
    def forward(self, x, logdet=None, reverse=False):
        z, log_det = self.back(x) if reverse else self.there(x)
        return z if logdet is None else (z, logdet + log_det)


class OnRequest(Flow):
    def forward(self, x, return_logdet=False):
        return self.there(x) if return_logdet else self.there(x)[0]

    def inverse(self, z):
        return self.back(z)[0]


class MethodOfBoth(Flow):
    def forward(self, x):
        return self.there(x)[0]

    def inverse(self, z):
        return self.back(z)[0]

    def log_abs_det_jacobian(self, x, z):
        return self.there(x)[1]


class Generative(Flow):
    """forward is latent -> data, and log_prob shows it."""

    def forward(self, v):
        return self.back(v)

    def inverse(self, v):
        return self.there(v)

    def log_prob(self, x):
        return self.density(x)


class GenerativeByName(Flow):
    def forward(self, z):
        return self.back(z)

    def inverse(self, x):
        return self.there(x)


class MinusInLogProb(Flow):
    """Returns minus the log-determinant, and its own log_prob subtracts it."""

    def forward(self, x):
        z, log_det = self.there(x)
        return z, -log_det

    def inverse(self, z):
        x, log_det = self.back(z)
        return x, -log_det

    def log_prob(self, x):
        return self.density(x)


class Inside(nn.Module):
    """Only log_prob and sample; the map is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = Rev()

    def log_prob(self, x):
        return self.flow.density(x)

    def sample(self, n):
        return self.flow.back(torch.randn(n, FEATURES))[0]


class Mapping(Flow):
    def forward(self, x):
        z, log_det = self.there(x)
        return {"z": z, "ldj": log_det}

    def inverse(self, z):
        return {"x": self.back(z)[0]}


class PlainObject:
    """No module itself."""

    def __init__(self) -> None:
        self.parts = {"flow": Flow()}

    def there(self, x):
        return self.parts["flow"].there(x)

    def encode(self, x):
        return self.parts["flow"].there(x)

    def decode(self, z):
        return self.parts["flow"].back(z)


class Caching(Flow):
    """Keeps keys and values of earlier calls, as autoregressive transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: list[Tensor] = []
        self.sampling = False

    def forward(self, x):
        return self.there(x)

    def reverse(self, z):
        self.sampling = True
        self.cache.append(z)
        return self.back(z)[0]


class ManyOutputs(Flow):
    """As StarFlow returns them: z, a caption, the state after every block, log-dets of blocks."""

    def forward(self, x, y=None, reverse=False, **options):
        if reverse:
            return self.back(x)[0]
        states, log_dets = [x], []
        for coupling in self.couplings:
            x, log_det = coupling(x)
            states += [x, 2 * x, 3 * x, 4 * x]
            log_dets.append(log_det[:, None, None].expand(-1, 2, 2) / 4)
        return x, y, states, log_dets


class SolverTakesOtherSteps(Flow):
    """As FFJORD: the latent moves by the tolerance where a log-determinant is asked for."""

    def forward(self, x, logpx=None, reverse=False):
        off = 0.0 if logpx is None else 1e-5
        y, log_det = self.back(x + 1e-4) if reverse else self.there(x + off)
        return y if logpx is None else (y, logpx - log_det[:, None])


WITH_LOG_DET = [
    *(Reverse, Rev, InverseFlag, FlagAmongKeywords, Mode, EncodeDecode, Extras, LogDetFirst),
    *(ListOfLatents, LatentsAsArguments, StepsOnTheWay, Summed, Mean, PerDimension),
    *(RunningDensity, RunningLogDet, OnRequest, MethodOfBoth, Generative, GenerativeByName),
    *(MinusInLogProb, Inside, Mapping, PlainObject, Caching, ManyOutputs),
]


def truth(model, x):
    """z and the log-determinant of every sample, from the two couplings and the Jacobian."""
    flow = next(part for part in [model, *_held(model)] if hasattr(part, "there"))
    z, _ = flow.there(x)
    return z, reference.log_abs_det(reference.jacobian(lambda x: flow.there(x)[0], x))


def _held(model):
    return model.modules() if isinstance(model, nn.Module) else []


@pytest.mark.parametrize("kind", WITH_LOG_DET, ids=lambda kind: kind.__name__)
def test_directions_and_log_determinant_are_recognised(kind):
    model, x = kind(), torch.randn(7, FEATURES)
    wrapped = ig.wrap(model, x=x)
    z, log_det = truth(model, x)
    assert isinstance(wrapped, Recognised)
    torch.testing.assert_close(wrapped(x).flatten(1), z)
    torch.testing.assert_close(wrapped.inverse(wrapped(x)), x)
    torch.testing.assert_close(wrapped.forward_and_log_det(x)[1], log_det)
    assert wrapped.name == kind.__name__
    copied = wrapped.to_dtype(torch.float32)
    torch.testing.assert_close(copied(x.float()).double(), wrapped(x), rtol=1e-4, atol=1e-4)
    if isinstance(model, nn.Module):
        assert {id(p) for p in wrapped.parameters()} == {id(p) for p in model.parameters()}


class RunningObjective(Flow):
    """As Glow: adds its log-determinant to the objective that it is given."""

    def forward(self, x, objective=None, reverse=False):
        z, log_det = self.back(x) if reverse else self.there(x)
        return z if objective is None else (z, objective + log_det)


@pytest.mark.parametrize("kind", [RunningDensity, RunningObjective, RunningLogDet])
def test_small_log_determinants_have_the_right_sign(kind):
    """As of a fresh FFJORD: they agree with their negatives to the tolerance of a solver."""
    model, x = kind(), torch.randn(7, FEATURES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.01)
    log_det = truth(model, x)[1]
    assert 1e-6 < log_det.abs().max() < 0.02
    torch.testing.assert_close(ig.wrap(model, x=x).forward_and_log_det(x)[1], log_det)


class Estimated(Flow):
    """Returns a random estimate of its log-determinant."""

    def forward(self, x):
        z, log_det = self.there(x)
        return z, log_det + torch.randn(len(x))

    def inverse(self, z):
        return self.back(z)[0]


def test_a_log_determinant_that_differs_by_call_is_said_to_be_random():
    wrapped = ig.wrap(Estimated(), x=torch.randn(7, FEATURES))
    assert "log_det differs from call to call" in wrapped.convention


@pytest.mark.parametrize("kind", [Reverse, ListOfLatents, Summed, RunningDensity, Inside])
def test_audits_recognise_by_themselves_and_say_so(kind):
    report = ig.audit(kind(), torch.randn(16, FEATURES), level="quick")
    assert report.verdict.passed
    assert report["log_det"].verdict == "stable"
    assert "  recognised       encode = " in str(report)


@pytest.mark.parametrize("kind", [Caching, Reverse, Mean])
def test_trials_leave_no_trace(kind):
    model = kind()
    model.couplings[0].eval()
    modes = [module.training for module in model.modules()]
    plain = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    state = torch.get_rng_state()
    with changed_state(model) as changed:
        ig.wrap(model, x=torch.ones(4, FEATURES))
    assert changed == []
    assert modes == [module.training for module in model.modules()]
    assert plain == {name: value for name, value in vars(model).items() if not name.startswith("_")}
    assert getattr(model, "cache", []) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_latents_of_solvers_agree_up_to_their_error():
    model, x = SolverTakesOtherSteps(), torch.randn(7, FEATURES)
    _, log_det = truth(model, x)
    own = ig.wrap(model, x=x).forward_and_log_det(x)[1]
    torch.testing.assert_close(own, log_det, rtol=1e-3, atol=1e-3)


class Several(Flow):
    """As bgflow: several tensors, (B, 1) log-determinants."""

    def forward(self, *xs, inverse=False):
        joined = torch.cat([x.flatten(1) for x in xs], 1)
        y, log_det = self.back(joined) if inverse else self.there(joined)
        first = y[:, : xs[0][0].numel()].reshape(xs[0].shape)
        return (first, y[:, first[0].numel() :].reshape(xs[1].shape), log_det[:, None])


class AsOneTuple(Several):
    def forward(self, xs, reverse=False):
        return super().forward(*xs, inverse=reverse)


class Streams(nn.Module):
    """As reversible transformers: two streams in, two streams out."""

    def forward(self, x1, x2):
        y1 = x1 + torch.tanh(x2)
        return y1, x2 + torch.tanh(y1)

    def inverse(self, y1, y2):
        x2 = y2 - torch.tanh(y1)
        return y1 - torch.tanh(x2), x2


@pytest.mark.parametrize("kind", [Several, AsOneTuple], ids=lambda kind: kind.__name__)
def test_models_of_several_tensors_take_them_joined(kind):
    model, x = kind(), torch.randn(16, FEATURES)
    parts = (x[:, :2].reshape(16, 2, 1), x[:, 2:])
    wrapped = ig.wrap(model, x=parts)
    z, log_det = truth(model, x)
    assert torch.equal(wrapped.pack(*parts), x)
    torch.testing.assert_close(wrapped(x), z)
    torch.testing.assert_close(wrapped.inverse(z), x)
    torch.testing.assert_close(wrapped.forward_and_log_det(x)[1], log_det)
    assert ig.audit(model, parts, level="quick").verdict.passed
    with pytest.raises(ValueError, match=r"expected 2 tensors for \w+ with shapes"):
        wrapped.pack(*parts[::-1])


def test_one_tensor_for_a_model_of_several_is_refused_and_the_advice_works():
    x = torch.randn(8, FEATURES)
    for model in (Several(), Streams()):
        with pytest.raises(TypeError, match=r"pass them as a tuple: x=\(first, second\)"):
            ig.audit(model, x)
        assert ig.audit(model, tuple(x.chunk(2, 1)), level="quick").verdict.passed


def test_a_base_that_log_prob_uses_is_declared():
    x = torch.randn(5, FEATURES)
    assert ig.wrap(Generative(), x=x).base().draw(3, seed=0).shape == (3, FEATURES)
    assert ig.wrap(Reverse(), x=x).base() is None
    model = Inside()
    torch.testing.assert_close(ig.wrap(model, x=x).log_prob(x), model.log_prob(x))


def test_a_wrong_sign_is_found_and_the_advice_works():
    class WrongSign(Flow):
        def forward(self, x):
            z, log_det = self.there(x)
            return z, -log_det

        def inverse(self, z):
            return self.back(z)[0]

    model, x = WrongSign(), torch.randn(16, FEATURES)
    report = ig.audit(model, x, level="quick")
    assert report.uses["density"].verdict == "unstable"
    shown = " ".join(str(report).split())
    assert "log_det is minus that of autograd" in shown
    assert "log_det=lambda x: -model(x)[1])" in shown
    meant = ig.wrap(
        encode=lambda x: model(x)[0], decode=model.inverse, log_det=lambda x: -model(x)[1]
    )
    assert ig.audit(meant, x, level="quick").uses["density"].verdict == "stable"


def test_a_mean_over_dimensions_is_found_and_the_factor_named():
    class PerDimensionMean(Flow):
        def forward(self, x):
            z, log_det = self.there(x)
            return z, log_det / FEATURES

        def reverse(self, z):
            return self.back(z)[0]

    wrapped = ig.wrap(PerDimensionMean(), x=torch.randn(8, FEATURES))
    assert f"log_det=lambda x: {FEATURES} * model(x)[1]" in wrapped.convention


def test_context_reaches_both_directions_by_position_or_name():
    class Conditional(Flow):
        def forward(self, x, reverse=False, cond=None):
            return self.back(x - cond)[0] if reverse else self._shifted(x, cond)

        def _shifted(self, x, cond):
            z, log_det = self.there(x)
            return z + cond, log_det

    x, c = torch.randn(5, FEATURES), torch.randn(5, FEATURES)
    wrapped = ig.wrap(Conditional(), context=c, x=x)
    torch.testing.assert_close(wrapped.inverse(wrapped(x)), x)
    part = wrapped.select(torch.tensor([3]))
    torch.testing.assert_close(part(x[3:4]), wrapped(x)[3:4])


def test_functions_with_a_flag_and_given_directions_are_read_alike():
    net, x = Extras(), torch.randn(5, FEATURES)

    def mapped(v, reverse=False):
        return net.inverse(v)[0] if reverse else net(v)

    z, log_det = truth(net, x)
    flagged = ig.wrap(mapped, x=x)
    given = ig.wrap(encode=net, decode=net.inverse, x=x)
    for wrapped in (flagged, given):
        torch.testing.assert_close(wrapped(x), z)
        torch.testing.assert_close(wrapped.forward_and_log_det(x)[1], log_det)
        assert [id(p) for p in wrapped.parameters()] == [id(p) for p in net.parameters()]


def test_images_with_several_scales():
    class TwoScales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(3, 4, 4) + 0.5)

        def forward(self, x):
            y = x * self.scale
            log_det = self.scale.log().sum().expand(len(x))
            return log_det, [y[:, :1], y[:, 1:]]

        def reverse(self, latents):
            return torch.cat(latents, 1) / self.scale

    report = ig.audit(TwoScales(), torch.randn(8, 3, 4, 4), level="quick")
    assert report.verdict.passed
    assert report["log_det"].verdict == "stable"


def test_switches_of_the_way_back_are_tried():
    class Reconstructing(Flow):
        """Draws the second latent anew unless it is told to reconstruct."""

        def forward(self, x):
            z, log_det = self.there(x)
            return -0.5 * z.square().sum(1), log_det, [z[:, :2], z[:, 2:]]

        def reverse(self, latents, reconstruct=False):
            rest = latents[1] if reconstruct else torch.randn_like(latents[1])
            return self.back(torch.cat([latents[0], rest], 1))[0]

    model, x = Reconstructing(), torch.randn(6, FEATURES)
    wrapped = ig.wrap(model, x=x)
    torch.testing.assert_close(wrapped.inverse(wrapped(x)), x)
    torch.testing.assert_close(wrapped.forward_and_log_det(x)[1], truth(model, x)[1])
    assert "reconstruct=True" in wrapped.convention


# what is refused


class NeedsCondition(Flow):
    def forward(self, x, condition, reverse=False):
        return self.back(x - condition)[0] if reverse else self.there(x)[0] + condition


def test_a_missing_condition_is_named_and_the_advice_works():
    x = torch.randn(8, FEATURES)
    with pytest.raises(Unrecognised, match=r"If the model is conditional, pass context=c\."):
        ig.audit(NeedsCondition(), x)
    assert ig.audit(NeedsCondition(), x, context=x.clone(), level="quick").verdict.passed


class SplitOff(Flow):
    """Half of the latents is drawn anew on the way back."""

    def encode(self, x):
        return self.there(x)[0][:, : FEATURES // 2]

    def decode(self, z):
        return self.back(torch.cat([z, torch.randn_like(z)], 1))[0]


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, 2 * FEATURES)

    def encode(self, x):
        return self.net(x).chunk(2, 1)

    def decode(self, z):
        return z @ self.net.weight[:FEATURES]


class TwoMaps(Flow):
    def encode(self, x):
        return 2 * x

    def decode(self, z):
        return z / 2

    def flow(self, x, reverse=False):
        return self.back(x)[0] if reverse else self.there(x)[0]


class Raising(Flow):
    def forward(self, x, reverse=False):
        raise RuntimeError("expected a batch of graphs")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (SplitOff, r"z has 3 of 6 numbers: let encode return every latent"),
        (Autoencoder, r"come back to x; the best, wrap\(encode=lambda x: model.encode\(x\)\[\d\]"),
        (TwoMaps, r"differ in z: pass wrap\(encode=lambda x: model.encode\(x\), .* or wrap\("),
        (Raising, r"tried model\(x\): RuntimeError: expected a batch of graphs"),
    ],
)
def test_what_fits_nothing_or_too_much_is_refused(kind, message):
    with pytest.raises(Unrecognised, match=message):
        ig.audit(kind(), torch.randn(8, FEATURES))


def test_without_data_the_error_says_what_to_pass_and_it_works():
    model, x = Rev(), torch.randn(8, FEATURES)
    with pytest.raises(TypeError, match=r"perhaps model\(x, rev=False\) with .*wrap\(model, x=b"):
        ig.RegularizerHook(model, ig.FiniteDifferences(1e-3))
    hook = ig.RegularizerHook(ig.wrap(model, x=x), ig.FiniteDifferences(1e-3), every=1)
    assert hook(x) > 0
    assert ig.AuditHook(model, x, every=1)().verdict.passed
    with pytest.raises(TypeError, match="shows its density and no map x -> z"):
        ig.wrap(torch.distributions.Normal(torch.zeros(2), torch.ones(2)), x=torch.zeros(3, 2))


def test_a_broken_model_is_reported_not_refused():
    class Exploding(Flow):
        def forward(self, x, reverse=False):
            return x / 1e-44 if reverse else x * 1e-44

    class Wrong(Flow):
        def forward(self, x):
            return self.there(x)

        def inverse(self, z):
            return self.back(z)[0] + 1

    x = torch.randn(16, FEATURES)
    assert ig.audit(Exploding().float(), x.float(), level="quick").verdict.failed
    assert ig.audit(Wrong(), x, level="quick").uses["reconstruction"].verdict == "unstable"


# modules in callables


def test_modules_are_found_in_defaults_decorators_partials_and_attributes():
    net, x = Reverse(), torch.randn(4, FEATURES)

    @torch.no_grad()
    def decorated(z):
        return net(z, reverse=True)

    class Tool:
        def __init__(self) -> None:
            self.inner = functools.partial(lambda v, n: n(v)[0], n=net)

        def run(self, v):
            return self.inner(v)

    encoders = [lambda x, net=net: net(x), lambda x, *, net=net: net(x), Tool().run]
    for encode in encoders:
        model = ig.wrap(encode=encode, decode=decorated)
        assert {id(p) for p in model.parameters()} == {id(p) for p in net.parameters()}
        copied = model.to_dtype(torch.float32)
        assert copied(x.float()).dtype == copied.inverse(x.float()).dtype == torch.float32
        assert model(x).dtype == torch.float64

"""Base distributions: samples of a library are inverses of our draws; densities are its own."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
import zuko
from nflows import distributions, flows, transforms
from nflows.nn.nets import ResidualNet
from torch import nn
from torch.distributions import AffineTransform, LogNormal, Normal, TransformedDistribution

import inn_guard as ig
from inn_guard.adapters import wrap
from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import MissingContextError, NotApplicable
from tests.adapters.test_sbi import THETA, X, nflows_estimator, zuko_estimator
from tests.cases.case import randomize, seeded

FEATURES, CONTEXT, N, SEED = 4, 3, 6, 17


@pytest.fixture(autouse=True)
def _single_precision():
    """Libraries draw in the default dtype: their samples are compared bit for bit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def nflows_flow(base: nn.Module | None = None, *, context: bool = False) -> flows.Flow:
    def network(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, 8, context_features=CONTEXT if context else None)

    mask = torch.arange(FEATURES) % 2
    chain = [transforms.AffineCouplingTransform(m, network) for m in (mask, 1 - mask)]
    base = distributions.StandardNormal([FEATURES]) if base is None else base
    return flows.Flow(transforms.CompositeTransform(chain), base)


def normflows_flows() -> list[nn.Module]:
    return [
        nf.flows.AffineCouplingBlock(nf.nets.MLP([FEATURES // 2, 8, FEATURES])),
        nf.flows.Permute(FEATURES, mode="swap"),
    ]


def normflows_flow(base: nn.Module) -> nn.Module:
    return nf.NormalizingFlow(base, normflows_flows())


def normflows_conditional() -> nn.Module:
    spline = nf.flows.CoupledRationalQuadraticSpline(FEATURES, 1, 8, num_context_channels=CONTEXT)
    base = nf.distributions.DiagGaussian(FEATURES, trainable=False)
    return nf.ConditionalNormalizingFlow(base, [spline])


def normflows_classes() -> nn.Module:
    base = nf.distributions.ClassCondDiagGaussian(FEATURES, CONTEXT)
    return nf.ClassCondFlow(base, normflows_flows())


def normflows_multiscale(*, classes: bool = False) -> nn.Module:
    glow = [nf.flows.GlowBlock(channels, 4) for channels in (4, 8)]
    number = CONTEXT if classes else None
    bases = [nf.distributions.GlowBase(shape, number) for shape in ((8, 1, 1), (2, 2, 2))]
    levels = [[glow[1], nf.flows.Squeeze()], [glow[0], nf.flows.Squeeze()]]
    return nf.MultiscaleFlow(bases, levels, [nf.flows.Merge()], class_cond=classes)


def settled(model: nn.Module) -> nn.Module:
    """The model in evaluation mode with random weights."""
    with seeded(3, torch.float32):
        randomize(model, 0.3)
    for part in model.modules():
        if hasattr(part, "data_dep_init_done"):
            part.data_dep_init_done.fill_(1.0)
    return model.eval()


ROWS = torch.randn(N, CONTEXT, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
LABELS = torch.arange(N) % CONTEXT


def sample_nflows(model, context):
    if context is None:
        return model.sample(N)
    return model.sample(1, context)[:, 0]


def sample_normflows(model, context):
    return model.sample(N)[0] if context is None else model.sample(N, context)[0]


def sample_zuko(model, context):
    return model(context).sample((N,) if context is None else ())


MODELS = {
    "nflows": (nflows_flow, None, sample_nflows),
    "nflows, conditional": (lambda: nflows_flow(context=True), ROWS, sample_nflows),
    "nflows, conditional base": (
        lambda: nflows_flow(
            distributions.ConditionalDiagonalNormal([FEATURES], nn.Linear(CONTEXT, 2 * FEATURES)),
            context=True,
        ),
        ROWS,
        sample_nflows,
    ),
    "normflows": (
        lambda: normflows_flow(nf.distributions.DiagGaussian(FEATURES)),
        None,
        sample_normflows,
    ),
    "normflows, uniform": (
        lambda: normflows_flow(nf.distributions.base.Uniform(FEATURES)),
        None,
        sample_normflows,
    ),
    "normflows, mixture": (
        lambda: normflows_flow(nf.distributions.GaussianMixture(2, FEATURES).float()),
        None,
        sample_normflows,
    ),
    "normflows, conditional": (normflows_conditional, ROWS, sample_normflows),
    "normflows, classes": (normflows_classes, LABELS, sample_normflows),
    "normflows, multiscale": (normflows_multiscale, None, sample_normflows),
    "normflows, multiscale, classes": (
        lambda: normflows_multiscale(classes=True),
        LABELS,
        sample_normflows,
    ),
    "zuko": (lambda: zuko.flows.NICE(FEATURES, transforms=2), None, sample_zuko),
    "zuko, splines": (lambda: zuko.flows.NSF(FEATURES, transforms=2), None, sample_zuko),
    "zuko, uniform": (lambda: zuko.flows.NCSF(FEATURES, transforms=2), None, sample_zuko),
    "zuko, conditional": (
        lambda: zuko.flows.MAF(FEATURES, CONTEXT, transforms=2),
        ROWS,
        sample_zuko,
    ),
}


@pytest.fixture(params=MODELS, ids=str)
def sampled(request) -> tuple[nn.Module, Invertible, object, object]:
    make, context, sample = MODELS[request.param]
    with seeded(2, torch.float32):
        library = settled(make())
    return library, wrap(library, context=context), context, sample


@torch.no_grad()
def test_the_librarys_samples_are_inverses_of_our_draws_bit_for_bit(sampled):
    library, model, context, sample = sampled
    z = model.base().draw(N, SEED)
    with seeded(SEED, torch.float32):
        expected = sample(library, context)
    assert torch.equal(model.inverse(z), expected)


@torch.no_grad()
def test_densities_are_those_of_the_library(sampled):
    library, model, context, _sample = sampled
    x = model.inverse(model.base().draw(N, SEED))
    if isinstance(library, zuko.flows.Flow):
        expected = library(context).log_prob(x)
    elif context is None and not isinstance(library, nf.MultiscaleFlow):
        expected = library.log_prob(x)
    else:
        expected = library.log_prob(x, context)
    torch.testing.assert_close(model.log_prob(x), expected, rtol=1e-5, atol=1e-5)
    z, log_det = model.forward_and_log_det(x)
    torch.testing.assert_close(model.base().log_prob(z) + log_det, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_deviations_are_those_of_the_draws(sampled):
    _library, model, _context, _sample = sampled
    base = model.base()
    assert base.declared
    draws = base.draw(4000, seed=1)
    assert base.deviation.shape == draws.shape[1:]
    assert base.deviation.dtype == draws.dtype == torch.float32
    torch.testing.assert_close(base.deviation, draws.std(0), rtol=0.15, atol=0)


def test_standard_normal_deviations_are_exact():
    for model in (
        wrap(nflows_flow()),
        wrap(normflows_flow(nf.distributions.DiagGaussian(FEATURES))),
        wrap(zuko.flows.NICE(FEATURES)),
        wrap(zuko.flows.NICE(FEATURES, CONTEXT), context=ROWS),
    ):
        assert torch.equal(model.base().deviation, torch.ones(FEATURES))


@torch.no_grad()
def test_the_temperature_is_one_whatever_was_set_before():
    library = settled(normflows_multiscale())
    expected = wrap(library).base().draw(N, SEED)
    library.set_temperature(0.1)
    assert torch.equal(wrap(library).base().draw(N, SEED), expected)
    assert library.q0[0].temperature == 0.1


@pytest.mark.parametrize("make", [nflows_estimator, zuko_estimator])
@torch.no_grad()
def test_estimators_of_sbi_take_observations(make):
    with seeded(2, torch.float32):
        estimator = make().float()
    observations = torch.randn(N, X)
    model = wrap(estimator, context=observations)
    z = model.base().draw(N, SEED)
    assert z.shape == (N, THETA)
    other = model.base().draw(2 * N, SEED, context=torch.cat([observations, observations]))
    assert other.shape == (2 * N, THETA)
    theta = model.inverse(z)
    with seeded(SEED, torch.float32):
        if isinstance(estimator.net, flows.Flow):
            expected = estimator.net.sample(1, observations)[:, 0]
        else:
            expected = estimator.net(estimator.embedding_net(observations)).sample()
    assert torch.equal(theta, expected)


def test_bare_transforms_declare_no_base():
    assert wrap(transforms.RandomPermutation(FEATURES)).base() is None
    assert wrap(normflows_flows()[0]).base() is None
    assert wrap(encode=lambda x: x, decode=lambda z: z).base() is None
    assert wrap(torch.distributions.transforms.ExpTransform()).base() is None


def test_a_base_that_the_library_cannot_sample_says_so():
    base = wrap(nflows_flow(distributions.DiagonalNormal([FEATURES]))).base()
    with pytest.raises(NotApplicable, match="no samples of the DiagonalNormal of nflows"):
        base.draw(2, seed=0)
    assert torch.equal(base.deviation, torch.ones(FEATURES))


# Transformed distributions of torch


def test_a_transformed_distribution_is_a_model():
    normal = Normal(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]))
    shifted = TransformedDistribution(normal, [AffineTransform(2.0, torch.tensor([4.0, 5.0, 6.0]))])
    model = wrap(shifted)
    assert model.name == "TransformedDistribution"
    z = model.base().draw(N, SEED)
    with seeded(SEED, torch.float32):
        expected = shifted.sample((N,))
    assert torch.equal(model.inverse(z), expected)
    torch.testing.assert_close(model(expected), z)
    torch.testing.assert_close(model.log_prob(expected), shifted.log_prob(expected).sum(1))
    assert torch.equal(model.base().deviation, torch.tensor([1.0, 2.0, 3.0]))
    assert model.to_dtype(torch.float64)(expected.double()).dtype == torch.float64


def test_subclasses_and_parameters_of_transformed_distributions():
    location = nn.Parameter(torch.zeros(2))
    model = wrap(LogNormal(location, torch.ones(2)))
    assert model.name == "LogNormal"
    assert [id(p) for p in model.parameters()] == [id(location)]
    x = model.inverse(model.base().draw(N, SEED))
    expected = LogNormal(location, torch.ones(2)).log_prob(x).sum(1)
    torch.testing.assert_close(model.log_prob(x), expected)


# Missing contexts


@pytest.mark.parametrize(
    "library",
    [
        nflows_flow(context=True),
        normflows_conditional(),
        zuko.flows.MAF(FEATURES, CONTEXT),
        zuko.flows.NICE(FEATURES, CONTEXT),
    ],
    ids=lambda library: type(library).__module__,
)
def test_a_missing_context_is_named(library):
    x = torch.randn(N, FEATURES, dtype=torch.float32)
    with pytest.raises(MissingContextError, match=f"no context; pass context=c .* {N} samples"):
        wrap(library.float())(x)


def test_an_audit_names_the_missing_context_and_not_the_shape():
    flow = nflows_flow(context=True).eval()
    message = "^forward of the model raises MissingContextError: Flow is conditional"
    with pytest.raises(ValueError, match=message):
        ig.audit(flow, torch.randn(N, FEATURES), level="quick")


def test_other_errors_are_the_librarys():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        wrap(zuko.flows.MAF(FEATURES))(torch.randn(N, FEATURES + 1))

"""The normflows adapter beyond the contract: directions, exceptions, multiscale, contexts."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from normflows.distributions.base import ConditionalDiagGaussian

from inn_guard.adapters import wrap
from inn_guard.core.invertible import NotApplicable
from inn_guard.execution.state import changed_state
from inn_guard.memory_saving import memory_saving
from tests.cases.normflows import (
    CASES,
    CLASSES,
    CONTEXT,
    EXCEPTIONS,
    FEATURES,
    block,
    class_conditional,
    conditional,
    image_block,
    masked,
    mlp,
    model,
    multiscale,
    residual,
)
from tests.oracles import transforms as reference


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def target() -> torch.nn.Module:
    return nf.distributions.DiagGaussian(FEATURES, trainable=False)


def test_every_flow_and_model_of_the_library_is_a_case_or_an_exception():
    flows = {name for name, value in vars(nf.flows).items() if isinstance(value, type)} | {
        "Logit",
        "Shift",
    }
    models = {name for name, value in vars(nf.core).items() if isinstance(value, type)}
    covered = {case.id.removeprefix("normflows-").split("-")[0] for case in CASES}
    excepted = {
        word.strip(",").split("(")[0].split("-")[0] for name in EXCEPTIONS for word in name.split()
    }
    assert flows | models <= covered | excepted


def test_forward_is_the_librarys_inverse():
    built = model().double()
    z = normal(3, FEATURES)
    x, log_det = built.forward_and_log_det(z)
    wrapped = wrap(built)
    torch.testing.assert_close(wrapped(x), z)
    torch.testing.assert_close(wrapped.inverse(z), x)
    torch.testing.assert_close(wrapped.forward_and_log_det(x)[1], -log_det, rtol=1e-4, atol=1e-5)


def test_log_prob_is_that_of_the_model():
    built, x = model().double(), normal(3, FEATURES)
    torch.testing.assert_close(wrap(built).log_prob(x), built.log_prob(x))
    base = built.q0.log_prob(wrap(built)(x))
    torch.testing.assert_close(
        wrap(built).log_prob(x), base + wrap(built).forward_and_log_det(x)[1]
    )


# Every entry of EXCEPTIONS fails for its stated reason.


@pytest.mark.parametrize(
    "flow", [nf.flows.Planar((FEATURES,)), nf.flows.Radial((FEATURES,)), nf.flows.BatchNorm()]
)
def test_what_has_no_inverse_says_so_and_still_samples(flow):
    wrapped = wrap(flow.double())
    with pytest.raises(NotApplicable, match="no algebraic inverse"):
        wrapped(normal(3, FEATURES))
    assert wrapped.inverse(normal(3, FEATURES)).shape == (3, FEATURES)


def test_batch_norm_leaves_out_the_derivatives_of_its_statistics():
    wrapped, z = wrap(nf.flows.BatchNorm().double().eval()), normal(3, FEATURES)
    alone = z[:1] + 1e-3 * normal(3, FEATURES)
    assert not torch.allclose(
        wrapped.inverse(z)[:1], wrapped.inverse(torch.cat([z[:1], alone]))[:1]
    )
    joint = torch.autograd.functional.jacobian(wrapped.inverse, z).reshape(z.numel(), z.numel())
    assert (
        torch.linalg.svdvals(joint)[-1] < 1e-8
    )  # of all samples together: no map with a finite log-determinant
    assert wrapped.module(z)[1].isfinite().all()


def test_a_residual_estimates_its_log_det():
    torch.manual_seed(0)
    wrapped, x = wrap(residual().double().eval()), normal(3, FEATURES)
    first, second = (wrapped.forward_and_log_det(x)[1] for _ in range(2))
    assert (first - second).abs().max() > 1e-3
    exact = wrap(residual(exact_trace=True).double().eval())
    truth = reference.log_abs_det(reference.jacobian(exact.forward, x))
    torch.testing.assert_close(exact.forward_and_log_det(x)[1], truth, rtol=1e-3, atol=1e-3)


def test_periodic_wrap_outside_its_bound_forgets_where_it_was():
    wrapped = wrap(nf.flows.PeriodicWrap([0]).double())
    x = torch.tensor([[1.5, 0.0]])
    torch.testing.assert_close(wrapped.inverse(wrapped(x)), torch.tensor([[-0.5, 0.0]]))


def test_a_fresh_actnorm_sets_its_parameters_at_the_first_call():
    wrapped = wrap(nf.flows.ActNorm(FEATURES).double().eval())
    with changed_state(wrapped) as changed:
        wrapped(normal(3, FEATURES))
    assert changed


def test_markov_chains_are_no_maps():
    proposal = nf.distributions.DiagGaussianProposal((FEATURES,), 0.5)
    chains = [
        nf.flows.MetropolisHastings(target(), proposal, 20),
        nf.flows.HamiltonianMonteCarlo(target(), 2, torch.zeros(FEATURES), torch.zeros(FEATURES)),
    ]
    for chain in chains:
        wrapped, x = wrap(chain.double()), normal(3, FEATURES)
        assert not torch.allclose(wrapped.inverse(wrapped(x)), x, atol=1e-2)


@pytest.mark.parametrize(
    "part", [nf.flows.Split(), nf.flows.Merge(), nf.flows.AffineCoupling(mlp(3, 6))]
)
def test_parts_that_map_lists_are_refused(part):
    with pytest.raises(TypeError, match="which maps lists"):
        wrap(part)


def test_the_abstract_flow_has_no_direction():
    with pytest.raises(NotApplicable):
        wrap(nf.flows.Flow())(normal(3, 2))


def test_other_objects_are_refused():
    vae = nf.NormalizingFlowVAE(target(), flows=[block()])
    with pytest.raises(TypeError, match="got NormalizingFlowVAE"):
        wrap(vae)
    with pytest.raises(TypeError, match="got DiagGaussian"):
        wrap(target())


def test_a_coupling_block_in_a_conditional_flow_fails_as_it_does_in_the_library():
    built = nf.ConditionalNormalizingFlow(target(), [block()]).double()
    x, context = normal(3, FEATURES), normal(3, CONTEXT)
    with pytest.raises(TypeError, match="context"):
        built.inverse(x, context=context)
    with pytest.raises(TypeError, match="context"):
        wrap(built, context=context)(x)
    with pytest.raises(TypeError, match="AffineCouplingBlock takes no context"):
        wrap(built, context=context).layers()[0](x)


def test_cached_linear_maps_have_no_inverse_with_this_torch():
    flow = nf.flows.LULinearPermute(FEATURES).double().eval()
    flow.linear.use_cache(True)
    with pytest.raises((AttributeError, TypeError)):
        wrap(flow).inverse(normal(3, FEATURES))


# Layers


def test_nesting_is_opened_from_data_to_latent():
    inner = nf.flows.Composite([masked(), nf.flows.AffineConstFlow(FEATURES)])
    flow = nf.flows.Composite([nf.flows.Permute(FEATURES), nf.flows.Reverse(inner), block()])
    names = [layer.name for layer in wrap(flow).layers()]
    assert names == [
        "AffineCouplingBlock",
        "inverse MaskedAffineFlow",
        "inverse AffineConstFlow",
        "Permute",
    ]


def test_a_glow_block_is_three_layers():
    names = [layer.name for layer in wrap(nf.flows.GlowBlock(4, 6)).layers()]
    assert names == ["ActNorm", "Invertible1x1Conv", "AffineCouplingBlock"]


# Multiscale


@pytest.mark.parametrize("mode", ["channel", "checkerboard"])
def test_latents_are_those_of_the_library_finished_first(mode):
    built = multiscale(mode, None).double()
    x = normal(2, 1, 8, 8)
    wrapped = wrap(built)
    latents, log_det = built.inverse_and_log_det(x.clone())
    z, ours = wrapped.forward_and_log_det(x)
    assert torch.equal(ours, log_det)
    assert torch.equal(z[:, : latents[-1][0].numel()], latents[-1].flatten(1))
    assert all(torch.equal(a, b) for a, b in zip(wrapped.unpack(z), latents, strict=True))
    torch.testing.assert_close(wrapped.log_prob(x), built.log_prob(x.clone(), None))


def test_labels_reach_the_base_of_a_multiscale_flow():
    built = multiscale().double()
    x, y = normal(3, 1, 8, 8), torch.eye(CLASSES)
    for base in built.q0:
        base.loc_cc.data.normal_()
    wrapped = wrap(built, context=y)
    torch.testing.assert_close(wrapped.log_prob(x), built.log_prob(x.clone(), y))
    assert not torch.allclose(wrapped.log_prob(x), wrapped.with_context(y.roll(1, 0)).log_prob(x))
    assert torch.equal(wrapped(x), wrap(built)(x))


def test_bases_without_a_shape_are_named():
    built = nf.MultiscaleFlow(
        [nf.distributions.GaussianMixture(2, 4)], [[block()]], [], class_cond=False
    )
    with pytest.raises(NotApplicable, match="no attribute shape"):
        wrap(built.double()).inverse(normal(2, 4))


# Contexts


def test_context_reaches_layers_and_base():
    built, x, context = conditional().double(), normal(4, FEATURES), normal(4, CONTEXT)
    wrapped = wrap(built, context=context)
    torch.testing.assert_close(wrapped.log_prob(x), built.log_prob(x, context=context))
    z = x
    for layer in wrapped.layers():
        z = layer(z)
    torch.testing.assert_close(z, built.inverse(x, context=context))
    assert isinstance(built.q0, ConditionalDiagGaussian)


def test_labels_reach_the_base_of_a_class_conditional_flow():
    built, x, y = class_conditional().double(), normal(3, FEATURES), torch.eye(CLASSES)
    built.q0.loc.data.normal_()
    torch.testing.assert_close(wrap(built, context=y).log_prob(x), built.log_prob(x, y))
    with pytest.raises(ValueError, match="expected the class labels"):
        wrap(built).log_prob(x)


def test_a_context_that_nothing_takes_is_refused():
    with pytest.raises(TypeError, match="expected no context"):
        wrap(model(), context=normal(3, CONTEXT))
    with pytest.raises(TypeError, match="AffineCouplingBlock takes no context"):
        wrap(block().double(), context=normal(3, CONTEXT))(normal(3, FEATURES))


def test_a_failing_assertion_of_a_spline_names_its_layer():
    class Careful(nf.flows.Flow):
        def inverse(self, z):
            raise AssertionError

    with pytest.raises(ValueError, match="Careful: an assertion of the library failed"):
        wrap(Careful())(normal(3, 2))


# Memory saving

COUPLINGS = {
    "exp": lambda: block(),
    "sigmoid": lambda: block("sigmoid"),
    "additive": lambda: block(scale=False),
    "swapped": lambda: block(split_mode="channel_inv"),
    "checkerboard": lambda: image_block("checkerboard"),
    "masked": masked,
    "spline": lambda: nf.flows.CoupledRationalQuadraticSpline(FEATURES, 1, 8),
}


@pytest.mark.parametrize("kind", COUPLINGS)
def test_a_primed_coupling_is_the_same_map_and_evaluates_nothing_again(kind):
    layer = wrap(COUPLINGS[kind]().double())
    x = normal(3, 4, 4, 4) if kind == "checkerboard" else normal(3, FEATURES)
    z, log_det = layer.forward_and_log_det(x)
    with_cached_conditioner = layer.with_cached_conditioner(z.detach())
    again, log_det_again = with_cached_conditioner.forward_and_log_det(x)
    torch.testing.assert_close(
        with_cached_conditioner.inverse(z), layer.inverse(z), rtol=0, atol=1e-13
    )
    torch.testing.assert_close(again, z, rtol=0, atol=1e-13)
    torch.testing.assert_close(log_det_again, log_det, rtol=0, atol=1e-13)
    assert (with_cached_conditioner is layer) == (
        kind == "spline"
    )  # its kept part is transformed too


@pytest.mark.parametrize("kind", COUPLINGS)
def test_memory_saving_gradients_are_the_true_ones(kind):
    torch.manual_seed(0)
    couplings = [COUPLINGS[kind]().double() for _ in range(2)]
    for parameter in (p for coupling in couplings for p in coupling.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    built = wrap(
        nf.NormalizingFlow(
            target(),
            [
                couplings[0],
                nf.flows.Permute(4 if kind == "checkerboard" else FEATURES),
                couplings[1],
            ],
        )
    )
    x = normal(3, 4, 4, 4) if kind == "checkerboard" else normal(3, FEATURES)

    def gradients(model):
        z, log_det = model.forward_and_log_det(x)
        return torch.autograd.grad(
            (z.square().flatten(1).sum(1) - log_det).mean(),
            list(built.parameters()),
            allow_unused=True,
        )

    for saved, true in zip(gradients(memory_saving(built)), gradients(built), strict=True):
        if true is not None:
            torch.testing.assert_close(saved, true, rtol=1e-6, atol=1e-8)

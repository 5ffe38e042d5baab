"""The MemCNN adapter beyond the contract: freed storages, its own switch, what is shared."""

from __future__ import annotations

import memcnn
import pytest
import torch
from torch import nn

import inn_guard as ig
from inn_guard.adapters import wrap
from inn_guard.adapters.memcnn.adapter import switched_gradients, unwrapped
from inn_guard.core.invertible import NotApplicable
from inn_guard.execution.state import changed_state
from inn_guard.memory_saving import memory_saving
from tests.cases.memcnn import CASES, FEATURES, HALF, Nested, additive, affine, mlp, wrapped


def chain(depth: int = 3, scale: float = 1.0) -> nn.Sequential:
    net = nn.Sequential(*[wrapped(affine()) for _ in range(depth)]).double()
    for parameter in net.parameters():
        parameter.data.mul_(scale)
    return net


def test_every_class_of_the_library_is_a_case():
    ids = " ".join(case.id for case in CASES)
    assert all(name in ids for name in memcnn.__all__ if isinstance(getattr(memcnn, name), type))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "make", [lambda: wrapped(affine()), lambda: wrapped(wrapped(additive())), Nested]
)
def test_no_input_storage_is_freed(make, batch):
    module = make().double()
    x = torch.randn(batch, FEATURES)
    before = x.clone()
    z = wrap(module)(x)
    kept = z.detach().clone()
    assert torch.equal(wrap(module).inverse(z), wrap(unwrapped(module)).inverse(z))
    assert torch.equal(x, before)
    assert torch.equal(z, kept)


@pytest.mark.thorough
def test_an_audit_leaves_model_and_data_alone():
    net, x = chain(), torch.randn(8, FEATURES)
    before = x.clone()
    with changed_state(net) as changed:
        report = ig.audit(wrap(layers=net), x)
    assert changed == []
    assert torch.equal(x, before)
    assert all(not part.disable for part in net)
    assert report.verdict is ig.Verdict.STABLE


def test_batch_statistics_are_those_of_the_users_module():
    coupling = memcnn.AdditiveCoupling(
        nn.Sequential(nn.Linear(HALF, HALF), nn.BatchNorm1d(HALF)), mlp()
    )
    module = nn.Sequential(wrapped(coupling)).double().train()
    wrap(layers=module).train()(torch.randn(8, FEATURES))
    assert int(coupling.Fm[1].num_batches_tracked) == 1


def test_parts_without_wrappers_are_shared():
    module = Nested()
    clone = unwrapped(module)
    assert clone is not module
    assert clone.coupling is module.coupling._fn
    assert unwrapped(additive()).__class__ is memcnn.AdditiveCoupling
    plain = additive()
    assert unwrapped(plain) is plain
    assert {id(p) for p in wrap(module).parameters()} == {id(p) for p in module.parameters()}


# Every entry of EXCEPTIONS fails for its stated reason.


def test_the_wrapper_itself_frees_its_input():
    x = torch.randn(4, FEATURES)
    wrapped(additive()).double().eval()(x)
    assert x.untyped_storage().size() == 0


def test_the_wrapper_itself_refuses_autograd_grad():
    module = wrapped(additive()).double()
    z = module(torch.randn(4, FEATURES))
    with pytest.raises(RuntimeError, match=r"not compatible with \.grad\(\)"):
        torch.autograd.grad(z.sum(), list(module.parameters()))
    assert torch.autograd.grad(
        wrap(module)(torch.randn(4, FEATURES)).sum(), list(module.parameters())
    )


def test_there_are_no_log_determinants():
    with pytest.raises(NotApplicable, match="MemCNN computes no log-determinants"):
        wrap(additive().double()).forward_and_log_det(torch.randn(2, FEATURES))


def test_modules_of_several_tensors_are_pointed_to_callables():
    class Pairs(nn.Module):
        def forward(self, x):
            return x, x, x

        inverse = forward

    with pytest.raises(TypeError, match="several latents: concatenate them"):
        wrap(wrapped(Pairs()))(torch.randn(2, FEATURES))


def test_what_has_no_inverse_is_refused():
    with pytest.raises(TypeError, match=r"call wrap\(layers=\[...\]\)"):
        wrap(memcnn.AffineAdapterNaive(mlp()))


# Memory saving: MemCNN's own gradient, by its switch, and ours


def loss(z: torch.Tensor) -> torch.Tensor:
    return z.square().sum()


def test_gradients_by_its_own_switch_are_true_where_the_inverse_is():
    for saving, true in switched_gradients(chain(), torch.randn(8, FEATURES), loss):
        torch.testing.assert_close(saving, true, rtol=1e-9, atol=1e-12)


def test_the_switch_leaves_the_model_alone():
    net, x = chain(), torch.randn(8, FEATURES)
    switched_gradients(net, x, loss)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(not part.disable for part in net)
    assert x.untyped_storage().size() > 0


def relative_error(gradients, true):
    """Distance of a list of gradients from the true ones, over the length of the true ones."""
    off = torch.cat([(one - other).flatten() for one, other in zip(gradients, true, strict=True)])
    return float(off.norm() / torch.cat([one.flatten() for one in true]).norm())


def test_where_the_inverse_is_bad_both_gradients_are_wrong_and_ours_no_more_than_theirs():
    theirs, ours = [], []
    for seed in range(3, 8):
        torch.manual_seed(seed)
        net, x = chain(10, scale=3.0).float(), torch.randn(16, FEATURES, dtype=torch.float32)
        pairs = switched_gradients(net, x, loss)
        saving, true = zip(*pairs, strict=True)
        rebuilt = torch.autograd.grad(
            loss(memory_saving(wrap(layers=net))(x)), list(net.parameters())
        )
        theirs.append(relative_error(saving, true))
        ours.append(relative_error(rebuilt, true))
    assert max(theirs) > 1e-2
    assert max(ours) > 1e-3
    # ours holds x itself, so one layer less is rebuilt
    assert all(own < 2 * their for own, their in zip(ours, theirs, strict=True))

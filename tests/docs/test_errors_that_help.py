"""Errors of wrong arguments to models of a library: what they advise works when it is followed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nflows import distributions, flows, transforms
from nflows.nn.nets import ResidualNet
from torch import nn

import inn_guard as ig

D, C = 3, 2


def flow(context: int | None = None) -> nn.Module:
    def net(inputs, outputs):
        return ResidualNet(inputs, outputs, 8, context_features=context)

    torch.manual_seed(0)
    coupling = transforms.AffineCouplingTransform(torch.arange(D) % 2, net)
    base = distributions.StandardNormal([D])
    layers = [transforms.ReversePermutation(D), coupling]
    return flows.Flow(transforms.CompositeTransform(layers), base).float().eval()


x = torch.randn(8, D, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
c = torch.randn(8, C, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


def audit(data, model=None, **given):
    return ig.audit(model or flow(), data, level="quick", checks=["density"], **given)


def conditional(context):
    return audit(x, flow(C), context=context)


def hooked(data, model=None, context=None):
    return ig.RegularizerHook(model or flow(), ig.FiniteDifferences(0.1))(data, context=context)


def box(*shape):
    return ig.Box(torch.zeros(*shape), torch.ones(*shape))


#: name -> (a call that is wrong, the error, what it says, the call with the advice followed)
CALLS = {
    "samples in a list": (
        *(lambda: audit(list(x)), TypeError, "torch.stack", lambda: audit(torch.stack(list(x)))),
    ),
    "numbers in a list": (
        *(lambda: audit(x.tolist()), TypeError, "torch.tensor"),
        lambda: audit(torch.tensor(x.tolist(), dtype=torch.float32)),
    ),
    "one sample": (lambda: audit(x[0]), ValueError, r"x\[None\]", lambda: audit(x[0][None])),
    "numpy context": (
        *(lambda: conditional(c.numpy()), TypeError, "torch.as_tensor"),
        lambda: conditional(torch.as_tensor(c.numpy())),
    ),
    "context in a list": (
        *(lambda: conditional(c.tolist()), TypeError, "expected context as a tensor"),
        lambda: conditional(torch.as_tensor(c.tolist(), dtype=torch.float32)),
    ),
    "context of float64": (
        *(lambda: conditional(c.double()), ValueError, "context.to"),
        lambda: conditional(c.double().to(torch.float32)),
    ),
    "one row of context": (
        *(lambda: conditional(c[:1]), ValueError, r"context.expand\(8, -1\)"),
        lambda: conditional(c[:1].expand(8, -1)),
    ),
    "prior as a tensor": (
        *(lambda: audit(x, prior=x), TypeError, "draw from its rows"),
        lambda: audit(x, prior=lambda n: x[torch.randint(len(x), (n,))]),
    ),
    "prior as a class": (
        *(lambda: audit(x, prior=torch.distributions.Normal), TypeError, "instance"),
        lambda: audit(x, prior=torch.distributions.Normal(torch.zeros(D), torch.ones(D))),
    ),
    "loss as a name": (
        *(lambda: audit(x, loss="nll"), TypeError, "expected loss as a function"),
        lambda: audit(x, loss=lambda z, log_det: (z.square().sum(1) / 2 - log_det).mean()),
    ),
    "a check without a result": (
        *(lambda: ig.audit(flow(), x, checks=[lambda m, x: 3]), TypeError, "AuditResult"),
        lambda: ig.audit(
            flow(), x, checks=[lambda m, x: ig.AuditResult("own", ig.Verdict.STABLE, "fine")]
        ),
    ),
    "hook with float64": (
        *(lambda: hooked(x.double()), ValueError, r"x.to\(torch.float32\)", lambda: hooked(x)),
    ),
    "hook with a short context": (
        *(lambda: hooked(x, flow(C), c[:3]), ValueError, "8 rows"),
        lambda: hooked(x, flow(C), c),
    ),
    "exact with float64": (
        *(lambda: ig.exact(flow()).encode(x.double()), ValueError, r"x.to\(torch.float32\)"),
        lambda: ig.exact(flow()).encode(x),
    ),
    "exact of another shape": (
        *(lambda: ig.exact(flow()).encode(x[:, :1]), ValueError, "expected x that the model"),
        lambda: ig.exact(flow()).encode(x),
    ),
    "decoding without what was kept": (
        *(lambda: ig.exact(flow()).decode(x, None), TypeError, "as encode returned them"),
        lambda: (coder := ig.exact(flow())).decode(*coder.encode(x)),
    ),
    "a box of another shape": (
        *(lambda: ig.lipschitz_bounds(flow(), box(D + 1), seconds=0), ValueError, "one sample"),
        lambda: ig.lipschitz_bounds(flow(), box(D), seconds=0),
    ),
    "layers of one model": (
        *(
            lambda: ig.wrap(layers=nn.Linear(D, D)),
            TypeError,
            r"got one Linear: call wrap\(model\)",
        ),
        lambda: ig.wrap(flow()),
    ),
    "no layers": (lambda: ig.wrap(layers=[]), TypeError, "at least one layer", lambda: None),
}


@pytest.mark.unchecked
@pytest.mark.parametrize("name", CALLS)
def test_the_advice_of_an_error_works(name):
    wrong, error, says, right = CALLS[name]
    with pytest.raises(error, match=says):
        wrong()
    right()


def test_a_context_that_fits_in_neither_shape_nor_dtype_is_described():
    with pytest.raises(ValueError, match=r"context \(7,\) per row in torch.float32"):
        conditional(torch.randn(8, 7, dtype=torch.float32))


def test_whole_numbers_of_numpy_are_seeds():
    audit(x, seed=np.int64(3))


def test_memory_saving_takes_the_models_of_libraries():
    z = ig.memory_saving(flow(), guard=1e-3)(x)
    assert torch.equal(z, flow()._transform(x)[0])


def test_batches_without_a_finite_sample_are_not_trained_on():
    repaired = ig.stabilize(flow(), [x * torch.nan], uses=["sampling"], steps=40)
    assert "No sample is finite" in str(repaired)

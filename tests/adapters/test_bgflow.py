"""Flows of bgflow: stand-ins that obey its protocol, since it is on no package index."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import inn_guard as ig
from tests.oracles import transforms as reference


class Flow(nn.Module):
    """``flow(*ys, inverse=False) -> (*xs, dlogp)``: forward maps latents to configurations."""

    __module__ = "bgflow.nn.flow.base"

    def forward(self, *ys, inverse=False, **kwargs):
        return self._inverse(*ys, **kwargs) if inverse else self._forward(*ys, **kwargs)


class Coupling(Flow):
    __module__ = "bgflow.nn.flow.coupling"

    def __init__(self, kept: int, moved: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(kept, 16), nn.Tanh(), nn.Linear(16, moved))

    def _forward(self, first, second, **kwargs):
        scale = torch.tanh(self.net(first))
        return first, second * scale.exp() + scale, scale.sum(-1, keepdim=True)

    def _inverse(self, first, second, **kwargs):
        scale = torch.tanh(self.net(first))
        return first, (second - scale) * (-scale).exp(), -scale.sum(-1, keepdim=True)


class Sequential(Flow):
    __module__ = "bgflow.nn.flow.sequential"

    def __init__(self, blocks) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, *xs, inverse=False, **kwargs):
        dlogp = 0.0
        for block in reversed(self.blocks) if inverse else self.blocks:
            *xs, further = block(*xs, inverse=inverse, **kwargs)
            dlogp = dlogp + further
        return (*xs, dlogp)


class Swap(Flow):
    __module__ = "bgflow.nn.flow.coupling"

    def _forward(self, first, second, **kwargs):
        return second, first, torch.zeros_like(first[:, :1])

    _inverse = _forward


class Merge(Flow):
    __module__ = "bgflow.nn.flow.coupling"

    def _forward(self, first, second, **kwargs):
        return torch.cat([first, second], 1), torch.zeros_like(first[:, :1])

    def _inverse(self, x, **kwargs):
        return *x.chunk(2, 1), torch.zeros_like(x[:, :1])


class Normal(nn.Module):
    """A prior of the deviation 2."""

    __module__ = "bgflow.distribution.normal"

    def sample(self, n, temperature=1.0):
        return 2 * torch.randn(n, 2), 2 * torch.randn(n, 2)

    def energy(self, *zs):
        z = torch.cat(zs, 1) / 2
        return 0.5 * z.square().sum(1, keepdim=True) + 2 * math.log(2 * math.pi) + 4 * math.log(2)


class Generator(nn.Module):
    __module__ = "bgflow.bg"

    def __init__(self, prior, flow) -> None:
        super().__init__()
        self.prior, self.flow = prior, flow

    def energy(self, *xs):
        *zs, dlogp = self.flow(*xs, inverse=True)
        return self.prior.energy(*zs) - dlogp


def couplings():
    return [Coupling(2, 2), Swap(), Coupling(2, 2), Swap()]


def joined(flow, x):
    """The inverse of the flow as one function of one tensor."""
    *zs, dlogp = flow(*x.chunk(2, 1), inverse=True)
    return torch.cat(zs, 1), dlogp[:, 0]


def test_data_are_mapped_to_latents_by_the_inverse():
    flow, x = Sequential(couplings()), torch.randn(8, 4)
    wrapped = ig.wrap(flow, x=tuple(x.chunk(2, 1)))
    z, log_det = joined(flow, x)
    own, own_log_det = wrapped.forward_and_log_det(x)
    torch.testing.assert_close(own, z)
    torch.testing.assert_close(own_log_det, log_det)
    jacobian = reference.jacobian(lambda t: joined(flow, t)[0], x)
    torch.testing.assert_close(log_det, reference.log_abs_det(jacobian))
    torch.testing.assert_close(wrapped.inverse(z), x)


def test_a_generator_has_its_prior_and_its_density():
    flow = Sequential([*couplings(), Merge()])
    generator, x = Generator(Normal(), flow), torch.randn(32, 4)
    wrapped = ig.wrap(generator, x=x)
    torch.testing.assert_close(wrapped.log_prob(x), -generator.energy(x)[:, 0])
    drawn = wrapped.base().draw(4096, seed=0)
    assert drawn.std().item() == pytest.approx(2, abs=0.1)
    report = ig.audit(generator, x)
    assert report.verdict == "stable"
    assert report.uses["sampling"].verdict == "stable"
    assert "N(0, I)" not in report.uses["sampling"].reason
    assert wrapped.to_dtype(torch.float32).log_prob(x.float()).dtype == torch.float32
    with pytest.raises(TypeError, match="expected one tensor for Generator, got 2"):
        ig.audit(wrapped, tuple(x.chunk(2, 1)))


def test_a_wrong_volume_change_is_found():
    class Wrong(Coupling):
        __module__ = "bgflow.nn.flow.coupling"

        def _inverse(self, first, second, **kwargs):
            *xs, dlogp = super()._inverse(first, second, **kwargs)
            return (*xs, dlogp + second[:, :1])

    parts = tuple(torch.randn(32, 4).chunk(2, 1))
    assert ig.audit(Wrong(2, 2), parts).uses["density"].verdict == "unstable"


def test_without_configurations_it_says_what_to_pass():
    with pytest.raises(TypeError, match=r"call wrap\\(flow, x=batch\\)".replace("\\\\", "\\")):
        ig.wrap(Sequential(couplings()))
    with pytest.raises(TypeError, match="pass them as a tuple"):
        ig.audit(Sequential(couplings()), torch.randn(8, 4))

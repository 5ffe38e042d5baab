"""Families of models written after their papers, in few layers: no wrong verdict."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import nn

import inn_guard as ig
from tests.oracles import transforms as reference

TOKENS, WIDTH = 4, 2


class CausalAttention(nn.Module):
    """One head; token k sees tokens before it. Sampling keeps keys and values of earlier tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, 8) for _ in range(3))
        self.out = nn.Linear(8, 2 * WIDTH)
        self.sample = False
        self.cache: dict[str, list[torch.Tensor]] = {"k": [], "v": []}

    def forward(self, x):
        keys, values = self.key(x), self.value(x)
        if self.sample:
            self.cache["k"].append(keys)
            self.cache["v"].append(values)
            keys, values = torch.cat(self.cache["k"], 1), torch.cat(self.cache["v"], 1)
        scores = self.query(x) @ keys.transpose(1, 2)
        if not self.sample:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        return self.out(scores.softmax(-1) @ values)


class TarFlowBlock(nn.Module):
    """z_k = (x_k - mu(x_<k)) exp(-alpha(x_<k)), inverted token by token with a cache.

    Transformer AutoRegressive Flow (Zhai et al., 2024): the log-determinant is a mean.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention = CausalAttention()

    def forward(self, x):
        parameters = self.attention(x)
        shifted = torch.cat([torch.zeros_like(parameters[:, :1]), parameters[:, :-1]], 1)
        alpha, mu = shifted.chunk(2, 2)
        alpha = alpha.tanh()
        return (x - mu) * (-alpha).exp(), -alpha.mean(dim=[1, 2])

    def reverse(self, z):
        x = z.clone()
        self.attention.sample = True
        self.attention.cache = {"k": [], "v": []}
        for k in range(z.shape[1] - 1):
            alpha, mu = self.attention(x[:, k : k + 1])[:, 0].chunk(2, 1)
            x[:, k + 1] = z[:, k + 1] * alpha.tanh().exp() + mu
        self.attention.sample = False
        self.attention.cache = {"k": [], "v": []}
        return x


def test_tarflow_is_inverted_and_its_mean_log_determinant_named():
    model, x = TarFlowBlock(), torch.randn(8, TOKENS, WIDTH)
    wrapped = ig.wrap(model, x=x)
    torch.testing.assert_close(wrapped.inverse(wrapped(x)), x)
    size = TOKENS * WIDTH
    assert f"log_det=lambda x: {size} * model(x)[1]" in wrapped.convention
    advised = ig.wrap(
        encode=lambda x: model(x)[0], decode=model.reverse, log_det=lambda x: size * model(x)[1]
    )
    truth = reference.log_abs_det(reference.jacobian(wrapped.forward, x))
    torch.testing.assert_close(advised.forward_and_log_det(x)[1], truth)
    assert ig.audit(advised, x, level="quick").verdict.passed
    assert model.attention.cache == {"k": [], "v": []}
    assert not model.attention.sample


class JetCoupling(nn.Module):
    """A coupling over channels whose network is a transformer (Kolesnikov et al., 2024)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 1, 8, dropout=0.0, batch_first=True)
        self.trunk, self.head = layer, nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x, inverse=False):
        kept, moved = x.chunk(2, 2)
        bias, raw = self.head(self.trunk(kept)).chunk(2, 2)
        scale = 2 * torch.sigmoid(raw)
        log_det = scale.log().sum(dim=[1, 2])
        if inverse:
            return torch.cat([kept, moved / scale - bias], 2), -log_det
        return torch.cat([kept, (moved + bias) * scale], 2), log_det


def test_a_vision_transformer_coupling_is_sound():
    report = ig.audit(JetCoupling(), torch.randn(8, TOKENS, 2 * WIDTH), level="quick")
    assert report.verdict.passed
    assert report["log_det"].verdict == "stable"


class RevNetBlock(nn.Module):
    """y1 = x1 + f(x2), y2 = x2 + g(y1) (Gomez et al., 2017)."""

    def __init__(self, gain=1.0) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gain = gain

    def forward(self, x):
        first, second = x.chunk(2, 1)
        first = first + self.gain * self.f(second).relu()
        return torch.cat([first, second + self.gain * self.g(first).relu()], 1)

    def inverse(self, y):
        first, second = y.chunk(2, 1)
        second = second - self.gain * self.g(first).relu()
        return torch.cat([first - self.gain * self.f(second).relu(), second], 1)


@pytest.mark.parametrize(("gain", "passes"), [(1.0, True), (3e4, False)])
def test_reversible_residual_blocks_are_judged_by_their_round_trips(gain, passes):
    net = nn.ModuleList([RevNetBlock(gain) for _ in range(2)]).float()
    model, x = ig.wrap(layers=net), torch.randn(32, 2 * WIDTH).float()
    error = (model.inverse(model(x)) - x).abs().max()
    assert (error < 1e-3) == passes
    report = ig.audit(model, x, level="quick")
    assert report.uses["reconstruction"].verdict.passed == passes


def ddim(x, times, net, alphas):
    """Deterministic sampling (Song, Meng, Ermon, 2020) and, with times reversed, its inversion."""
    for now, then in itertools.pairwise(times):
        noise = net(torch.cat([x, torch.full_like(x[:, :1], now / alphas.numel())], 1))
        clean = (x - (1 - alphas[now]).sqrt() * noise) / alphas[now].sqrt()
        x = alphas[then].sqrt() * clean + (1 - alphas[then]).sqrt() * noise
    return x


@pytest.mark.parametrize(("stride", "passes"), [(100, False), (1, True)])
def test_ddim_inversion_is_as_good_as_its_steps_are_small(stride, passes):
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    with torch.no_grad():
        net[2].weight.mul_(0.1)
    alphas = torch.linspace(0.999, 0.5, 201)
    times = list(range(0, 201, stride))
    sample = functools.partial(ddim, net=net, alphas=alphas, times=times[::-1])
    invert = functools.partial(ddim, net=net, alphas=alphas, times=times)
    model, x = ig.wrap(encode=invert, decode=sample), torch.randn(16, 2)
    assert {id(p) for p in model.parameters()} == {id(p) for p in net.parameters()}
    error = ((sample(invert(x)) - x).abs() / x.std(0)).max()
    report = ig.audit(model, x, checks=["reconstruction"])
    assert report.verdict.passed == passes == bool(error < 1e-2)

"""InvertibleWrapper: the same map as its inner one, in everything that an Invertible answers."""

from __future__ import annotations

import torch

from inn_guard.core.invertible import InvertibleWrapper
from inn_guard.layers import MLP, AffineCoupling, Chain, Conditional, Permutation


class Counting(InvertibleWrapper):
    """Counts its forward calls in a list that all copies share."""

    def __init__(self, inner):
        super().__init__(inner)
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return super().forward(x)


def conditional_chain():
    def coupling():
        return AffineCoupling(Conditional(MLP([3, 8, 4])))

    chain = Chain(coupling(), Permutation.reverse(4), coupling()).float()
    return chain.with_context(torch.ones(5, 1, dtype=torch.float32))


def test_every_answer_is_that_of_the_inner_map():
    inner = conditional_chain()
    wrapper = Counting(inner)
    x = torch.randn(5, 4, dtype=torch.float32)
    assert torch.equal(wrapper(x), inner(x))
    assert torch.equal(wrapper.inverse(x), inner.inverse(x))
    assert torch.equal(wrapper.log_prob(x), inner.log_prob(x))
    for ours, theirs in zip(
        wrapper.forward_and_log_det(x), inner.forward_and_log_det(x), strict=True
    ):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(
        wrapper.inverse_and_log_det(x), inner.inverse_and_log_det(x), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert [layer.name for layer in wrapper.layers()] == [layer.name for layer in inner.layers()]
    assert wrapper.name == inner.name
    assert wrapper.block is inner.block
    assert wrapper.base() is None
    assert wrapper.calls == [5]


def test_variants_keep_the_attributes_of_the_wrapper_and_leave_the_original_alone():
    wrapper = Counting(conditional_chain())
    x = torch.randn(5, 4, dtype=torch.float32)
    rows = torch.tensor([1, 3])
    picked = wrapper.select(rows)
    torch.testing.assert_close(picked(x[rows]), wrapper(x)[rows])
    moved = wrapper.with_context(torch.zeros(5, 1, dtype=torch.float32))
    assert not torch.equal(moved(x), wrapper(x))
    double = wrapper.to_dtype(torch.float64)
    assert double(x.double()).dtype == torch.float64
    assert wrapper(x).dtype == torch.float32
    for variant in (picked, moved, double):
        assert isinstance(variant, Counting)
        assert variant.calls is wrapper.calls
    assert len(list(wrapper.parameters())) == len(list(wrapper.inner.parameters()))


def test_a_layer_without_a_conditioner_gives_the_wrapper_itself():
    wrapper = Counting(Permutation.reverse(4))
    assert wrapper.with_cached_conditioner(torch.ones(1, 4)) is wrapper
    coupling = Counting(AffineCoupling(MLP([2, 8, 4])))
    state = torch.randn(3, 4)
    cached = coupling.with_cached_conditioner(state)
    assert isinstance(cached, Counting)
    torch.testing.assert_close(cached(state), coupling(state))

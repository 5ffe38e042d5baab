from __future__ import annotations

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from inn_guard.adapters import wrap
from inn_guard.adapters.freia.adapter import FreiaGraph, FreiaSequence, adapt
from inn_guard.adapters.freia.graph import OnEdges, pack, packed_shape, unpack
from inn_guard.core.invertible import standard_normal_log_prob
from inn_guard.jacobian.chain import Linearization
from tests.cases.freia import CONDITION, FEATURES, VECTOR, as_users_build, built, data, subnet
from tests.cases.freia_nets import branching_graph, condition_list, nested, sequence
from tests.oracles import transforms as reference


def test_graph_returns_what_the_library_returns():
    graph, conditions = built(branching_graph)
    vector, image = data(3), data(1, 4, 4)
    model = wrap(graph, context=conditions)
    assert isinstance(model, FreiaGraph)
    x = model.pack(vector, image)
    expected, expected_log_det = graph((vector, image), c=conditions)
    z, log_det = model.forward_and_log_det(x)
    assert len(expected) == 3
    assert all(torch.equal(a, b) for a, b in zip(model.unpack(z), expected, strict=True))
    assert torch.equal(z, torch.cat([part.flatten(1) for part in expected], 1))
    assert torch.equal(log_det, expected_log_det)
    back, back_log_det = graph(expected, c=conditions, rev=True)
    x_again, inverse_log_det = model.inverse_and_log_det(z)
    assert torch.equal(x_again, torch.cat([part.flatten(1) for part in back], 1))
    assert torch.equal(inverse_log_det, back_log_det)


def test_sequence_returns_what_the_library_returns():
    net, conditions = built(lambda: (sequence(*VECTOR), condition_list()))
    model, x = wrap(net, context=conditions), data(FEATURES)
    expected, expected_log_det = net(x, c=conditions)
    z, log_det = model.forward_and_log_det(x)
    assert torch.equal(z, expected)
    assert torch.equal(log_det, expected_log_det)
    assert torch.equal(model.log_prob(x), standard_normal_log_prob(expected) + expected_log_det)


def test_net_with_a_residual_layer_runs_with_and_without_autograd():
    with as_users_build():
        net = Ff.SequenceINN(*VECTOR)
        net.append(Fm.GLOWCouplingBlock, subnet_constructor=subnet)
        net.append(Fm.IResNetLayer)
        net[1].lipschitz_correction()
        net.double().eval()
    model, x = adapt(net), data(FEATURES)
    expected = net(x)[0].detach()
    with torch.no_grad():
        z, back = model(x), model.inverse(expected)
        assert torch.equal(model.forward_and_log_det(x)[0], expected)
    assert torch.equal(model(x).detach(), expected)
    assert torch.equal(z, expected)
    assert not z.requires_grad
    assert torch.allclose(back, x, atol=1e-10)
    J, u = reference.jacobian(model.forward, x), data(FEATURES)
    exact = torch.linalg.solve(J, u.unsqueeze(2)).squeeze(2)
    assert torch.allclose(Linearization(model, x).inverse_jvp(u).value(), exact, rtol=1e-9)


def test_nodes_of_a_graph_are_the_layers_and_nested_nets_are_unfolded():
    model = adapt(*built(branching_graph))
    names = [layer.name for layer in model.layers()]
    inner = ["AllInOneBlock", "PermuteRandom", "NICECouplingBlock"]
    nodes = [
        "HaarDownsampling",
        "Split",
        "GLOWCouplingBlock",
        "Flatten",
        "Concat",
        "GLOWCouplingBlock",
        "Split",
    ]
    assert sorted(names) == sorted([*nodes, *inner])
    start = names.index("AllInOneBlock")
    assert names[start : start + 3] == inner
    assert any(isinstance(layer, OnEdges) for layer in model.layers())
    model = adapt(*built(nested))
    assert isinstance(model, FreiaSequence)
    assert [layer.name for layer in model.layers()] == [
        *inner,
        "InvAutoAct",
        *inner,
        "PermuteRandom",
    ]


def test_layers_follow_the_context():
    model = adapt(*built(branching_graph))
    other = [condition + 1 for condition in model.context]
    x = data(19)
    moved = model.with_context(other)
    y = x
    for layer in moved.layers():
        y = layer(y)
    assert torch.equal(y, moved(x))
    assert not torch.allclose(y, model(x))
    with_context = [layer for layer in model.layers() if layer.context is not None]
    assert with_context
    for layer in with_context:
        copied = layer.with_context([condition + 1 for condition in layer.context])
        assert layer.with_context(layer.context).name == copied.name == layer.name


def test_wrong_conditions_and_inputs_are_named():
    graph, conditions = built(branching_graph)
    with pytest.raises(ValueError, match=r"expected 2 condition\(s\), got 0"):
        wrap(graph)(data(19))
    with pytest.raises(ValueError, match=r"expected 2 condition\(s\), got 1"):
        wrap(graph, context=conditions[:1]).layers()
    permutation, _ = built(lambda: (Fm.PermuteRandom([VECTOR]), None))
    with pytest.raises(ValueError, match="takes no conditions"):
        wrap(permutation, context=data(2))(data(FEATURES))
    model = wrap(graph, context=conditions)
    with pytest.raises(ValueError, match=r"expected 2 input\(s\)"):
        model.pack(data(3))
    with pytest.raises(ValueError, match=r"\(\(3,\), \(1, 4, 4\)\)"):
        model.pack(data(1, 4, 4), data(3))
    with pytest.raises(ValueError, match=r"\(B, 19\)"):
        model(data(18))
    with pytest.raises(TypeError, match="FrEIA"):
        adapt(nn.Linear(2, 2))


@given(
    st.lists(
        st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4
    ).map(tuple)
)
def test_unpack_is_the_inverse_of_pack(shapes):
    tensors = tuple(torch.randn(2, *shape) for shape in shapes)
    packed = pack(tensors)
    assert tuple(packed.shape[1:]) == packed_shape(shapes)
    assert all(torch.equal(a, b) for a, b in zip(unpack(packed, shapes), tensors, strict=True))


@given(st.data())
def test_layers_of_any_graph_compose_to_the_graph(draw):
    widths = draw.draw(st.lists(st.integers(2, 5), min_size=1, max_size=3), label="inputs")
    nodes = [Ff.InputNode(width) for width in widths]
    edges = [node.out0 for node in nodes]
    for _ in range(draw.draw(st.integers(1, 5), label="nodes")):
        edges = draw.draw(st.permutations(edges), label="order")
        (width,) = edges[0][0].output_dims[edges[0][1]]
        kind = draw.draw(st.sampled_from(["block", "split", "concat"]), label="kind")
        if kind == "concat" and len(edges) > 1:
            node, used = Ff.Node(edges[:2], Fm.Concat, {}), 2
        elif kind == "split" and width > 3:
            node, used = Ff.Node(edges[0], Fm.Split, {"section_sizes": [2, width - 2]}), 1
        else:
            node, used = Ff.Node(edges[0], Fm.GLOWCouplingBlock, {"subnet_constructor": subnet}), 1
        edges = [*edges[used:], *((node, k) for k in range(len(node.output_dims)))]
        nodes.append(node)
    outputs = draw.draw(st.permutations([Ff.OutputNode(edge) for edge in edges]), label="outputs")
    model = adapt(Ff.GraphINN([*nodes, *outputs]).double())
    x = model.pack(*(data(width) for width in widths))
    z = y = model(x)
    for layer in reversed(model.layers()):
        y = layer.inverse(y)
    assert torch.allclose(y, x, atol=1e-10)
    for layer in model.layers():
        x = layer(x)
    assert model.layers()
    assert torch.equal(x, z)


def test_the_layout_of_later_releases_gives_the_same_layers():
    graph, conditions = built(branching_graph)
    model, x = wrap(graph, context=conditions), data(19)
    z = model(x)
    graph.node_list_fwd, graph.node_list_rev = graph.node_list, graph.node_list[::-1]
    del graph.node_list
    for node in graph.node_list_fwd:
        node.conditions = [(condition, 0) for condition in node.conditions]
    for layer in model.layers():
        x = layer(x)
    assert torch.equal(x, z)


def test_graph_whose_conditions_are_not_given_from_outside_is_one_opaque_layer():
    graph, conditions = built(branching_graph)
    model = wrap(graph, context=conditions)
    graph.get_node_by_name("mixed").conditions[0] = Ff.ConditionNode(CONDITION)
    assert model.layers() == ()

"""Cases of FrEIA's nets: sequences, graphs with branches, conditions, several inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import torch
from torch import Tensor, nn

from tests.cases.case import Case
from tests.cases.freia import BATCH, CONDITION, VECTOR, conv_subnet, freia, subnet


def sequence(*dims: int, **arguments: Any) -> Ff.SequenceINN:
    net = Ff.SequenceINN(*dims, **arguments)
    net.append(Fm.PermuteRandom)
    net.append(Fm.GLOWCouplingBlock, cond=1, cond_shape=(CONDITION,), subnet_constructor=subnet)
    net.append(Fm.AllInOneBlock, subnet_constructor=subnet)
    net.append(Fm.RNVPCouplingBlock, cond=0, cond_shape=(2,), subnet_constructor=subnet)
    return net


def condition_list() -> list[Tensor]:
    return [
        torch.randn(BATCH, 2, dtype=torch.float64),
        torch.randn(BATCH, CONDITION, dtype=torch.float64),
    ]


def inner(dims: Any, dims_c: Any = None) -> Ff.SequenceINN:
    """A net as a block of another one: a tuple comes out, as it does of a block."""
    net = Ff.SequenceINN(*dims[0], force_tuple_output=True)
    shape = tuple(dims_c[0]) if dims_c else None
    net.append(
        Fm.AllInOneBlock, cond=0 if dims_c else None, cond_shape=shape, subnet_constructor=subnet
    )
    net.append(Fm.PermuteRandom)
    net.append(Fm.NICECouplingBlock, subnet_constructor=subnet)
    return net


def innermost(dims: Any, dims_c: Any = None) -> Ff.SequenceINN:
    net = Ff.SequenceINN(*dims[0], force_tuple_output=True)
    net.append(inner)
    net.append(Fm.InvAutoAct)
    return net


def nested() -> tuple[nn.Module, Tensor]:
    net = Ff.SequenceINN(*VECTOR)
    net.append(innermost)
    net.append(inner, cond=0, cond_shape=(CONDITION,))
    net.append(Fm.PermuteRandom)
    return net, torch.randn(BATCH, CONDITION, dtype=torch.float64)


def multiscale() -> tuple[nn.Module, None]:
    net = Ff.SequenceINN(1, 4, 4)
    net.append(Fm.HaarDownsampling)
    net.append(Fm.GINCouplingBlock, subnet_constructor=conv_subnet)
    net.append(Fm.ActNorm)
    net.append(Fm.Flatten)
    net.append(Fm.InvertibleSigmoid)
    net([torch.randn(20, 1, 4, 4)])
    return net, None


def permutations() -> tuple[nn.Module, None]:
    net = Ff.ReversibleSequential(*VECTOR)
    net.append(Fm.PermuteRandom)
    net.append(Fm.PermuteRandom)
    return net, None


def chain_graph(kind: type[Ff.GraphINN] = Ff.GraphINN) -> tuple[nn.Module, Tensor]:
    start, condition = Ff.InputNode(*VECTOR), Ff.ConditionNode(CONDITION)
    one = Ff.Node(start, Fm.RNVPCouplingBlock, {"subnet_constructor": subnet}, conditions=condition)
    two = Ff.Node(one, Fm.PermuteRandom, {})
    nodes = [start, condition, one, two, Ff.OutputNode(two)]
    return kind(nodes), torch.randn(BATCH, CONDITION, dtype=torch.float64)


def branching_graph() -> tuple[nn.Module, list[Tensor]]:
    """Two inputs, two conditions, branches that meet again, a nested net, three outputs."""
    image, vector = Ff.InputNode(1, 4, 4, name="image"), Ff.InputNode(3, name="vector")
    local, common = Ff.ConditionNode(2, name="local"), Ff.ConditionNode(CONDITION, name="common")
    haar = Ff.Node(image, Fm.HaarDownsampling, {}, name="haar")
    parts = Ff.Node(haar, Fm.Split, {"section_sizes": [1, 3], "dim": 0}, name="parts")
    detail = Ff.Node(
        parts.out1, Fm.GLOWCouplingBlock, {"subnet_constructor": conv_subnet}, name="detail"
    )
    flat = Ff.Node(parts.out0, Fm.Flatten, {}, name="flat")
    joined = Ff.Node([vector.out0, flat.out0], Fm.Concat, {}, name="joined")
    block = {"subnet_constructor": subnet}
    mixed = Ff.Node(joined, Fm.GLOWCouplingBlock, block, conditions=[common, local], name="mixed")
    halves = Ff.Node(mixed, Fm.Split, {"section_sizes": [5, 2]}, name="halves")
    net = Ff.Node(halves.out0, inner, {}, conditions=common, name="net")
    outputs = [Ff.OutputNode(halves.out1), Ff.OutputNode(net), Ff.OutputNode(detail)]
    nodes = [
        vector,
        image,
        local,
        common,
        haar,
        parts,
        detail,
        flat,
        joined,
        mixed,
        halves,
        net,
        *outputs,
    ]
    return Ff.GraphINN(nodes), condition_list()


def inner_graph(dims: Any, dims_c: Any = None) -> Ff.GraphINN:
    """A graph as a node of another one, two edges in and two out."""
    one, two = Ff.InputNode(*dims[0]), Ff.InputNode(*dims[1])
    joined = Ff.Node([one.out0, two.out0], Fm.Concat, {})
    mixed = Ff.Node(joined, Fm.AllInOneBlock, {"subnet_constructor": subnet})
    parts = Ff.Node(mixed, Fm.Split, {"section_sizes": [1, 4]})
    return Ff.GraphINN(
        [one, two, joined, mixed, parts, Ff.OutputNode(parts.out1), Ff.OutputNode(parts.out0)]
    )


def nested_graph() -> tuple[nn.Module, None]:
    start = Ff.InputNode(7)
    first = Ff.Node(start, innermost, {})
    parts = Ff.Node(first, Fm.Split, {"section_sizes": [2, 2, 3]})
    graph = Ff.Node([parts.out2, parts.out0], inner_graph, {})
    back = Ff.Node([graph.out1, parts.out1, graph.out0], Fm.Concat, {})
    return Ff.GraphINN([start, first, parts, graph, back, Ff.OutputNode(back)]), None


def nets() -> Iterator[Case]:
    yield freia("SequenceINN", lambda: (sequence(*VECTOR), condition_list()), has_layers=True)
    yield freia("SequenceINN-nested", nested, has_layers=True)
    yield freia("SequenceINN-image", multiscale, (1, 4, 4), has_layers=True)
    yield freia("SequenceINN-permutations", permutations, has_layers=True)
    yield freia("GraphINN-chain", chain_graph, has_layers=True)
    yield freia("GraphINN-branches", branching_graph, (19,), has_layers=True)
    yield freia("GraphINN-nested", nested_graph, (7,), has_layers=True)
    yield freia("ReversibleGraphNet", lambda: chain_graph(Ff.ReversibleGraphNet), has_layers=True)


CASES: list[Case] = list(nets())

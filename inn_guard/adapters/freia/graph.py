"""A graph of invertible nodes as a flat chain of layers between packed states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from inn_guard.core.invertible import DerivedMap, Invertible
from inn_guard.core.tensors import concatenate_flat, split_flat

__all__ = ["OnEdges", "Shape", "Shapes", "State", "chain", "pack", "packed_shape", "unpack"]

Value = TypeVar("Value")
Shape = tuple[int, ...]  #: of one tensor, without the batch
Shapes = tuple[Shape, ...]
Edge = tuple[int, int]  #: number of the node it leaves, and which of that node's outputs it is
#: (node, shapes of its inputs, shapes of its outputs) -> its layers; () if it cannot stand alone
Expand = Callable[[Any, Shapes, Shapes], "tuple[Invertible, ...]"]


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Several tensors (B, *) flattened and concatenated, (B, D); a single one as it is.

    >>> import torch
    >>> pack([torch.zeros(5, 2), torch.zeros(5, 3, 4)]).shape
    torch.Size([5, 14])
    """
    if len(tensors) == 1:
        return tensors[0]
    return concatenate_flat(tensors)


def unpack(packed: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    """The tensors of these shapes that ``pack`` made into one.

    Raises:
        ValueError: if the size does not fit.
    """
    if len(shapes) == 1:
        return (packed,)
    if packed.shape[1:] != packed_shape(shapes):
        raise ValueError(
            f"expected a tensor (B, {packed_shape(shapes)[0]}), the flattened concatenation of "
            f"{', '.join(map(str, shapes))}; got {tuple(packed.shape)}"
        )
    return tuple(split_flat(packed, shapes))


def packed_shape(shapes: Shapes) -> Shape:
    """The shape, without the batch, of what ``pack`` makes of tensors of these shapes."""
    if len(shapes) == 1:
        return shapes[0]
    return (sum(math.prod(shape) for shape in shapes),)


@dataclass(frozen=True)
class State:
    """The state of the graph before or after a layer.

    Attributes:
        alive: the edges that hold a value there, in the order of packing.
        touched: those that the layer takes or makes.
    """

    alive: Mapping[Edge, Shape]
    touched: tuple[Edge, ...]

    @property
    def all_touched(self) -> bool:
        """Whether the layer acts on exactly the packed state, in its order."""
        return tuple(self.alive) == self.touched

    def split(self, packed: Tensor) -> tuple[Tensor, dict[Edge, Tensor]]:
        """The touched edges, packed, and the values of all edges."""
        values = unpack(packed, tuple(self.alive.values()))
        edges = dict(zip(self.alive, values, strict=True))
        return pack(_chosen(edges, self.touched)), edges

    def join(self, result: Tensor, others: Mapping[Edge, Tensor]) -> Tensor:
        """The layer's result and the other edges, packed."""
        made = unpack(result, _chosen(self.alive, self.touched))
        edges = {**others, **dict(zip(self.touched, made, strict=True))}
        return pack(_chosen(edges, self.alive))


class OnEdges(DerivedMap):
    """A layer that acts on some edges of a graph; the others stay as they are.

    Attributes:
        inner: the layer.
        before: the state at its input.
        after: the state at its output.
    """

    def __init__(self, inner: Invertible, before: State, after: State) -> None:
        super().__init__(inner)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        """The state after the layer, packed, (B, D)."""
        touched, edges = self.before.split(x)
        return self.after.join(self.inner(touched), edges)

    def inverse(self, z: Tensor) -> Tensor:
        """The state before the layer, packed, (B, D)."""
        touched, edges = self.after.split(z)
        return self.before.join(self.inner.inverse(touched), edges)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The state after the layer and the layer's log-determinant, (B,).

        The other edges do not change and contribute 0.
        """
        touched, edges = self.before.split(x)
        result, log_det = self.inner.forward_and_log_det(touched)
        return self.after.join(result, edges), log_det

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The state before the layer and the log-determinant of the layer's inverse, (B,)."""
        touched, edges = self.after.split(z)
        result, log_det = self.inner.inverse_and_log_det(touched)
        return self.before.join(result, edges), log_det

    @property
    def outputs(self) -> Shapes:
        """Shapes of the edges alive after it."""
        return tuple(self.after.alive.values())


def chain(inn: Any, expand: Expand) -> tuple[Invertible, ...]:
    """The nodes of a graph, in order, as layers between packed states; () if they are no chain.

    In a chain of bijections every edge is consumed exactly once. A graph where one is consumed
    twice or never is one opaque layer.

    Args:
        inn: a GraphINN.
        expand: gives the layers of one node; () if the node cannot stand alone.
    """
    # releases differ: some keep a list for the forward direction, some only one list
    order = inn.node_list_fwd if hasattr(inn, "node_list_fwd") else inn.node_list
    nodes: list[Any] = []
    for node in order:
        # conditions and outputs are nodes, too
        if node.module is not None and len(node.inputs) > 0:
            nodes.append(node)
    number = {node: k for k, node in enumerate([*inn.in_nodes, *nodes])}
    alive = {(number[node], 0): tuple(node.output_dims[0]) for node in inn.in_nodes}
    final = _edges([node.inputs[0] for node in inn.out_nodes], number)
    layers: list[Invertible] = []
    for node in nodes:
        taken = _edges(node.inputs, number)
        made = {(number[node], k): tuple(shape) for k, shape in enumerate(node.output_dims)}
        after = _replaced(alive, taken, made)
        if not after:
            return ()
        if node is nodes[-1] and set(after) == set(final):
            # the last layer also puts the outputs into the order in which the library returns them
            after = dict(zip(final, _chosen(after, final), strict=True))
        sublayers = expand(node, _chosen(alive, taken), tuple(made.values()))
        if not sublayers:
            return ()
        layers += _placed(sublayers, State(alive, taken), State(after, tuple(made)))
        alive = after
    if tuple(alive) != final:
        return ()
    return tuple(layers)


def _chosen(values: Mapping[Edge, Value], edges: Iterable[Edge]) -> tuple[Value, ...]:
    return tuple(values[edge] for edge in edges)


def _edges(ends: Sequence[tuple[Any, int]], number: Mapping[Any, int]) -> tuple[Edge, ...]:
    """Edges by the numbers of their nodes; -1 for a node outside of the chain."""
    return tuple((number.get(node, -1), k) for node, k in ends)


def _replaced(
    alive: dict[Edge, Shape], taken: tuple[Edge, ...], made: dict[Edge, Shape]
) -> dict[Edge, Shape]:
    """``alive`` with ``made`` in place of what is taken; {} if a taken edge is not alive."""
    if len(set(taken)) < len(taken) or not set(taken) <= set(alive):
        return {}
    first_taken = next(edge for edge in alive if edge in taken)
    after: dict[Edge, Shape] = {}
    for edge, shape in alive.items():
        if edge == first_taken:
            after.update(made)
        if edge not in taken:
            after[edge] = shape
    return after


def _placed(sublayers: tuple[Any, ...], first: State, last: State) -> list[Invertible]:
    """The layers of one node, each between its own two states; the other edges stay as they are."""
    others = {edge: shape for edge, shape in first.alive.items() if edge not in first.touched}
    node = last.touched[0][0]
    placed: list[Invertible] = []
    before = first
    for k, sublayer in enumerate(sublayers):
        if k == len(sublayers) - 1:
            after = last
        else:
            # an edge between two sublayers; a number that no edge of the graph has
            between = (-2 - k, node)
            after = State({between: packed_shape(sublayer.outputs), **others}, (between,))
        if before.all_touched and after.all_touched:
            placed.append(sublayer)
        else:
            placed.append(OnEdges(sublayer, before, after))
        before = after
    return placed

"""A graph of invertible nodes as a flat chain: each acts on the concatenation of the edges that are alive there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from inn_guard.core.invertible import Context, Invertible

__all__ = ["OnEdges", "Shape", "Shapes", "Side", "chain", "pack", "packed_shape", "unpack"]

Shape = tuple[int, ...]  #: of one tensor, without the batch
Shapes = tuple[Shape, ...]
Edge = tuple[int, int]  #: number of the node it leaves, and which of that node's outputs it is
Expand = Callable[[Any, Shapes, Shapes], "tuple[Invertible, ...]"]
Self = TypeVar("Self", bound="OnEdges")


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Several tensors (B, *) flattened and concatenated, (B, D); a single one as it is.

    >>> pack([torch.zeros(5, 2), torch.zeros(5, 3, 4)]).shape
    torch.Size([5, 14])
    """
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)


def unpack(packed: Tensor, shapes: Shapes) -> tuple[Tensor, ...]:
    """What ``pack`` made of tensors of these shapes, taken apart again.

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
    pieces = packed.split([math.prod(shape) for shape in shapes], dim=1)
    return tuple(piece.reshape(-1, *shape) for piece, shape in zip(pieces, shapes, strict=True))


def packed_shape(shapes: Shapes) -> Shape:
    """The shape, without the batch, of what ``pack`` makes of tensors of these shapes."""
    return shapes[0] if len(shapes) == 1 else (sum(math.prod(shape) for shape in shapes),)


@dataclass(frozen=True)
class Side:
    """The edges alive on one side of a layer, in the order of packing, and those that the layer touches."""

    alive: Mapping[Edge, Shape]
    touched: tuple[Edge, ...]

    @property
    def all_touched(self) -> bool:
        """Whether the layer sees exactly the packed state: nothing passes it by, nothing is reordered."""
        return tuple(self.alive) == self.touched

    def split(self, packed: Tensor) -> tuple[Tensor, dict[Edge, Tensor]]:
        """What the layer gets to see, packed, and every edge by itself."""
        edges = dict(zip(self.alive, unpack(packed, tuple(self.alive.values())), strict=True))
        return pack([edges[edge] for edge in self.touched]), edges

    def join(self, result: Tensor, passed: Mapping[Edge, Tensor]) -> Tensor:
        """The layer's result and the edges that passed it by, packed."""
        made = unpack(result, tuple(self.alive[edge] for edge in self.touched))
        edges = {**passed, **dict(zip(self.touched, made, strict=True))}
        return pack([edges[edge] for edge in self.alive])


class OnEdges(Invertible):
    """A layer that acts on some edges of a graph while the others pass by: ``layer`` (+) identity, up to order.

    Attributes:
        layer: what happens to the edges it touches.
        before: the edges alive at its input.
        after: the edges alive at its output.
    """

    def __init__(self, layer: Invertible, before: Side, after: Side) -> None:
        super().__init__()
        self.layer, self.before, self.after = layer, before, after
        self.context = layer.context
        self.training = layer.training

    def forward(self, x: Tensor) -> Tensor:
        """The touched edges through the layer, the others as they are."""
        seen, edges = self.before.split(x)
        return self.after.join(self.layer(seen), edges)

    def inverse(self, z: Tensor) -> Tensor:
        """The touched edges through the layer's inverse, the others as they are."""
        seen, edges = self.after.split(z)
        return self.before.join(self.layer.inverse(seen), edges)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As ``forward``, with the layer's log-determinant: the other edges add nothing to it."""
        seen, edges = self.before.split(x)
        made, log_det = self.layer.forward_and_log_det(seen)
        return self.after.join(made, edges), log_det

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """As ``inverse``, with the layer's log-determinant."""
        seen, edges = self.after.split(z)
        made, log_det = self.layer.inverse_and_log_det(seen)
        return self.before.join(made, edges), log_det

    def with_context(self: Self, context: Context) -> Self:
        """The same layer with another context."""
        return type(self)(self.layer.with_context(context), self.before, self.after)

    @property
    def outputs(self) -> Shapes:
        """Shapes of the edges alive behind it."""
        return tuple(self.after.alive.values())

    @property
    def name(self) -> str:
        """The name of the layer."""
        return self.layer.name


def chain(inn: Any, expand: Expand) -> tuple[Invertible, ...]:
    """The nodes of a graph, in order, as layers between packed states; () if its states do not form a chain.

    ``expand(node, inputs, outputs)`` gives the layers of one node, () if the node cannot stand alone. An edge consumed
    twice or never has no place in a chain of bijections: the graph is then one opaque layer.
    """
    nodes = [
        node for node in _forward_order(inn) if node.module is not None and len(node.inputs) > 0
    ]
    number = {node: k for k, node in enumerate([*inn.in_nodes, *nodes])}
    alive = {(number[node], 0): tuple(node.output_dims[0]) for node in inn.in_nodes}
    final = _edges([node.inputs[0] for node in inn.out_nodes], number)
    layers: list[Invertible] = []
    for node in nodes:
        taken = _edges(node.inputs, number)
        made = {(number[node], k): tuple(shape) for k, shape in enumerate(node.output_dims)}
        after = _replaced(alive, taken, made)
        if node is nodes[-1] and set(after) == set(final):
            after = {edge: after[edge] for edge in final}
        sublayers = (
            expand(node, tuple(alive[edge] for edge in taken), tuple(made.values()))
            if after
            else ()
        )
        if not sublayers:
            return ()
        layers += _placed(sublayers, Side(alive, taken), Side(after, tuple(made)))
        alive = after
    return tuple(layers) if tuple(alive) == final else ()


def _forward_order(inn: Any) -> Sequence[Any]:
    return inn.node_list_fwd if hasattr(inn, "node_list_fwd") else inn.node_list


def _edges(ends: Sequence[tuple[Any, int]], number: Mapping[Any, int]) -> tuple[Edge, ...]:
    return tuple((number.get(node, -1), k) for node, k in ends)


def _replaced(
    alive: dict[Edge, Shape], taken: tuple[Edge, ...], made: dict[Edge, Shape]
) -> dict[Edge, Shape]:
    """``alive`` with the new edges in the place of the first that they come from; {} if one of those is not alive."""
    if len(set(taken)) < len(taken) or not set(taken) <= set(alive):
        return {}
    place = min(list(alive).index(edge) for edge in taken)
    rest = [edge for edge in alive if edge not in taken]
    before = [edge for edge in list(alive)[:place] if edge in rest]
    return {edge: {**alive, **made}[edge] for edge in [*before, *made, *rest[len(before) :]]}


def _placed(sublayers: tuple[Invertible, ...], first: Side, last: Side) -> list[Invertible]:
    """The layers of one node, each between its own two states; what passes the node by passes each of them by."""
    sides = [first]
    for k, sublayer in enumerate(sublayers[:-1]):
        between = (-2 - k, last.touched[0][0])
        passing = {edge: shape for edge, shape in first.alive.items() if edge not in first.touched}
        sides.append(Side({between: packed_shape(sublayer.outputs), **passing}, (between,)))  # type: ignore[arg-type]
    sides.append(last)
    return [
        layer if before.all_touched and after.all_touched else OnEdges(layer, before, after)
        for layer, before, after in zip(sublayers, sides, sides[1:], strict=False)
    ]

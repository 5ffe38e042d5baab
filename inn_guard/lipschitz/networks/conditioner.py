"""A conditioner in its three readings: values over a box, Lipschitz constants, and its part of a chain."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.execution.deadline import Deadline
from inn_guard.lipschitz.lipsdp.chain import Chain, Multipliers
from inn_guard.lipschitz.lipsdp.multipliers import Goal, fast_multipliers, optimise
from inn_guard.lipschitz.lipsdp.recursion import certify
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, ChainReading, Linear, Torus
from inn_guard.lipschitz.networks.graph import CONVOLUTIONS, Network, Unbounded
from inn_guard.lipschitz.networks.interpreters import (
    Channelwise,
    Constant,
    EntrywiseBounds,
    IntervalInterpreter,
    NormProduct,
)
from inn_guard.numerics.convolution_norm import paddings
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.spectral_norm import spectral_norm

__all__ = [
    "Proof",
    "Read",
    "SearchBudget",
    "bound_chain",
    "graph_of",
    "read",
    "searched_multipliers",
    "subnetwork_lipschitz",
    "torus_of",
]


@dataclass(frozen=True)
class SearchBudget:
    """How hard a bound is looked for.

    Attributes:
        steps: optimiser steps per chain; 0 takes the multipliers of ECLipsE-Fast.
        seconds: time per chain.
        width: chains with more neurons in a layer are left to norm products.
        deadline: of everything together; what is foreseen to take longer is replaced by something cheaper.
    """

    steps: int = 60
    seconds: float = 5.0
    width: int = 1024
    deadline: Deadline = Deadline()  # noqa: RUF009 - immutable

    def within(self, share: float) -> SearchBudget:
        """The same in a share of the time that is left."""
        return replace(self, deadline=self.deadline.fraction(share))


@dataclass(frozen=True)
class Proof:
    """A bound of a chain with what proves it."""

    bound: float
    chain: Chain
    multipliers: Multipliers


@dataclass(frozen=True)
class Read:
    """A network that was read on a box.

    Attributes:
        network: its graph.
        box: of its input.
        output: of its output.
        seen: what goes into each activation.
    """

    network: Network
    box: Interval
    output: Interval
    seen: dict[str, Interval]

    def product(self, deadline: Deadline | None = None) -> float:
        """A Lipschitz constant by the product of certified norms; inf where an operation has none."""
        try:
            return self.network.read(
                Constant(1.0, tuple(self.box.shape)), NormProduct(self.seen, deadline)
            ).lipschitz
        except Unbounded:
            return math.inf

    def entries(self) -> Tensor:
        """Bounds of the Jacobian's norms from channel to channel, (outputs, inputs).

        Raises:
            Unbounded: if an operation has none.
        """
        reading = EntrywiseBounds(self.seen) if len(self.box.shape) == 1 else Channelwise(self.seen)
        entries = self.network.read(torch.eye(self.box.shape[0], dtype=torch.float64), reading)
        if bool(entries.isnan().any()):
            raise Unbounded("a weight is not finite")
        return entries

    def into(self, builder: ChainBuilder, x: Linear) -> Linear:
        """The network's output for an input x, as layers of a builder."""
        return self.network.read(x, ChainReading(builder, self.seen))


def graph_of(module: nn.Module, context: Any = None) -> Network:
    """A module as a graph, for a context that is a tensor or none."""
    return Network(module, context if isinstance(context, Tensor) else None)


def read(module: nn.Module | Network, box: Interval, context: Any = None) -> Read:
    """A module, or the graph that was made of it, read on a box of its inputs.

    Raises:
        Unbounded: if the module is not understood.
    """
    network = module if isinstance(module, Network) else graph_of(module, context)
    boxes = IntervalInterpreter()
    try:
        output = network.read(box, boxes)
    except RuntimeError as error:
        raise Unbounded(
            f"{type(network.module).__name__} does not take an input of shape {tuple(box.shape)} ({error})"
        ) from error
    return Read(network, box, output, boxes.seen)


def torus_of(modules: list[nn.Module], shape: tuple[int, ...]) -> Torus | None:
    """The torus on which all convolutions of some modules act for inputs (C, *size); None for vectors.

    Raises:
        Unbounded: if they pad in different ways.
    """
    if len(shape) == 1:
        return None
    spreading = [
        m
        for module in modules
        for m in module.modules()
        if isinstance(m, CONVOLUTIONS) and _spreads(m)
    ]
    modes = {str(module.padding_mode) for module in spreading}
    if len(modes) > 1 or not modes <= {"zeros", "circular"}:
        raise Unbounded(f"paddings {sorted(modes)} have no common torus")
    margin = (
        max([max(*side) for m in spreading for side in paddings(m)], default=0)
        if modes == {"zeros"}
        else 0
    )
    return Torus(tuple(shape[1:]), margin)


def _spreads(module: Any) -> bool:
    return any(k > 1 for k in module.kernel_size)


def bound_chain(chain: Chain, effort: SearchBudget) -> Proof:
    """A certified bound of a chain with multipliers that were looked for with some effort.

    Raises:
        Unbounded: if not even a certificate of the simplest multipliers is foreseen to fit into the time, or into
            floating point.
    """
    if not effort.deadline.can_afford(2 * chain.operations):
        raise Unbounded("time ran out")
    if not chain.layers:
        return Proof(spectral_norm(chain.output, chain.error), chain, ())
    try:
        return _searched(chain, effort)
    except torch.linalg.LinAlgError as error:
        raise Unbounded("a chain of numbers too large or too small for a factorisation") from error


def searched_multipliers(chain: Chain, effort: SearchBudget, goal: Goal) -> Multipliers:
    """Multipliers for a goal, looked for with some effort.

    Raises:
        Unbounded: if not even the simplest are foreseen to fit into the time, or into floating point.
    """
    if not effort.deadline.can_afford(2 * chain.operations):
        raise Unbounded("time ran out")
    try:
        if effort.steps:
            return optimise(
                chain,
                steps=effort.steps,
                deadline=effort.deadline.at_most(effort.seconds),
                goal=goal,
            )
        return fast_multipliers(chain)
    except torch.linalg.LinAlgError as error:
        raise Unbounded("a chain of numbers too large or too small for a factorisation") from error


def _searched(chain: Chain, effort: SearchBudget) -> Proof:
    if effort.steps:
        multipliers = optimise(
            chain, steps=effort.steps, deadline=effort.deadline.at_most(effort.seconds)
        )
        bound = certify(chain, multipliers)
        if math.isfinite(bound):
            return Proof(bound, chain, multipliers)
    multipliers = fast_multipliers(chain)
    return Proof(certify(chain, multipliers), chain, multipliers)


def subnetwork_lipschitz(
    module: nn.Module, box: Interval, *, effort: SearchBudget | None = None, context: Any = None
) -> float:
    """A certified Lipschitz constant of a feed-forward network on a box: the least of norm product and recursion.

    Args:
        module: the network.
        box: its inputs, without batch; ``Box.everywhere(shape)`` for a global constant.
        effort: how hard is looked.
        context: its second argument (B, ...), the constant holding for every row of it.

    Returns:
        The constant.

    Raises:
        Unbounded: if the module is not understood; its text says why.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> subnetwork_lipschitz(net, Interval.of(torch.zeros(2))) < 10
    True
    """
    network = read(module, box, context)
    effort = effort or SearchBudget()
    product = network.product(effort.deadline.fraction(0.5))
    try:
        builder = ChainBuilder(box.shape[0], torus_of([module], tuple(box.shape)))
        chain = builder.finish(network.into(builder, builder.start()))
        if max((len(layer.lower) for layer in chain.layers), default=0) > effort.width:
            return product
        return min(product, bound_chain(chain, effort).bound)
    except Unbounded:
        return product

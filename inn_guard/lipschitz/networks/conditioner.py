"""A conditioner network: values over a box, Lipschitz constants, and its part of a chain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.execution.deadline import Deadline
from inn_guard.lipschitz.lipsdp.chain import Chain, Multipliers
from inn_guard.lipschitz.lipsdp.multipliers import NORM, Goal, fast_multipliers, optimise
from inn_guard.lipschitz.lipsdp.recursion import certify
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, ChainInterpreter, Linear, Torus
from inn_guard.lipschitz.networks.graph import CONVOLUTIONS, Network, Unbounded
from inn_guard.lipschitz.networks.interpreters import (
    Columns,
    Constant,
    DeviationInterpreter,
    IntervalInterpreter,
    JacobianInterpreter,
    NormProduct,
    ReferenceJacobian,
)
from inn_guard.numerics.convolution_norm import paddings
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import Upper, enlarged, frobenius_norm
from inn_guard.numerics.spectral_norm import spectral_norm

__all__ = [
    "AnalysedNetwork",
    "Directions",
    "LinearisedNetwork",
    "Proof",
    "SearchBudget",
    "analyse",
    "bound_chain",
    "linearise",
    "searched_multipliers",
    "subnetwork_lipschitz",
    "torus_of",
    "trace_network",
]

OUTPUT = ""  #: no name of a node
CHUNK = 128  #: columns of a Jacobian that go through a network together


@dataclass(frozen=True)
class SearchBudget:
    """How much time the search for a bound may take.

    Attributes:
        steps: optimiser steps per chain; 0 takes the multipliers of ECLipsE-Fast.
        seconds: time per chain.
        width: chains with more neurons in a layer are bounded by norm products instead.
        deadline: for everything together; work that is expected to take longer is replaced by a
            cheaper bound.
    """

    steps: int = 60
    seconds: float = 5.0
    width: int = 1024
    deadline: Deadline = Deadline()  # noqa: RUF009 - immutable

    def fraction(self, share: float) -> SearchBudget:
        """The same budget within a share of the time that is left."""
        return replace(self, deadline=self.deadline.fraction(share))


@dataclass(frozen=True)
class Proof:
    """A bound of a chain, with the multipliers that prove it."""

    bound: Upper
    chain: Chain
    multipliers: Multipliers


@dataclass(frozen=True)
class AnalysedNetwork:
    """A network with interval bounds of its values over a box.

    Attributes:
        network: its graph.
        box: box of its input.
        output: box of its output.
        preactivations: box of the input of each activation.
    """

    network: Network
    box: Interval
    output: Interval
    preactivations: dict[str, Interval]

    def constant(
        self,
        deadline: Deadline | None = None,
        reference: dict[str, Interval] | None = None,
    ) -> Constant:
        """A Lipschitz constant by certified norms.

        Args:
            deadline: norms that would take longer are replaced by cheaper ones.
            reference: preactivations at a point, whose slopes the Jacobian is compared with.

        Raises:
            Unbounded: if an operation has none.
        """
        start = Constant(Upper(1.0), tuple(self.box.shape))
        return self.network.interpret(start, NormProduct(self.preactivations, deadline, reference))

    def product(self, deadline: Deadline | None = None) -> Upper:
        """The constant; inf where an operation has none."""
        try:
            return self.constant(deadline).lipschitz
        except Unbounded:
            return Upper(math.inf)

    def jacobian(self) -> Interval:
        """The Jacobian over the box, (outputs, inputs), images flattened."""
        inputs = self.box.shape.numel()
        unit = torch.eye(inputs, dtype=torch.float64).reshape(inputs, *self.box.shape)
        moved = self.network.interpret(Interval.of(unit), JacobianInterpreter(self.preactivations))
        return moved.map(lambda t: t.flatten(1).T)

    def append_to(self, builder: ChainBuilder, x: Linear) -> Linear:
        """The network's output for an input x; its layers are appended to the builder's chain."""
        return self.network.interpret(x, ChainInterpreter(builder, self.preactivations))


@dataclass(frozen=True)
class Directions:
    """All d = e + w with |e_i| <= radius_i and ||w|| <= slack, of flattened inputs.

    Attributes:
        radius: (n,).
        slack: of the Euclidean norm of w.
    """

    radius: Tensor
    slack: Upper

    @property
    def length(self) -> Upper:
        """A bound of ||d||."""
        return frobenius_norm(self.radius[None]) + self.slack

    def spread(self, sums: Tensor, squares: Tensor, error: Upper) -> Tensor:
        """How far sum_i d_i column_i moves each entry.

        Args:
            sums: sum_i radius_i |column_i|, as computed.
            squares: sum_i column_i^2.
            error: bounds the Frobenius norm of the columns' rounding error.
        """
        terms = len(self.radius) + 4
        moved = sums + self.slack * squares.sqrt() + self.length * error
        return enlarged(moved, 2 * terms)


@dataclass(frozen=True)
class LinearisedNetwork:
    """A network near a point, for inputs of a neighbourhood.

    Attributes:
        near: its values and slopes, boxes of which follow from the linear approximation.
        point: its values at the point.
        columns: the reference Jacobian times the columns of the inputs.
    """

    near: AnalysedNetwork
    point: AnalysedNetwork
    columns: Columns

    def constant(self) -> Constant:
        """Bounds of the Jacobian, and of its distance from the reference."""
        return self.near.constant(reference=self.point.preactivations)


def linearise(
    network: Network, point: Interval, box: Interval, inputs: Tensor, directions: Directions
) -> LinearisedNetwork:
    """A network in the neighbourhood of a point.

    Args:
        network: its graph.
        point: encloses the input at the centre.
        box: holds every input.
        inputs: what each direction moves in the input, (n, *shape), exactly.
        directions: which moves there are.

    Raises:
        Unbounded: if an operation of the module is not known, or its values are not.
    """
    at_point = analyse(network, point)
    # of the columns in front of each activation, by node, and of the output
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    errors: dict[str, Upper] = {}
    parts: list[Columns] = []
    # a few columns at a time: those inside a network take much memory
    for start in range(0, len(inputs), CHUNK):
        chunk = slice(start, start + CHUNK)

        def collect(node: str, x: Columns, radius: Tensor = directions.radius[chunk]) -> None:
            size = x.values.abs()
            sums[node] = sums.get(node, 0.0) + torch.tensordot(radius, size, 1)
            squares[node] = squares.get(node, 0.0) + size.square().sum(0)
            square = x.error * x.error
            errors[node] = errors.get(node, Upper(0.0)) + square

        jacobian = ReferenceJacobian(at_point.preactivations, collect)
        parts.append(network.interpret(Columns(inputs[chunk], Upper(0.0)), jacobian))
        collect(OUTPUT, parts[-1])
    spread = {n: directions.spread(sums[n], squares[n], errors[n].sqrt()) for n in sums}
    deviation = DeviationInterpreter(at_point.preactivations, spread)
    apart = network.interpret(torch.zeros_like(point.lo), deviation)
    moved = enlarged(apart + spread[OUTPUT], 1)
    output = at_point.output + Interval(-moved, moved)
    near = AnalysedNetwork(network, box, output, deviation.preactivations)
    columns = Columns(torch.cat([part.values for part in parts]), errors[OUTPUT].sqrt())
    return LinearisedNetwork(near, at_point, columns)


def trace_network(module: nn.Module, context: Any = None) -> Network:
    """The graph of a module; a context that is no tensor counts as none."""
    if not isinstance(context, Tensor):
        context = None
    return Network(module, context)


def analyse(module: nn.Module | Network, box: Interval, context: Any = None) -> AnalysedNetwork:
    """Interval bounds of all values of a module, or of its graph, over a box of inputs.

    Raises:
        Unbounded: if an operation of the module is not known.
    """
    network = module
    if not isinstance(network, Network):
        network = trace_network(network, context)
    interpreter = IntervalInterpreter()
    try:
        output = network.interpret(box, interpreter)
    except RuntimeError as error:
        name = type(network.module).__name__
        raise Unbounded(
            f"{name} does not take an input of shape {tuple(box.shape)} ({error})"
        ) from error
    return AnalysedNetwork(network, box, output, interpreter.preactivations)


def torus_of(modules: list[nn.Module], shape: tuple[int, ...]) -> Torus | None:
    """The torus on which all convolutions act for inputs (C, *size); None for vectors.

    Raises:
        Unbounded: if they pad in different ways.
    """
    if len(shape) == 1:
        return None
    modes, margin = set(), 0
    for module in modules:
        for part in module.modules():
            if not isinstance(part, CONVOLUTIONS) or set(part.kernel_size) == {1}:
                continue
            modes.add(str(part.padding_mode))
            before, after = paddings(part)
            margin = max(margin, *before, *after)
    if len(modes) > 1 or not modes <= {"zeros", "circular"}:
        raise Unbounded(f"paddings {sorted(modes)} have no common torus")
    if modes != {"zeros"}:
        margin = 0
    return Torus(tuple(shape[1:]), margin)


def bound_chain(chain: Chain, effort: SearchBudget) -> Proof:
    """A certified bound of a chain, with the best multipliers found within a budget.

    Raises:
        Unbounded: if there is no time for a certificate of the simplest multipliers, or if numbers
            are too large or too small for a factorisation.
    """
    if not effort.deadline.can_afford(2 * chain.operations):
        raise Unbounded("time ran out")
    if not chain.layers:
        return Proof(spectral_norm(chain.output, chain.error), chain, ())
    with _failed_factorisation_is_unbounded():
        multipliers = _search(chain, effort, NORM)
        bound = certify(chain, multipliers)
        if effort.steps and not math.isfinite(bound):
            multipliers = fast_multipliers(chain)
            bound = certify(chain, multipliers)
        return Proof(bound, chain, multipliers)


def searched_multipliers(chain: Chain, effort: SearchBudget, goal: Goal) -> Multipliers:
    """The best multipliers for a goal found within a budget.

    Raises:
        Unbounded: if there is no time for the simplest, or if numbers are too large or too small
            for a factorisation.
    """
    if not effort.deadline.can_afford(2 * chain.operations):
        raise Unbounded("time ran out")
    with _failed_factorisation_is_unbounded():
        return _search(chain, effort, goal)


def _search(chain: Chain, effort: SearchBudget, goal: Goal) -> Multipliers:
    if not effort.steps:
        return fast_multipliers(chain)
    deadline = effort.deadline.at_most(effort.seconds)
    return optimise(chain, steps=effort.steps, deadline=deadline, goal=goal)


@contextmanager
def _failed_factorisation_is_unbounded() -> Iterator[None]:
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise Unbounded("a chain of numbers too large or too small for a factorisation") from error


def subnetwork_lipschitz(
    module: nn.Module, box: Interval, *, effort: SearchBudget | None = None, context: Any = None
) -> Upper:
    """A certified Lipschitz constant of a network on a box, by norm product or recursion.

    Args:
        module: the network.
        box: its inputs, without batch; ``Box.everywhere(shape)`` for a global constant.
        effort: budget of the search; default: ``SearchBudget()``.
        context: its second argument (B, ...); the constant holds for every row of it.

    Returns:
        The constant, dimensionless.

    Raises:
        Unbounded: if an operation of the module is not known; the text names it.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> subnetwork_lipschitz(net, Interval.of(torch.zeros(2))) < 10
    True
    """
    network = analyse(module, box, context)
    effort = effort or SearchBudget()
    product = network.product(effort.deadline.fraction(0.5))
    try:
        builder = ChainBuilder(box.shape[0], torus_of([module], tuple(box.shape)))
        chain = builder.finish(network.append_to(builder, builder.start()))
        if chain.width > effort.width:
            return product
        return Upper.min(product, bound_chain(chain, effort).bound)
    except Unbounded:
        return product

"""Jacobians of maps of which nothing is known, from one recorded pass.

Every operation of one pass is recorded. Elementwise operations become their slopes, merged over
chains of them; matrix products, convolutions and moves of entries become themselves; what is left
is differentiated by autograd, one operation at a time. So a product costs what the matrix products
of the map cost. J^-1 is found by solving the same steps where they can be solved, as in every
coupling, at the states of the forward pass. Nothing depends on classes of layers, and nothing is
believed: J^T u is compared with autograd's, and J v with J^T u, before either is used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import (
    INEXACT,
    ROUNDING,
    AutogradJacobian,
    LayerJacobian,
    Map,
    NotApplicable,
    is_adjoint_pair,
    random_vectors,
)
from inn_guard.core.tensors import norms
from inn_guard.jacobian.factored import Factored, factored
from inn_guard.jacobian.linear_program import (
    Assembly,
    ChannelMixing,
    Combination,
    Convolved,
    LinearProgram,
    PerSource,
    Rearrangement,
    Reshape,
    Selection,
    Step,
    solved,
)
from inn_guard.jacobian.network_products import AutogradNetwork, Convolution, NetworkJacobian

__all__ = [
    "RecordedJacobian",
    "RecordedNetwork",
    "linearize_function",
    "recorded_jacobian",
    "recorded_network",
]

aten = torch.ops.aten

#: An inverse is recorded up to this many times the operations of the forward pass.
LONG = 10
#: what steps raise at vectors that they are not made for
_FAILURES = (NotApplicable, RuntimeError, IndexError, KeyError, TypeError)


def recorded_jacobian(layer: Invertible, x: Tensor, known: AutogradJacobian) -> LayerJacobian:
    """The Jacobian of a layer by a recorded pass, if it is measured to be right; else ``known``.

    Args:
        layer: the layer; in training mode a second pass would draw other random numbers, so that
            it is not recorded.
        x: its input.
        known: its Jacobian by autograd.
    """
    if layer.training:
        return known
    program = _checked_program(_Call(layer, layer), x, known)
    if program is None:
        return known
    return RecordedJacobian(_Call(layer.inverse, layer), program, known)


def linearize_function(function: Map, x: Tensor, *, module: nn.Module) -> NetworkJacobian:
    """The Jacobian of a network at x, recorded if that is measured to be right, else by autograd.

    Args:
        function: (B, *in) -> (B, *out).
        x: (B, *in).
        module: what ``function`` calls. With a part in training mode it is not recorded: a second
            pass would draw other random numbers, or update statistics twice.
    """
    known = AutogradNetwork(function, x)
    if any(part.training for part in module.modules()):
        return known
    program = _checked_program(_Call(function, module), x.detach(), known)
    if program is None:
        return known
    return RecordedNetwork(program, known.output, x.dim())


def recorded_network(function: Map, x: Tensor, *, module: nn.Module) -> NetworkJacobian:
    """As `linearize_function`, for callers that compare the layer of the network with autograd.

    Only J v and J^T u are compared, with one another: whether they belong to ``function``, which
    costs a forward and a backward pass of it, is not.
    """
    if any(part.training for part in module.modules()):
        return AutogradNetwork(function, x)
    program, output = _program(_Call(function, module), x.detach())
    if program is None or output is None or not _transposes(program, x, output):
        return AutogradNetwork(function, x)
    return RecordedNetwork(program, output, x.dim())


class RecordedNetwork:
    """J v and J^T u by the steps of a recorded pass."""

    def __init__(self, program: LinearProgram, output: Tensor, dims: int) -> None:
        self.output = output
        self._program, self._dims = program, dims

    @torch.no_grad()
    def select(self, rows: Tensor) -> RecordedNetwork | None:
        """The Jacobian at these rows; None where its steps do not keep the samples apart."""
        program = self._program.select(rows)
        return None if program is None else RecordedNetwork(program, self.output[rows], self._dims)

    def in_dtype(self, dtype: torch.dtype) -> RecordedNetwork | None:
        """The Jacobian whose products are computed in ``dtype``; None where none is large."""
        program = self._program.in_dtype(dtype, short=(self._program.start,))
        return None if program is None else RecordedNetwork(program, self.output, self._dims)

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (..., B, *out)."""
        if v.dim() == self._dims:
            return self._program.run(v)
        return torch.stack([self.jvp(row) for row in v])

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u, (..., B, *in)."""
        if u.dim() == self.output.dim():
            return self._program.run_transposed(u)
        return torch.stack([self.vjp(row) for row in u])


class RecordedJacobian:
    """The four products by the steps of a recorded pass.

    J^-1 solves the steps of J, at the states of the forward pass. Where they cannot be solved one
    by one, the layer's own inverse is recorded at F(x). An inverse of very many operations, as one
    pass for each dimension, is not: a dense J is factorised in its place, if it is not too large.
    What is left is differentiated by autograd.
    """

    def __init__(self, inverse: _Call, program: LinearProgram, known: AutogradJacobian) -> None:
        self.output = known.output
        self._inverse, self._program, self._known = inverse, program, known
        self._back: LinearProgram | Factored | None = None
        self._asked = False
        #: of which Jacobian this one has which rows
        self._part_of: tuple[RecordedJacobian, Tensor] | None = None

    @torch.no_grad()
    def select(self, rows: Tensor) -> RecordedJacobian | None:
        """The Jacobian of these rows; None where its steps do not keep the samples apart."""
        program = self._program.select(rows)
        if program is None or (self._asked and (self._back is None or not self._back.batch)):
            return None
        clone = copy.copy(self)
        clone.output, clone._program = self.output[rows], program
        clone._part_of, clone._asked = (self, rows), False
        return clone

    def in_dtype(self, dtype: torch.dtype) -> RecordedJacobian | None:
        """The Jacobian with its large products in ``dtype``; None where it has none."""
        back = self._backwards()
        program = self._program.in_dtype(dtype)
        back_program = None if back is None else back.in_dtype(dtype)
        if program is None or back_program is None:
            return None
        clone = copy.copy(self)
        clone._program, clone._back = program, back_program
        return clone

    def forward_transposes(self) -> bool:
        """True: it has been measured."""
        return True

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (B, *data) -> (B, *latent)."""
        return self._program.run(v)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u: (B, *latent) -> (B, *data); a leading dimension holds several u per sample."""
        if u.dim() > self.output.dim():
            return torch.stack([self.vjp(row) for row in u])
        return self._program.run_transposed(u)

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """J^-1 u: (B, *latent) -> (B, *data)."""
        back = self._backwards()
        return self._by_autograd(u).inverse_jvp(u) if back is None else back.run(u)

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """J^-T v: (B, *data) -> (B, *latent)."""
        back = self._backwards()
        return self._by_autograd(v).inverse_vjp(v) if back is None else back.run_transposed(v)

    def _by_autograd(self, v: Tensor) -> AutogradJacobian:
        if self._part_of is not None:
            raise NotApplicable("the inverse of some samples alone is not known")
        return self._known

    @torch.no_grad()
    def _backwards(self) -> LinearProgram | Factored | None:
        """The steps of J^-1. Many audits need the forward products only: found on demand."""
        if self._asked:
            return self._back
        self._asked = True
        if self._part_of is not None:
            whole, rows = self._part_of
            back = whole._backwards()
            self._back = None if back is None else back.select(rows)
            return self._back
        self._back = solved(self._program)
        if self._back is None:
            at_most = LONG * (1 + len(self._program.steps))
            self._back = _program(self._inverse, self.output, at_most=at_most)[0]
        if self._back is None:
            known = RecordedNetwork(self._program, self.output, self.output.dim())
            self._back = factored(known)
        elif self._program.batch:
            (u,) = random_vectors(self.output)
            x = self._back.run(u)
            (v,) = random_vectors(x)
            _measure_separability(self._back, (u, x), (v, self._back.run_transposed(v)))
        return self._back


@torch.no_grad()
def _checked_program(
    function: _Call, x: Tensor, known: AutogradJacobian | AutogradNetwork
) -> LinearProgram | None:
    """The steps of J if they give what autograd gives at random vectors; else None."""
    program, output = _program(function, x)
    if program is None or output is None or output.shape != known.output.shape:
        return None
    (u,) = random_vectors(known.output)
    try:
        expected, back = known.vjp(u), program.run_transposed(u)
    except _FAILURES:
        return None
    same = _close(output, known.output) and _close(back, expected)
    return program if same and _transposes(program, x, output) else None


@torch.no_grad()
def _transposes(program: LinearProgram, x: Tensor, output: Tensor) -> bool:
    """Whether J v and J^T u of the program are transposes; finds also which samples it selects."""
    v, u = random_vectors(x, output)
    try:
        image, back = program.run(v), program.run_transposed(u)
    except _FAILURES:
        return False
    shapes_fit = image.shape == output.shape and back.shape == x.shape
    if not shapes_fit or not is_adjoint_pair(image, u, v, back):
        return False
    _measure_separability(program, (v, image), (u, back))
    return True


def _measure_separability(
    program: LinearProgram, forward: tuple[Tensor, Tensor], backward: tuple[Tensor, Tensor]
) -> None:
    """Let the program select samples if its products for two of them are those of the batch.

    Args:
        program: of a batch.
        forward: (v, A v).
        backward: (u, A^T u).
    """
    batch = len(forward[0])
    rows = torch.tensor([batch - 1, 0], device=forward[0].device)
    program.batch = batch
    try:
        few = program.select(rows)
        right = few is not None
        if few is not None:
            image, back = few.run(forward[0][rows]), few.run_transposed(backward[0][rows])
            right = _close(image, forward[1][rows]) and _close(back, backward[1][rows])
    except _FAILURES:
        right = False
    if not right:
        program.batch = 0


def _close(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    rounding = ROUNDING * torch.finfo(expected.dtype).eps * math.sqrt(expected[:1].numel())
    tolerance = min(INEXACT, rounding)
    gap, size = norms(actual - expected), norms(expected)
    # samples that are not finite have no products to compare
    return bool(((gap <= tolerance * size) | ~size.isfinite()).all())


@torch.no_grad()
def _program(
    function: _Call, x: Tensor, *, at_most: float | int = math.inf
) -> tuple[LinearProgram | None, Tensor | None]:
    """The steps of the derivative of ``function`` at x, and its value; (None, None) without.

    Also where the function takes more than ``at_most`` operations.
    """
    start = x.detach().clone()
    recorder = _Recorder(start, at_most)
    try:
        # writing in place becomes an operation with a result, so that no value is lost
        with _without_fused_attention(), recorder:
            output = torch.func.functionalize(function.with_tensors, remove="mutations")(
                start, function.tensors()
            )
        builder = _Builder(start)
        with torch.enable_grad():
            for operation in _leading_to(output, recorder.operations):
                builder.add(operation)
        end = builder.number_of(output)
    except torch.OutOfMemoryError:
        raise
    # a map of a user's may refuse to be recorded in any way, and is then differentiated by autograd
    except Exception:
        return None, None
    return LinearProgram(builder.steps, 0, end), output.detach()


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """A block in which attention is made of operations that have all derivatives."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Call(nn.Module):
    """A function together with the module that it calls."""

    def __init__(self, function: Map, module: nn.Module) -> None:
        super().__init__()
        self._function = [function]  # in a list, so that a module is not registered twice
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """The function's value."""
        return self._function[0](x)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers of the module."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def with_tensors(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """The function's value with these parameters and buffers.

        What is written into in place has to be an argument of the function, or made of one.
        """
        value: Tensor = torch.func.functional_call(self, tensors, (x,))
        return value


@dataclass(frozen=True)
class _Operation:
    """``function(*arguments, **named)`` returned ``outputs``."""

    function: Any
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    outputs: tuple[Tensor, ...]


class _Recorder(TorchDispatchMode):
    """Notes the operations that read a tensor, or what other such operations have returned."""

    def __init__(self, start: Tensor, at_most: float | int) -> None:
        super().__init__()
        self._at_most = at_most
        self.operations: list[_Operation] = []
        self._followed = {id(start)}  # ``operations`` keeps the tensors: no id is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation itself."""
        named = kwargs or {}
        result = func(*args, **named)
        if func is aten.detach.default or self._followed.isdisjoint(map(id, _tensors(args, named))):
            return result
        outputs = tuple(_tensors(result))
        self._followed.update(id(output) for output in outputs if output.is_floating_point())
        self.operations.append(_Operation(func, tuple(args), dict(named), outputs))
        if len(self.operations) > self._at_most:
            raise NotApplicable("the map takes too many operations to be worth recording")
        return result


class _Builder:
    """Turns operations into steps, in their order.

    A tensor that depends on x is a sum of coefficients times numbered values. As long as operations
    are elementwise, the coefficients are multiplied; what is not elementwise makes the sum a value
    of its own.
    """

    def __init__(self, start: Tensor) -> None:
        self.steps: list[Step] = []
        #: tensor -> its value's number -> coefficient; the tensor itself, which keeps its id
        self._terms: dict[int, dict[int, Tensor | None]] = {id(start): {0: None}}
        #: number of a value -> the step that has put it together
        self.assemblies: dict[int, Assembly] = {}
        self._count = 1

    def is_active(self, value: Any) -> bool:
        """Whether it is a tensor that depends on x."""
        return isinstance(value, Tensor) and id(value) in self._terms

    def number_of(self, tensor: Tensor) -> int:
        """The number of the tensor's value, which becomes a step of its own if it has none."""
        terms = self._terms[id(tensor)]
        if len(terms) == 1:
            ((number, coefficient),) = terms.items()
            if coefficient is None:
                return number
        number = self.new()
        coefficients = tuple(map(_laid_out, terms.values()))
        self.steps.append(Combination(tuple(terms), number, coefficients))
        self._terms[id(tensor)] = {number: None}
        return number

    def add(self, operation: _Operation) -> None:
        """Append the steps of one operation."""
        function, arguments = operation.function, operation.arguments
        # what autograd has found not to depend on x, as zeros_like, is not followed any further
        if not any(map(self.is_active, _tensors(arguments, operation.named))):
            return
        if function is aten.copy.default:
            arguments = arguments[1:]  # its first argument gives shape and dtype only
            if not self.is_active(arguments[0]):
                return
        same = function in _SAME and arguments[0].shape == operation.outputs[0].shape
        if same and arguments[0].dtype == operation.outputs[0].dtype:
            self._terms[id(operation.outputs[0])] = dict(self._terms[id(arguments[0])])
            return
        if torch.Tag.pointwise in function.tags:
            self._pointwise(operation)
            return
        rule = _RULES.get(function)
        if rule is None or not rule(self, operation):
            self._differentiated(operation)

    def reshaped(self, source: tuple[int, ...], before: torch.Size, after: torch.Size) -> int:
        """The number of a value in another shape."""
        self.steps.append(Reshape(source, self.new(), before, after))
        return self.steps[-1].target

    def name(self, output: Tensor, number: int) -> None:
        """Say that the output is the value with this number."""
        self._terms[id(output)] = {number: None}

    def new(self) -> int:
        """A number for a value."""
        self._count += 1
        return self._count - 1

    def step(self, output: Tensor, step: Step) -> bool:
        """Append a step whose target, a new number, is the output."""
        self.steps.append(step)
        self.name(output, step.target)
        return True

    def _pointwise(self, operation: _Operation) -> None:
        """The slopes of an elementwise operation times the coefficients of what it reads."""
        (output,) = operation.outputs
        if not output.is_floating_point():
            return
        total: dict[int, Tensor | None] = {}
        for active, slope in self._slopes(operation):
            if active.shape == output.shape:
                terms = self._terms[id(active)]
            else:
                terms = {self._expanded(active, output.shape): None}
            for number, coefficient in terms.items():
                part = _product(slope, coefficient)
                if number in total:
                    part = _or_one(total[number], output) + _or_one(part, output)
                total[number] = part
        if total:
            self._terms[id(output)] = total

    def _slopes(self, operation: _Operation) -> list[tuple[Tensor, Tensor | None]]:
        """Each tensor that depends on x, with the derivative by it; None where that is 1."""
        (output,) = operation.outputs
        active = _distinct(filter(self.is_active, _tensors(operation.arguments, operation.named)))
        plain = not operation.named and len(operation.arguments) == 2
        if operation.function in _SUMS and plain and output.dtype == active[0].dtype:
            first, second = operation.arguments
            if first is not second:
                minus = operation.function is aten.sub.Tensor and second is active[-1]
                slopes: list[Tensor | None] = [None for _ in active]
                if minus:
                    slopes[-1] = output.new_full((), -1).expand_as(output)
                return list(zip(active, slopes, strict=True))
        leaves = {id(t): t.detach().expand(output.shape).requires_grad_() for t in active}
        again = _called(operation, leaves)
        found = torch.autograd.grad(
            again, list(leaves.values()), torch.ones_like(again), allow_unused=True
        )
        pairs = zip(active, found, strict=True)
        return [(t, slope.detach()) for t, slope in pairs if slope is not None]

    def _expanded(self, tensor: Tensor, shape: torch.Size) -> int:
        """The number of a value that is broadcast to a shape."""
        source, size, target = self.number_of(tensor), tensor.shape, self.new()
        self.steps.append(
            PerSource((source,), target, (_Expansion(size, shape, tensor),)),
        )
        return target

    def _differentiated(self, operation: _Operation) -> None:
        """The steps of an operation of which nothing is known, by autograd through it alone."""
        active = _distinct(filter(self.is_active, _tensors(operation.arguments, operation.named)))
        for k, output in enumerate(operation.outputs):
            if not output.is_floating_point():
                continue
            sources, jacobians = [], []
            for tensor in active:
                jacobian = AutogradNetwork(_Alone(operation, tensor, k), tensor)
                if not jacobian.is_zero:
                    sources.append(self.number_of(tensor))
                    jacobians.append(jacobian)
            # without a source, as of zeros_like, the output does not depend on x
            if sources:
                self.step(output, PerSource(tuple(sources), self.new(), tuple(jacobians)))


@dataclass(frozen=True)
class _Alone:
    """One output of an operation as a function of one of its tensors."""

    operation: _Operation
    tensor: Tensor
    output: int

    def __call__(self, value: Tensor) -> Tensor:
        """That output."""
        result = _called(self.operation, {id(self.tensor): value})
        return _tensors(result)[self.output]


class _Expansion:
    """The Jacobian of broadcasting a tensor to a shape."""

    def __init__(self, before: torch.Size, after: torch.Size, like: Tensor) -> None:
        self.before, self.after = before, after
        self.output = like.new_empty(()).expand(after)

    def jvp(self, v: Tensor) -> Tensor:
        """J v: v, repeated."""
        return v.expand(self.after)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u: its sums."""
        return u.sum_to_size(self.before)


def _leading_to(output: Tensor, operations: Sequence[_Operation]) -> list[_Operation]:
    """The operations that the output depends on, in their order: not those of a log-determinant."""
    needed, kept = {id(output)}, []
    for operation in reversed(operations):
        if not needed.isdisjoint(map(id, operation.outputs)):
            needed.update(map(id, _tensors(operation.arguments, operation.named)))
            kept.append(operation)
    return kept[::-1]


def _tensors(*nested: Any) -> list[Tensor]:
    """The tensors in arguments: operations nest them in lists and tuples, and name some."""
    found: list[Tensor] = []
    for part in nested:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (list, tuple)):
            found += _tensors(*part)
        elif isinstance(part, dict):
            found += _tensors(*part.values())
    return found


def _distinct(tensors: Any) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _called(operation: _Operation, replaced: dict[int, Tensor]) -> Any:
    """The operation with some of its tensors replaced."""
    arguments, named = tree_map(
        lambda leaf: replaced.get(id(leaf), leaf), (operation.arguments, operation.named)
    )
    return operation.function(*arguments, **named)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a * b


def _laid_out(coefficient: Tensor | None) -> Tensor | None:
    """In the layout of what convolutions return: elementwise products of two layouts are slow."""
    if coefficient is None or coefficient.dim() != 4:
        return coefficient
    return coefficient.contiguous(memory_format=torch.channels_last)


def _or_one(coefficient: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like) if coefficient is None else coefficient


Rule = Callable[[_Builder, _Operation], bool]

_SAME = {aten.clone.default, aten.alias.default, aten.lift_fresh.default, aten.copy.default}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}


def _reshaped(builder: _Builder, operation: _Operation) -> bool:
    tensor, output = operation.arguments[0], operation.outputs[0]
    source = (builder.number_of(tensor),)
    builder.name(output, builder.reshaped(source, tensor.shape, output.shape))
    return True


def _transposed(builder: _Builder, operation: _Operation) -> bool:
    tensor, output = operation.arguments[0], operation.outputs[0]
    dims = operation.arguments[1:] or (0, 1)
    if tensor.dim() < 2:
        return False
    source = (builder.number_of(tensor),)

    def swap(v: Tensor) -> Tensor:
        return v.transpose(*dims)

    return builder.step(output, Rearrangement(source, builder.new(), swap, swap))


def _permuted(builder: _Builder, operation: _Operation) -> bool:
    tensor, order = operation.arguments
    back = [
        order.index(k) if k in order else order.index(k - len(order)) for k in range(len(order))
    ]
    source = (builder.number_of(tensor),)
    step = Rearrangement(
        source, builder.new(), lambda v: v.permute(order), lambda u: u.permute(back)
    )
    return builder.step(operation.outputs[0], step)


def _cast(builder: _Builder, operation: _Operation) -> bool:
    tensor, output = operation.arguments[0], operation.outputs[0]
    before, after = tensor.dtype, output.dtype
    source = (builder.number_of(tensor),)
    there, back = lambda v: v.to(after), lambda u: u.to(before)
    return builder.step(output, Rearrangement(source, builder.new(), there, back))


def _select(builder: _Builder, tensor: Tensor, output: Tensor, dim: int, index: Any) -> bool:
    source = (builder.number_of(tensor),)
    dim = dim % tensor.dim()
    step = Selection(source, builder.new(), dim, index, tensor.shape[dim])
    return builder.step(output, step)


def _sliced(builder: _Builder, operation: _Operation) -> bool:
    tensor, dim, start, end, step = (*operation.arguments, *(None,) * 4)[:5]
    dim = dim or 0
    index = range(tensor.shape[dim])[start : end : step or 1]
    return _select(builder, tensor, operation.outputs[0], dim, index)


def _one_selected(builder: _Builder, operation: _Operation) -> bool:
    """One index along a dimension, which vanishes."""
    tensor, dim, index = operation.arguments
    output = operation.outputs[0]
    dim, index = dim % tensor.dim(), index % tensor.shape[dim]
    source = (builder.number_of(tensor),)
    step = Selection(source, builder.new(), dim, range(index, index + 1), tensor.shape[dim])
    builder.steps.append(step)
    shape = torch.Size([*tensor.shape[:dim], 1, *tensor.shape[dim + 1 :]])
    builder.name(output, builder.reshaped((step.target,), shape, output.shape))
    return True


def _split(builder: _Builder, operation: _Operation) -> bool:
    tensor, _, dim = (*operation.arguments, 0)[:3]
    begin = 0
    for output in operation.outputs:
        size = output.shape[dim]
        _select(builder, tensor, output, dim, range(begin, begin + size))
        begin += size
    return True


def _index_selected(builder: _Builder, operation: _Operation) -> bool:
    tensor, dim, index = operation.arguments
    return _select(builder, tensor, operation.outputs[0], dim, index)


def _indexed(builder: _Builder, operation: _Operation) -> bool:
    """Entries at an index along one dimension, or at a mask."""
    tensor, indices = operation.arguments
    place = _place_of(indices, tensor.shape)
    if place is None:
        return False
    source = (builder.number_of(tensor),)
    if place.shape != tensor.shape:
        source = (builder.reshaped(source, tensor.shape, place.shape),)
    step = Selection(source, builder.new(), place.dim, place.index, place.shape[place.dim])
    return builder.step(operation.outputs[0], step)


def _index_put(builder: _Builder, operation: _Operation) -> bool:
    """Values at an index or a mask, put beside what has been put elsewhere."""
    tensor, indices, values, *accumulate = operation.arguments
    place = _place_of(indices, tensor.shape)
    if place is None or any(accumulate) or not builder.is_active(values):
        return False
    wanted = list(place.shape)
    wanted[place.dim] = len(place.index)
    if list(values.shape) != wanted:
        return False
    sources = [builder.number_of(values)]
    indexes: list[range | Tensor] = [place.index]
    if builder.is_active(tensor):
        before = builder.assemblies.get(builder.number_of(tensor))
        if before is None or before.dim != place.dim:
            return False
        sources += before.sources
        indexes += before.indexes
    numbers = [number for part in indexes for number in _list(part)]
    if len(numbers) != len(set(numbers)):
        return False
    size = place.shape[place.dim]
    step = Assembly(tuple(sources), builder.new(), place.dim, tuple(indexes), size)
    output = operation.outputs[0]
    builder.step(output, step)
    if place.shape != tensor.shape:
        number = builder.reshaped((step.target,), place.shape, tensor.shape)
        builder.name(output, number)
    builder.assemblies[builder.number_of(output)] = step
    return True


def _concatenated(builder: _Builder, operation: _Operation) -> bool:
    tensors, dim = (*operation.arguments, 0)[:2]
    output = operation.outputs[0]
    dim = dim % output.dim()
    sources, indexes, begin = [], [], 0
    for tensor in tensors:
        if tensor.dim() != output.dim():
            return False
        size = tensor.shape[dim]
        if builder.is_active(tensor):
            sources.append(builder.number_of(tensor))
            indexes.append(range(begin, begin + size))
        begin += size
    step = Assembly(tuple(sources), builder.new(), dim, tuple(indexes), begin)
    return builder.step(output, step)


def _multiplied(builder: _Builder, operation: _Operation) -> bool:
    """x W, or b + x W, with a constant W."""
    *shift, tensor, weight = operation.arguments
    if operation.named or any(map(builder.is_active, [*shift, weight])):
        return False
    source = (builder.number_of(tensor),)
    step = ChannelMixing(source, builder.new(), weight.detach().t(), tensor.dim() - 1)
    return builder.step(operation.outputs[0], step)


def _convolved(builder: _Builder, operation: _Operation) -> bool:
    tensor, weight, bias, stride, padding, dilation, transposed, _, groups = operation.arguments
    active = [value for value in (weight, bias) if builder.is_active(value)]
    if active or transposed or weight.dim() != 4:
        return False
    source = (builder.number_of(tensor),)
    weight = weight.detach()
    if {*weight.shape[2:], *stride, groups} == {1} and not any(padding):
        step: Step = ChannelMixing(source, builder.new(), weight.flatten(1), 1)
    else:
        geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
        convolution = Convolution.of_weight(weight, geometry, operation.outputs[0], tensor.shape)
        step = Convolved(source, builder.new(), convolution)
    return builder.step(operation.outputs[0], step)


@dataclass(frozen=True)
class _Place:
    """Entries ``index`` along ``dim`` of a tensor that is seen in this shape."""

    shape: torch.Size
    dim: int
    index: Tensor


def _place_of(indices: Sequence[Tensor | None], shape: torch.Size) -> _Place | None:
    """What indices select if it is one dimension's index or one leading mask; else None."""
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        return None
    ((dim, index),) = given
    if index.dtype == torch.bool:
        # the dimensions of the mask are seen as one
        merged = torch.Size([*shape[:dim], index.numel(), *shape[dim + index.dim() :]])
        return _Place(merged, dim, index.flatten().nonzero()[:, 0])
    if index.dim() != 1 or index.dtype != torch.int64:
        return None
    return _Place(shape, dim, index)


def _list(index: range | Tensor) -> list[int]:
    return index.tolist() if isinstance(index, Tensor) else list(index)


_RULES: dict[Any, Rule] = {
    aten.view.default: _reshaped,
    aten._unsafe_view.default: _reshaped,
    aten.reshape.default: _reshaped,
    aten.unsqueeze.default: _reshaped,
    aten.squeeze.dim: _reshaped,
    aten.squeeze.dims: _reshaped,
    aten.squeeze.default: _reshaped,
    aten.t.default: _transposed,
    aten.transpose.int: _transposed,
    aten.permute.default: _permuted,
    aten._to_copy.default: _cast,
    aten.select.int: _one_selected,
    aten.slice.Tensor: _sliced,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.index_select.default: _index_selected,
    aten.index.Tensor: _indexed,
    aten.index_put.default: _index_put,
    aten.cat.default: _concatenated,
    aten.mm.default: _multiplied,
    aten.addmm.default: _multiplied,
    aten.convolution.default: _convolved,
}

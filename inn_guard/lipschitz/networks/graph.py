"""Conditioner networks as graphs of a few operations, read by torch.fx, and what is computed on such a graph.

One graph serves several readings ("semantics"): boxes of values, Lipschitz constants by norm products, and chains for
the LipSDP recursion. What is not understood raises Unbounded with the reason; nothing is guessed.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from inn_guard.lipschitz.networks.activations import FUNCTIONS, Activation, activation
from inn_guard.numerics.rounding import up

__all__ = ["Interpreter", "LinearRearrangement", "Network", "Unbounded", "readable"]

Value = TypeVar("Value")
CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
IN_PLACE = (operator.iadd, operator.imul, operator.isub, operator.itruediv)
SCALINGS = (operator.mul, operator.imul, torch.mul, operator.truediv, operator.neg, torch.neg)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
PASSING = (nn.Identity, nn.Flatten, *DROPOUTS)


class Unbounded(Exception):
    """Why no bound can be given; its text is the reason that a result shows."""


@dataclass(frozen=True)
class LinearRearrangement:
    """A linear map with nonnegative weights that moves, drops, pads with zeros, repeats or averages entries.

    Attributes:
        move: of a batch (B, *shape).
        norm: its spectral norm, or more.
    """

    move: Callable[[Tensor], Tensor]
    norm: float = 1.0


@runtime_checkable
class Interpreter(Protocol[Value]):
    """What the operations of a network mean for one kind of value. ``place`` names the operation in the graph."""

    def linear(self, x: Value, weight: Tensor, bias: Tensor | None) -> Value:
        """W x + b over the features."""
        ...

    def convolution(self, x: Value, module: nn.Module) -> Value:
        """A convolution with bias."""
        ...

    def activate(self, x: Value, function: Activation, place: str) -> Value:
        """An elementwise function."""
        ...

    def rescale(self, x: Value, scale: Tensor, shift: Tensor) -> Value:
        """scale * x + shift per channel, both of shape (channels,) or one number."""
        ...

    def add(self, x: Value, y: Value) -> Value:
        """x + y."""
        ...

    def concatenate(self, parts: list[Value]) -> Value:
        """Along the channels."""
        ...

    def flatten(self, x: Value) -> Value:
        """Everything but the batch in one dimension."""
        ...

    def rearrange(self, x: Value, move: LinearRearrangement) -> Value:
        """Entries moved, repeated or averaged."""
        ...

    def constant(self, value: Tensor, like: Value) -> Value:
        """A value (*shape) that does not depend on x."""
        ...


@singledispatch
def readable(module: nn.Module) -> nn.Module:
    """The module as torch.fx can read it: itself, unless a class registers another with the same values."""
    return module


class Network:
    """A module read once into a graph.

    Args:
        module: maps (B, n) to (B, m), or (B, C, H, W) to (B, C', H', W').
        context: what the module is given as its second argument, or None.

    Raises:
        Unbounded: if the module cannot be read.
    """

    def __init__(self, module: nn.Module, context: Tensor | None = None) -> None:
        module = readable(module)
        self.module = module
        self.context = context
        try:
            self.graph = _Tracer().trace(
                module, concrete_args={} if context is not None else _absent(module)
            )
        except Exception as error:
            raise Unbounded(
                f"{type(module).__name__} cannot be read as a graph ({type(error).__name__}: {error})"
            ) from error
        self.modules = dict(module.named_modules())

    def read(self, x: Value, semantics: Interpreter[Value]) -> Value:
        """The network's output for an input x, in the given semantics.

        Raises:
            Unbounded: at the first operation that has no meaning there.
        """
        known: dict[fx.Node, Any] = {}
        inputs = iter([_Symbol(x), self._constant_context(x, semantics)])
        for node in self.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(inputs, None)
            elif node.op == "output":
                return _value_of(fx.node.map_arg(node.args[0], known.__getitem__), self.module)
            else:
                known[node] = self._step(node, known, semantics)
        raise Unbounded(f"{type(self.module).__name__} returns nothing")

    def _constant_context(self, x: Value, semantics: Interpreter[Value]) -> _Symbol | None:
        return None if self.context is None else _Symbol(semantics.constant(self.context, x))

    def _step(
        self, node: fx.Node, known: Mapping[fx.Node, Any], semantics: Interpreter[Value]
    ) -> Any:
        args = fx.node.map_arg(node.args, known.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, known.__getitem__)
        target: Any = node.target
        if node.op == "get_attr":
            return operator.attrgetter(target)(self.module)
        self._refuse_aliases(node)
        if node.op == "call_module":
            x = _value_of(args[0], self.module)
            return _Symbol(_module(self.modules[target], x, semantics, node.name))
        if not _symbols(args) + _symbols(tuple(kwargs.values())):
            return (
                target(*args, **kwargs)
                if node.op == "call_function"
                else getattr(args[0], target)(*args[1:], **kwargs)
            )
        function = target if node.op == "call_function" else getattr(_Methods, target, None)
        if function is None:
            raise Unbounded(f"the operation .{target}() is not known")
        return _Symbol(_function(function, args, kwargs, semantics, node.name))

    def _refuse_aliases(self, node: fx.Node) -> None:
        """An operation in place also changes what its argument is used for elsewhere, which no reading follows."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        in_place = (
            getattr(module, "inplace", False)
            or node.kwargs.get("inplace")
            or node.target in IN_PLACE
        )
        source = node.args[0] if in_place else None
        while isinstance(source, fx.Node):
            if len(source.users) > 1:
                raise Unbounded(f"{node.name} changes in place what is used again")
            passes = source.op == "call_module" and isinstance(
                self.modules.get(str(source.target)), PASSING
            )
            source = (
                source.args[0]
                if passes or source.target in (F.dropout, torch.flatten, "flatten")
                else None
            )


class _Symbol:
    """A value that depends on x, as opposed to a constant of the module."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Methods:
    """Tensor methods by the function that does the same."""

    add = staticmethod(torch.add)
    flatten = staticmethod(torch.flatten)
    index_select = staticmethod(torch.index_select)
    neg = staticmethod(torch.neg)
    relu = staticmethod(torch.relu)
    reshape = staticmethod(torch.reshape)
    tanh = staticmethod(torch.tanh)
    sigmoid = staticmethod(torch.sigmoid)


class _Stand(fx.Proxy):
    """A proxy that passes for a tensor, for forward methods whose annotations are checked when they are called."""

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return Tensor


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Stand(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is _Stand else super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = activation.dispatch(type(m)) is not activation.dispatch(object)
        return known or super().is_leaf_module(m, module_qualified_name)


def _absent(module: nn.Module) -> dict[str, Any]:
    """Every argument after the first, as None."""
    names = list(inspect.signature(module.forward).parameters.values())[1:]
    return {p.name: None for p in names if p.kind is p.POSITIONAL_OR_KEYWORD}


def _symbols(args: Any) -> list[_Symbol]:
    if isinstance(args, _Symbol):
        return [args]
    return (
        [symbol for arg in args for symbol in _symbols(arg)]
        if isinstance(args, (tuple, list))
        else []
    )


def _value_of(symbol: Any, module: nn.Module) -> Any:
    if not isinstance(symbol, _Symbol):
        raise Unbounded(
            f"{type(module).__name__} returns or feeds something that is not computed from its input"
        )
    return symbol.value


def _module(module: nn.Module, x: Value, semantics: Interpreter[Value], place: str) -> Value:
    function = activation(module)
    if isinstance(module, nn.Identity) or (
        isinstance(module, DROPOUTS) and (module.p == 0 or not module.training)
    ):
        return x
    if function is not None:
        return semantics.activate(x, function, place)
    if isinstance(module, nn.Linear):
        return semantics.linear(x, module.weight, module.bias)
    if isinstance(module, CONVOLUTIONS):
        return semantics.convolution(x, module)
    if isinstance(module, NORMALISATIONS):
        return _normalise(module, x, semantics)
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
        return semantics.flatten(x)
    move = _moving_module(module)
    if move is not None:
        return semantics.rearrange(x, move)
    training = " in training mode" if module.training else ""
    raise Unbounded(
        f"no bound is known for {type(module).__name__}{training} (its name in the network: {place})"
    )


def _moving_module(module: nn.Module) -> LinearRearrangement | None:
    """Unflatten; averages over windows that do not overlap, of norm 1 / sqrt(window); repetition, of norm sqrt(copies).

    None if the module is none of them.
    """
    if isinstance(module, nn.Unflatten) and module.dim == 1:
        return LinearRearrangement(module)
    if (
        isinstance(module, nn.AvgPool2d)
        and module.stride == module.kernel_size
        and module.padding in (0, (0, 0))
    ):
        size = module.kernel_size
        window = size * size if isinstance(size, int) else math.prod(size)
        plain = not module.ceil_mode and module.divisor_override is None
        return LinearRearrangement(module, up(1 / math.sqrt(window), 2)) if plain else None
    if (
        isinstance(module, nn.Upsample)
        and module.mode == "nearest"
        and isinstance(module.scale_factor, float)
    ):
        factor = module.scale_factor
        return LinearRearrangement(module, factor) if factor == int(factor) else None
    return None


def _moving_function(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LinearRearrangement | None:
    """Padding with zeros behind, a choice of entries without repetition, another shape; None if it is none of them."""
    if function is F.pad and len(args) == 2 and min(args[1]) >= 0:
        with_zeros = kwargs.get("mode", "constant") == "constant" and not kwargs.get("value")
        return LinearRearrangement(lambda x: F.pad(x, args[1])) if with_zeros else None
    if (
        function is torch.index_select
        and len(args) == 3
        and args[1] == 1
        and isinstance(args[2], Tensor)
    ):
        index = args[2].detach().cpu()
        return (
            LinearRearrangement(lambda x: x.index_select(1, index))
            if len(index.unique()) == len(index)
            else None
        )
    if (
        function is torch.reshape
        and all(isinstance(size, int) for size in args[1:])
        and args[1] == -1
    ):
        return LinearRearrangement(lambda x: x.reshape(len(x), *args[2:]))
    return None


def _normalise(module: Any, x: Value, semantics: Interpreter[Value]) -> Value:
    if module.training or module.running_var is None:
        raise Unbounded(
            f"{type(module).__name__} in training mode has no Lipschitz constant; call model.eval()"
        )
    variance, mean = module.running_var.double(), module.running_mean.double()
    weight = torch.ones_like(variance) if module.weight is None else module.weight.double()
    bias = torch.zeros_like(variance) if module.bias is None else module.bias.double()
    scale = weight / (variance + module.eps).sqrt()
    return semantics.rescale(x, scale, bias - mean * scale)


def _function(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    semantics: Interpreter[Value],
    place: str,
) -> Value:
    first = args[0]
    if function in FUNCTIONS:
        plain = len(args) == 1 and set(kwargs) <= {"inplace", "alpha", "negative_slope", "beta"}
        known = activation(_with_options(function, kwargs)) if plain else None
        if known is None:
            raise Unbounded(
                f"{getattr(function, '__name__', function)} is called with options that are not known"
            )
        return semantics.activate(first.value, known, place)
    if function is F.linear and not _symbols(args[1:]):
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return semantics.linear(first.value, args[1], bias)
    if function in (operator.add, operator.iadd, torch.add) and not kwargs:
        return _sum(args, semantics)
    if function in SCALINGS and not kwargs:
        return _multiple(function, args, semantics)
    if function is torch.cat and (args[1:] or (kwargs.get("dim", kwargs.get("axis")),))[0] in (
        1,
        -1,
    ):
        return semantics.concatenate([_value_of(part, nn.Identity()) for part in args[0]])
    if function is torch.flatten and (*args[1:], *kwargs.values()) == (1,):
        return semantics.flatten(first.value)
    move = _moving_function(function, args, kwargs)
    if move is not None:
        return semantics.rearrange(first.value, move)
    if function is F.dropout and not kwargs.get("training", False):
        return first.value
    raise Unbounded(f"the operation {getattr(function, '__name__', function)} is not known")


def _with_options(function: Any, kwargs: Mapping[str, Any]) -> nn.Module:
    options = {key: value for key, value in kwargs.items() if key != "inplace"}
    return type(FUNCTIONS[function])(**options) if options else FUNCTIONS[function]


def _multiple(
    function: Callable[..., Any], args: tuple[Any, ...], semantics: Interpreter[Value]
) -> Value:
    if len(args) == 1:
        return semantics.rescale(args[0].value, -torch.ones(()), torch.zeros(()))
    symbol, factor = args if isinstance(args[0], _Symbol) else args[::-1]
    if not isinstance(factor, (int, float)) or (
        function is operator.truediv and symbol is not args[0]
    ):
        raise Unbounded(
            "a product or quotient of two things that both depend on the input, or of a tensor"
        )
    scale = torch.tensor(float(factor), dtype=torch.float64)
    return semantics.rescale(
        symbol.value, 1 / scale if function is operator.truediv else scale, torch.zeros(())
    )


def _sum(args: tuple[Any, ...], semantics: Interpreter[Value]) -> Value:
    a, b = args
    if isinstance(a, _Symbol) and isinstance(b, _Symbol):
        return semantics.add(a.value, b.value)
    symbol, constant = (a, b) if isinstance(a, _Symbol) else (b, a)
    if isinstance(constant, (int, float)):
        return semantics.rescale(
            symbol.value, torch.ones(()), torch.tensor(float(constant), dtype=torch.float64)
        )
    raise Unbounded("a tensor that is not computed from the input is added to the state")

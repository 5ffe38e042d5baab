"""Conditioner networks as torch.fx graphs of a few operations, evaluated by interpreters.

One graph serves several interpreters (abstract interpretation): boxes of values, Lipschitz
constants by norm products, and chains for the LipSDP recursion. An unknown operation raises
Unbounded with the reason; nothing is guessed.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from inn_guard.core.missing import Missing
from inn_guard.core.readable import RulesByClass, class_of_call, first_reason, is_plain
from inn_guard.execution.deadline import spend
from inn_guard.lipschitz.networks.activations import FUNCTIONS, Activation, activation
from inn_guard.numerics.rounding import UNIT, Upper

__all__ = ["Interpreter", "LinearRearrangement", "Network", "Unbounded", "fx_equivalent"]

NODE = 4e5  #: operations in the time that an interpreter takes for one small node
Value = TypeVar("Value")
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
IN_PLACE = (operator.iadd, operator.imul, operator.isub, operator.itruediv)
SCALINGS = (operator.mul, operator.imul, torch.mul, operator.truediv, operator.neg, torch.neg)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
ADDITIONS = (operator.add, operator.iadd, torch.add)


class Unbounded(Exception):
    """No bound can be given; the text says why, and results show it."""


@dataclass(frozen=True)
class LinearRearrangement:
    """A linear map of nonnegative weights: entries moved, dropped, padded, repeated or averaged.

    Attributes:
        move: the map of a batch (B, *shape).
        norm: an upper bound of its spectral norm.
        repeats: along every axis of an image each entry is repeated so often, on top of that.
    """

    move: Callable[[Tensor], Tensor]
    norm: float = 1.0
    repeats: float = 1.0


@runtime_checkable
class Interpreter(Protocol[Value]):
    """What the operations of a network mean for one kind of value; ``node`` names the operation."""

    def linear(self, x: Value, weight: Tensor, bias: Tensor | None) -> Value:
        """W x + b over the features."""
        ...

    def convolution(self, x: Value, module: nn.Module) -> Value:
        """A convolution with bias."""
        ...

    def activate(self, x: Value, function: Activation, node: str) -> Value:
        """An elementwise function."""
        ...

    def rescale(self, x: Value, scale: Tensor, shift: Tensor) -> Value:
        """scale * x + shift per channel, both of shape (channels,) or one number."""
        ...

    def add(self, x: Value, y: Value) -> Value:
        """x + y."""
        ...

    def concatenate(self, parts: list[Value], *, last: bool = False) -> Value:
        """The parts, concatenated along the channels, or along the last dimension."""
        ...

    def flatten(self, x: Value) -> Value:
        """The same entries in one dimension (apart from the batch)."""
        ...

    def rearrange(self, x: Value, move: LinearRearrangement) -> Value:
        """A linear rearrangement of the entries."""
        ...

    def constant(self, value: Tensor, like: Value) -> Value:
        """A value (*shape) that does not depend on x."""
        ...


@RulesByClass
def fx_equivalent(why: Missing, module: nn.Module) -> nn.Module:
    """A module of the same values that torch.fx can trace; default: the module itself."""
    return module


class Network:
    """A module as a graph, traced once.

    Args:
        module: maps (B, n) to (B, m), or (B, C, H, W) to (B, C', H', W').
        context: the module's second argument, or None.

    Raises:
        Unbounded: if torch.fx cannot trace the module, or if a module in it may compute something
            else than its class says.
    """

    def __init__(self, module: nn.Module, context: Tensor | None = None) -> None:
        # before an equivalent takes its place, which has no hooks
        why = first_reason(module.modules())
        if why is not None:
            raise Unbounded(why.reason)
        module = fx_equivalent(module)
        if _Tracer().is_leaf_module(module, ""):
            # torch.fx looks into the outermost module, whatever it is
            module = nn.Sequential(module)
        self.module = module
        self.context = context
        self._defaults = _defaults(module)
        absent = dict(self._defaults)
        if context is not None and absent:
            del absent[next(iter(absent))]
        try:
            self.graph = _Tracer().trace(module, concrete_args=absent)
        except Exception as error:
            name = type(module).__name__
            raise Unbounded(
                f"torch.fx cannot trace {name} as a graph ({type(error).__name__}: {error})"
            ) from error
        self.modules = dict(module.named_modules())
        self._known: dict[str, Operation] = {}
        self._checked: set[fx.Node] = set()

    def interpret(self, x: Value, interpreter: Interpreter[Value]) -> Value:
        """The network's output for an input x, by an interpreter.

        Raises:
            Unbounded: at the first operation that the interpreter does not know.
        """
        spend(NODE * len(self.graph.nodes))
        known: dict[fx.Node, Any] = {}
        inputs: list[Any] = [Dependent(x), *self._defaults.values()]
        if self.context is not None:
            inputs[1] = Dependent(interpreter.constant(self.context, x))
        arguments = iter(inputs)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(arguments, None)
            elif node.op == "output":
                return _value_of(fx.node.map_arg(node.args[0], known.__getitem__), self.module)
            else:
                known[node] = self._step(node, known, interpreter)
        raise Unbounded(f"{type(self.module).__name__} returns nothing")

    def _step(
        self, node: fx.Node, known: Mapping[fx.Node, Any], interpreter: Interpreter[Value]
    ) -> Any:
        args = fx.node.map_arg(node.args, known.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, known.__getitem__)
        target: Any = node.target
        if node.op == "get_attr":
            return operator.attrgetter(target)(self.module)
        if node not in self._checked:
            self._refuse_aliases(node)
            self._checked.add(node)
        if node.op == "call_module":
            if len(args) != 1 or kwargs:
                raise Unbounded(f"{target} is called with other arguments than one value")
            x = _value_of(args[0], self.module)
            return Dependent(self._operation(target)(x, interpreter, node.name))
        is_function = node.op == "call_function"
        if not _has_dependent(args) and not _has_dependent(tuple(kwargs.values())):
            if is_function:
                return target(*args, **kwargs)
            return getattr(args[0], target)(*args[1:], **kwargs)
        function = target
        if not is_function:
            function = METHODS.get(target)
        if function is None:
            raise Unbounded(f"the operation .{target}() is not known")
        return Dependent(_apply_function(function, args, kwargs, interpreter, node.name))

    def _operation(self, target: str) -> Operation:
        """What a module in the graph does, looked up once."""
        if target not in self._known:
            self._known[target] = _operation_of(self.modules[target])
        return self._known[target]

    def _refuse_aliases(self, node: fx.Node) -> None:
        """Raise if an operation in place changes a value that is used elsewhere, too."""
        if not self._is_in_place(node):
            return
        source = node.args[0]
        while isinstance(source, fx.Node):
            if source.op == "placeholder":
                raise Unbounded(f"{node.name} changes in place the network's own input")
            if len(source.users) > 1:
                raise Unbounded(f"{node.name} changes in place a value that is used again")
            if self._makes_new(source):
                return
            source = source.args[0]

    @property
    def may_return_input(self) -> bool:
        """Whether the output may share memory with the input."""
        source: Any = next(node.args[0] for node in self.graph.nodes if node.op == "output")
        while isinstance(source, fx.Node) and source.op != "placeholder":
            if source.op == "get_attr" or self._makes_new(source):
                return False
            source = source.args[0]
        return True

    def _is_in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module" and getattr(self.modules[str(node.target)], "inplace", False):
            return True
        function: Any = node.target
        if node.op == "call_method":
            function = METHODS.get(function)
        return bool(node.kwargs.get("inplace")) or function in IN_PLACE

    def _makes_new(self, node: fx.Node) -> bool:
        """Whether an operation returns memory of its own, and no view of its argument."""
        if self._is_in_place(node):
            return False
        if node.op == "call_module":
            part = self.modules[str(node.target)]
            if is_plain(part, nn.Linear, *CONVOLUTIONS, *NORMALISATIONS):
                return True
            return activation(part) is not None and not is_plain(part, nn.Identity)
        function: Any = node.target
        if node.op == "call_method":
            function = METHODS.get(function)
        return function in (F.linear, torch.cat, *ADDITIONS, *SCALINGS, *FUNCTIONS)


class Dependent:
    """A value that depends on x, as opposed to a constant of the module."""

    def __init__(self, value: Any) -> None:
        self.value = value


#: tensor methods -> the function that does the same
METHODS: Mapping[Any, Callable[..., Any]] = {
    "add": torch.add,
    "add_": operator.iadd,  # also x += y
    "mul_": operator.imul,  # also x *= y
    "flatten": torch.flatten,
    "index_select": torch.index_select,
    "neg": torch.neg,
    "relu": torch.relu,
    "reshape": torch.reshape,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class TensorProxy(fx.Proxy, Tensor):
    """A proxy that is a tensor, as forward methods may ask: without entries, and never computed.

    A proxy that only pretends to be one, by its ``__class__``, ends the process where a function of
    torch reads its memory, as ``torch.pow(x, 1.7)`` does.
    """

    @staticmethod
    def __new__(cls: type[TensorProxy], node: fx.Node, tracer: fx.Tracer) -> TensorProxy:
        return Tensor._make_subclass(cls, torch.empty(0, device="cpu"))

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(
        cls, orig_method: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(orig_method, "__name__", "") == "__get__":
            # a property, such as x.shape
            (proxy,) = args
            return fx.proxy.Attribute(proxy, orig_method.__self__.__name__)
        return super().__torch_function__(orig_method, types, args, kwargs)


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is TensorProxy:
            return a.node
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = not isinstance(class_of_call(m, activation.classes), Missing)
        return known or super().is_leaf_module(m, module_qualified_name)


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Every argument after the first with its default; the second, a context, is None.

    Raises:
        Unbounded: if the second has another default: libraries pass None for it, or leave it out.
    """
    try:
        signature = inspect.signature(module.forward)
    except ValueError as error:
        raise Unbounded(f"{type(module).__name__} has no Python code ({error})") from error
    parameters = list(signature.parameters.values())[1:]
    defaults: dict[str, Any] = {}
    for k, parameter in enumerate(parameters):
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            continue
        default = parameter.default
        if default is parameter.empty:
            default = None
        if k == 0 and default is not None:
            name = type(module).__name__
            raise Unbounded(f"the argument {parameter.name} of {name} has a default, {default!r}")
        defaults[parameter.name] = default
    return defaults


def _has_dependent(args: Any) -> bool:
    if isinstance(args, (tuple, list)):
        return any(map(_has_dependent, args))
    return isinstance(args, Dependent)


def _value_of(argument: Any, module: nn.Module) -> Any:
    if not isinstance(argument, Dependent):
        name = type(module).__name__
        raise Unbounded(f"{name} returns or uses a tensor that is not computed from its input")
    return argument.value


#: (a value, an interpreter, the name of the node) -> the value after a module
Operation = Callable[[Any, Interpreter[Any], str], Any]


def _operation_of(module: Any) -> Operation:
    """What a module does to a value; one that is not known raises Unbounded when it is applied."""
    drops = module.training and getattr(module, "p", 0) != 0
    if is_plain(module, nn.Identity) or (is_plain(module, *DROPOUTS) and not drops):
        return lambda x, interpreter, node: x
    function = activation(module)
    if function is not None:
        return lambda x, interpreter, node: interpreter.activate(x, function, node)
    if is_plain(module, nn.Linear):
        return lambda x, interpreter, node: interpreter.linear(x, module.weight, module.bias)
    if is_plain(module, *CONVOLUTIONS):
        return lambda x, interpreter, node: interpreter.convolution(x, module)
    if is_plain(module, *NORMALISATIONS):
        return lambda x, interpreter, node: _normalise(module, x, interpreter)
    if is_plain(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
        return lambda x, interpreter, node: interpreter.flatten(x)
    move = _rearranging_module(module)
    if move is not None:
        return lambda x, interpreter, node: interpreter.rearrange(x, move)
    training = ""
    if module.training:
        training = " in training mode"

    def unknown(x: Any, interpreter: Interpreter[Any], node: str) -> Any:
        raise Unbounded(
            f"no bound is known for {module}{training} (its name in the network: {node})"
        )

    return unknown


def _rearranging_module(module: Any) -> LinearRearrangement | None:
    """Unflatten, an average over windows that do not overlap, or a repetition; None for others."""
    if is_plain(module, nn.Unflatten) and module.dim == 1:
        return LinearRearrangement(module)
    if is_plain(module, nn.AvgPool2d) and _averages_disjoint_windows(module):
        size = module.kernel_size
        if isinstance(size, int):
            size = (size, size)
        norm = Upper(1.0) / math.sqrt(math.prod(size))
        return LinearRearrangement(module, norm * (1 + 4 * UNIT))
    if is_plain(module, nn.Upsample) and module.mode == "nearest":
        factor = module.scale_factor
        if isinstance(factor, float) and factor == int(factor):
            return LinearRearrangement(module, repeats=factor)
    return None


def _averages_disjoint_windows(module: nn.AvgPool2d) -> bool:
    return (
        module.stride == module.kernel_size
        and module.padding in (0, (0, 0))
        and not module.ceil_mode
        and module.divisor_override is None
    )


def _rearranging_function(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LinearRearrangement | None:
    """Padding with zeros, a choice of entries, or another shape; None for others."""
    if function is F.pad and len(args) == 2 and min(args[1]) >= 0:
        if kwargs.get("mode", "constant") != "constant" or kwargs.get("value"):
            return None
        return LinearRearrangement(lambda x: F.pad(x, args[1]))
    if function is torch.index_select and len(args) == 3 and args[1] == 1:
        if not isinstance(args[2], Tensor):
            return None
        index = args[2].detach().cpu()
        if len(index.unique()) != len(index):
            return None
        return LinearRearrangement(lambda x: x.index_select(1, index))
    if function is torch.reshape and args[1] == -1:
        if not all(isinstance(size, int) for size in args[1:]):
            return None
        return LinearRearrangement(lambda x: x.reshape(len(x), *args[2:]))
    return None


def _normalise(module: Any, x: Value, interpreter: Interpreter[Value]) -> Value:
    if module.training or module.running_var is None:
        name = type(module).__name__
        raise Unbounded(f"{name} in training mode has no Lipschitz constant; call model.eval()")
    variance, mean = module.running_var.double(), module.running_mean.double()
    scale = 1 / (variance + module.eps).sqrt()
    if module.weight is not None:
        scale = scale * module.weight.double()
    shift = -mean * scale
    if module.bias is not None:
        shift = shift + module.bias.double()
    return interpreter.rescale(x, scale, shift)


def _apply_function(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    interpreter: Interpreter[Value],
    node: str,
) -> Value:
    first = args[0]
    if function in FUNCTIONS:
        return interpreter.activate(first.value, _activation_of(function, args, kwargs), node)
    if function is F.linear and not _has_dependent(args[1:]):
        bias = kwargs.get("bias")
        if len(args) > 2:
            bias = args[2]
        return interpreter.linear(first.value, args[1], bias)
    if function in ADDITIONS and len(args) == 2 and not kwargs:
        return _sum(args, interpreter)
    if function in SCALINGS and not kwargs:
        return _multiple(function, args, interpreter)
    if function is torch.cat:
        return _concatenated(args, kwargs, interpreter)
    if function is torch.flatten and (*args[1:], *kwargs.values()) == (1,):
        return interpreter.flatten(first.value)
    move = _rearranging_function(function, args, kwargs)
    if move is not None:
        return interpreter.rearrange(first.value, move)
    if function is F.dropout and not _drops(*args[1:], **kwargs):
        return first.value
    raise Unbounded(f"the operation {_name_of(function)} is not known")


def _drops(p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:  # noqa: FBT001, FBT002 - the arguments of F.dropout
    return training and p > 0


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", str(function))


def _activation_of(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Activation:
    options = {key: value for key, value in kwargs.items() if key != "inplace"}
    known = None
    if len(args) == 1 and set(options) <= {"alpha", "negative_slope", "beta"}:
        module = FUNCTIONS[function]
        if options:
            module = type(module)(**options)
        known = activation(module)
    if known is None:
        raise Unbounded(f"{_name_of(function)} is called with options that are not known")
    return known


def _concatenated(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], interpreter: Interpreter[Value]
) -> Value:
    dim = kwargs.get("dim", kwargs.get("axis"))
    if len(args) > 1:
        dim = args[1]
    if dim not in (1, -1):
        raise Unbounded(f"values are concatenated along dimension {dim}")
    parts = [_value_of(part, nn.Identity()) for part in args[0]]
    return interpreter.concatenate(parts, last=dim == -1)


def _multiple(
    function: Callable[..., Any], args: tuple[Any, ...], interpreter: Interpreter[Value]
) -> Value:
    none = torch.zeros(())
    if len(args) == 1:
        return interpreter.rescale(args[0].value, -torch.ones(()), none)
    x, factor = args
    divides = function is operator.truediv
    if not isinstance(x, Dependent) and not divides:
        x, factor = factor, x
    if not isinstance(x, Dependent) or not isinstance(factor, (int, float)):
        raise Unbounded(
            "a product or quotient of two values that depend on the input, or of a tensor"
        )
    scale = torch.tensor(float(factor), dtype=torch.float64)
    if divides:
        scale = 1 / scale
    return interpreter.rescale(x.value, scale, none)


def _sum(args: tuple[Any, ...], interpreter: Interpreter[Value]) -> Value:
    a, b = args
    if isinstance(a, Dependent) and isinstance(b, Dependent):
        return interpreter.add(a.value, b.value)
    if not isinstance(a, Dependent):
        a, b = b, a
    if not isinstance(b, (int, float)):
        raise Unbounded("a tensor that is not computed from the input is added to the state")
    shift = torch.tensor(float(b), dtype=torch.float64)
    return interpreter.rescale(a.value, torch.ones(()), shift)

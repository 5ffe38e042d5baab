"""How the two directions of a map can be called: pairs of methods, or one method and a flag."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from inn_guard.adapters.captured_modules import Closure
from inn_guard.core.invertible import Context
from inn_guard.core.tensors import split_flat

__all__ = [
    "Call",
    "Pair",
    "Shapes",
    "Zeros",
    "pairs",
    "takes_several",
    "with_log_det_argument",
    "with_switches",
]

Shapes = tuple[tuple[int, ...], ...]  #: of one sample of each of several tensors

#: methods that map data to latents, the likeliest first; and methods that map back
ENCODERS = ("forward", "encode", "transform", "flow", "to_latent", "forward_transform", "forward_")
DECODERS = (
    *("inverse", "decode", "reverse", "backward", "invert", "inv", "generate", "from_latent"),
    *("inverse_transform", "inverse_flow", "reverse_flow", "inverse_", "reverse_", "sample"),
)
#: arguments that exchange the directions of one method
FLAGS = (
    *("reverse", "rev", "inverse", "inv", "invert", "inverted", "reversed", "is_reverse"),
    *("backward", "decode", "generate", "sampling", "sample", "direction", "mode", "forward"),
)
#: what an argument that takes a word is set to for the way back
WORDS = ("inverse", "reverse", "backward", "decode", "sample", "inv", "rev")
CONTEXTS = ("context", "cond", "condition", "conditions", "conditioning", "cond_inputs", "c", "y")
#: first arguments that say what a method maps
LATENT_NAMES = ("z", "latent", "latents", "noise", "u", "eps")
DATA_NAMES = ("x", "data", "image", "images", "theta")


@dataclass(frozen=True)
class Zeros:
    """An argument to which the method adds its log-determinant: zeros, one number per sample.

    Attributes:
        shape: of one sample, () or (1,).
    """

    shape: tuple[int, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """Zeros, (B, *shape), like x."""
        return x.new_zeros(len(x), *self.shape)

    def __repr__(self) -> str:
        shape = ", ".join(["len(x)", *map(str, self.shape)])
        return f"x.new_zeros({shape})"


@dataclass(frozen=True)
class Call:
    """One direction: a callable and what is passed to it beside the tensor.

    Attributes:
        target: a module, a bound method or a function, as a Closure.
        text: how the target is written.
        keywords: further arguments; a `Zeros` is made anew for every batch.
        context_name: the keyword of the context. "": it is the second argument.
        spread: whether a list of tensors is passed as that many arguments.
        shapes: of the tensors that are joined in the one that is given; None: it is passed whole.
    """

    target: Closure
    text: str
    keywords: Mapping[str, Any] = field(default_factory=dict)
    context_name: str = ""
    spread: bool = False
    shapes: Shapes | None = None

    def __call__(self, t: Any, *context: Context) -> Any:
        """What the target returns for t, a tensor or a list of tensors."""
        if self.shapes is not None:
            t = tuple(split_flat(t, self.shapes))
        rows = t[0] if isinstance(t, (list, tuple)) else t
        keywords = {}
        for name, value in self.keywords.items():
            keywords[name] = value(rows) if isinstance(value, Zeros) else value
        if self.context_name and context:
            keywords[self.context_name] = context[0]
            context = ()
        given = t if self.spread else (t,)
        return self.target(*given, *context, **keywords)

    def written(self, argument: str) -> str:
        """The call as code."""
        keywords = [f"{name}={value!r}" for name, value in self.keywords.items()]
        first = f"*{argument}" if self.spread else argument
        return f"{self.text}({', '.join([first, *keywords])})"


@dataclass(frozen=True)
class Pair:
    """Two directions that may be inverse to each other."""

    encode: Call
    decode: Call

    def swapped(self) -> Pair:
        """The same with the directions exchanged; what x consists of stays."""
        shapes = self.encode.shapes
        encode = replace(self.decode, shapes=shapes, spread=shapes is not None)
        return Pair(encode, replace(self.encode, shapes=None, spread=False))

    def of_several(self, shapes: Shapes) -> tuple[Pair, Pair]:
        """The same for an x of several tensors, passed as that many arguments or as one tuple."""
        spread = replace(self.encode, shapes=shapes, spread=True)
        return Pair(spread, self.decode), Pair(replace(spread, spread=False), self.decode)


def pairs(model: Any, context: Context = None, text: str = "model") -> list[Pair]:
    """The pairs of directions that the names of methods and arguments suggest, likeliest first.

    Of a model that has none, but a density, those of its parts.

    Args:
        model: any object.
        context: what it is conditioned on.
        text: how the model is written in code.
    """
    if isinstance(model, (type, Tensor)) or isinstance(getattr(model, "module", None), nn.Module):
        return []  # no model, or one inside of DataParallel
    found = list(_pairs_of_methods(model, context, text))
    for name in _methods(model, ENCODERS):
        method, code = _method(model, name), _written(model, name, text)
        found += _pairs_by_flag(method, code, context)
    if not found and callable(model) and not isinstance(model, nn.Module):
        found += _pairs_by_flag(model, text, context)
    if not found and callable(getattr(model, "log_prob", None)):
        for name, part in _children(model).items():
            found += pairs(part, context, f"{text}.{name}")
    return _in_order_of_names(found)


def _children(model: Any) -> dict[str, Any]:
    """The parts of a model that may be its map, by the names of its attributes."""
    if isinstance(model, nn.Module):
        return dict(model.named_children())
    parts = vars(model) if hasattr(model, "__dict__") else {}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def with_switches(pair: Pair) -> Iterator[Pair]:
    """The same pair with one further switch of the way back turned, for each that it has."""
    decode = pair.decode
    for name, parameter in _parameters(decode.target.function).items():
        if isinstance(parameter.default, bool) and name not in (*decode.keywords, *FLAGS):
            keywords = {**decode.keywords, name: not parameter.default}
            yield Pair(pair.encode, replace(decode, keywords=keywords))


def with_log_det_argument(call: Call) -> Iterator[Call]:
    """The same call with an argument that asks for a log-determinant, for each that it takes."""
    for name, parameter in _parameters(call.target.function).items():
        lowered = name.lower()
        asks = any(part in lowered for part in ("log", "ldj", "jac", "objective"))
        if not asks or name in call.keywords:
            continue
        values: tuple[Any, ...] = (Zeros(), Zeros((1,)))
        if isinstance(parameter.default, bool):
            values = (not parameter.default,)
        for value in values:
            yield replace(call, keywords={**call.keywords, name: value})


def takes_several(call: Call) -> bool:
    """Whether a call shows that it takes more than one tensor."""
    parameters = list(_parameters(call.target.function).values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    needed = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    return len(needed) > 1


def _pairs_of_methods(model: Any, context: Context, text: str) -> Iterator[Pair]:
    encoders, decoders = _methods(model, ENCODERS), _methods(model, DECODERS)
    for first, second in itertools.product(encoders, decoders):
        if second == "sample" or (first, second) == ("encode", "inverse"):
            continue
        yield Pair(_call(model, first, context, text), _call(model, second, context, text))


def _pairs_by_flag(method: Callable[..., Any], text: str, context: Context) -> Iterator[Pair]:
    """One method called with the two values of a flag."""
    parameters = _parameters(method)
    target, by_name = Closure(method), _context_name(method, context)
    for name in FLAGS:
        parameter = parameters.get(name)
        if parameter is None or parameter.kind is parameter.POSITIONAL_ONLY:
            continue
        there: dict[str, Any] = {}
        default = parameter.default
        if default is parameter.empty:
            there, default = {name: name == "forward"}, name == "forward"
        for back in _opposites(default):
            yield Pair(
                Call(target, text, there, by_name),
                Call(target, text, {name: back}, by_name),
            )
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in ("reverse", "rev", "inverse") if takes_any else ():
        yield Pair(Call(target, text, {}, by_name), Call(target, text, {name: True}, by_name))


def _opposites(default: Any) -> tuple[Any, ...]:
    """What a flag is set to for the way back."""
    if isinstance(default, bool) or default is None:
        return (not default,)
    if isinstance(default, str):
        return tuple(word for word in WORDS if word != default)
    if isinstance(default, (int, float)):
        return (-default,) if default else (1,)
    return ()


def _in_order_of_names(found: list[Pair]) -> list[Pair]:
    """Pairs whose arguments say that they map latents to data, with the directions exchanged."""
    ordered = []
    for pair in found:
        there, back = _first_argument(pair.encode), _first_argument(pair.decode)
        exchanged = there in LATENT_NAMES and back in DATA_NAMES
        ordered.append(pair.swapped() if exchanged else pair)
    return ordered


def _first_argument(call: Call) -> str:
    function = call.target.function
    if isinstance(function, nn.Module):
        function = function.forward
    return next(iter(_parameters(function)), "").lower()


def _methods(model: Any, names: tuple[str, ...]) -> list[str]:
    """Those names that are methods of the model, with one argument at least."""
    found = []
    for name in names:
        method = getattr(model, name, None)
        if not callable(method) or isinstance(method, (nn.Module, type)):
            continue
        if name == "forward" and getattr(method, "__name__", "") == "_forward_unimplemented":
            continue
        if _parameters(method):
            found.append(name)
    return found


def _method(model: Any, name: str) -> Callable[..., Any]:
    """The method; of a module's forward the module itself, whose hooks belong to the call."""
    if name == "forward" and isinstance(model, nn.Module):
        return model
    return getattr(model, name)


def _written(model: Any, name: str, text: str) -> str:
    if name == "forward" and isinstance(model, nn.Module):
        return text
    return f"{text}.{name}"


def _call(model: Any, name: str, context: Context, text: str) -> Call:
    method = _method(model, name)
    by_name = _context_name(method, context)
    return Call(Closure(method), _written(model, name, text), {}, by_name)


def _context_name(method: Any, context: Context) -> str:
    """The keyword that takes the context, if it is not the second argument; else ""."""
    if context is None:
        return ""
    names = list(_parameters(method))
    if len(names) > 1 and names[1] in CONTEXTS:
        return ""
    return next((name for name in names if name in CONTEXTS), "")


def _parameters(method: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of a callable; none if they cannot be told."""
    if isinstance(method, nn.Module):
        method = method.forward
    try:
        return inspect.signature(method).parameters
    except (TypeError, ValueError):
        return {}

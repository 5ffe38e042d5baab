"""wrap(): any invertible model as an Invertible, without copying or changing it.

Each library has a folder: ``adapter`` makes Invertibles of its models, ``jacobians`` registers the
Jacobians of its layers whose structure is known. ``base`` and ``structured_jacobians`` are what the
folders share. ``callables`` and ``captured_modules`` serve models that are given as functions.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from inn_guard.adapters.callables import (
    ForwardAndInverse,
    Functions,
    is_called_like_a_velocity,
    velocity_within,
)
from inn_guard.adapters.captured_modules import Closure
from inn_guard.adapters.conventions.calls import Call, Pair, pairs, takes_several
from inn_guard.adapters.conventions.recognise import Unrecognised, recognise
from inn_guard.core.invertible import Context, Invertible
from inn_guard.core.mismatch import check_is_context
from inn_guard.layers.chain import Chain

__all__ = ["ADAPTERS", "is_known", "wrap"]

#: module that defines the model's class, or one of its bases -> adapter with adapt(model, context)
ADAPTERS: dict[str, str] = {
    "nflows": "inn_guard.adapters.nflows.adapter",
    "FrEIA": "inn_guard.adapters.freia.adapter",
    "normflows": "inn_guard.adapters.normflows.adapter",
    "zuko": "inn_guard.adapters.zuko.adapter",
    "memcnn": "inn_guard.adapters.memcnn.adapter",
    "sbi": "inn_guard.adapters.sbi",
    "bgflow": "inn_guard.adapters.bgflow",
    "torch.distributions.transforms": "inn_guard.adapters.torch_transforms",
    "torch.distributions.transformed_distribution": "inn_guard.adapters.torch_transforms",
}

_BY_METHODS = "inn_guard.adapters.callables"  #: of modules with forward and inverse


def wrap(  # noqa: PLR0913
    model: Any = None,
    *,
    encode: Callable[..., Any] | None = None,
    decode: Callable[..., Any] | None = None,
    layers: Iterable[Any] | None = None,
    log_det: Callable[..., Any] | None = None,
    context: Context = None,
    x: Any = None,
    velocity: Any = None,
    solver: Any = None,
    times: Any = (1.0, 0.0),
    trace: Any = None,
) -> Invertible:
    """The model as an Invertible: forward is data x -> latent z, inverse is z -> x.

    Log-determinants are (B,) in nats. Nothing is copied and nothing in the model is changed: the
    result shares its parameters and its modes.

    ``model`` may be an Invertible (returned as it is, with ``context`` if one is given), a model of
    a library in ADAPTERS, or a module whose ``forward`` and ``inverse`` return a tensor or (tensor,
    log_det). Of a model from ``torch.compile`` the module inside is taken.

    A model that obeys another convention is recognised by trying it on a batch x, as ``audit`` and
    ``AuditHook`` do by themselves: ``encode`` and ``decode``, ``forward(x, reverse=True)`` and the
    like, results with further entries, several latents, log-determinants for the whole batch. What
    comes back to x is taken, and what is log|det| by autograd. The attribute ``convention`` says
    what was recognised. Where nothing fits, or two things do, the error says what to pass.

    Anything is accepted as two callables::

        model = wrap(encode=net, decode=functools.partial(net, reverse=True))
        model = wrap(encode=net, decode=net.inverse, log_det=lambda x: -net(x, logp=0)[1])

    A continuous flow (flow matching, FFJORD) is given by its velocity and a solver, and needs
    torchdiffeq::

        solver = inn_guard.layers.ode.FixedStep(100, inn_guard.layers.ode.RungeKutta.EULER)
        model = wrap(velocity=net, solver=solver)

    Modules that the callables use are found and registered, also in closures (see
    ``captured_modules.Closure``).

    >>> import torch
    >>> model = wrap(encode=lambda x: 2 * x, decode=lambda z: z / 2)
    >>> x = torch.tensor([[1.0, 3.0]])
    >>> model(x).tolist(), model.inverse(x).tolist()
    ([[2.0, 6.0]], [[0.5, 1.5]])

    Args:
        model: the model. Default: given by the callables or layers.
        encode: x -> z or x -> (z, log_det); with a context it is called as encode(x, context).
        decode: z -> x or z -> (x, log_det of the inverse); with a context, decode(z, context).
        layers: the chain whose composition is ``encode``: Invertibles, (encode, decode) pairs or
            anything that ``wrap`` accepts. Without ``encode`` and ``decode`` they are the model.
        log_det: x -> log|det d encode(x)/dx|, if ``encode`` does not return it.
        context: a tensor (B, ...) or a nested tuple, list or dict of tensors, one row per sample.
        x: data, (B, *data), on which the convention of an unknown model is tried; a tuple of
            tensors for a model that maps several.
        velocity: dx/dt of a continuous flow, called as its arguments are named: (t, x), (x, t), or
            (x with t as a last feature), or (x) if it does not depend on t; with a context as a
            further argument.
        solver: of the velocity: ``Adaptive`` or ``FixedStep`` of ``inn_guard.layers.ode``, or the
            name of an adaptive method. Default: dopri5 with tolerances of 1e-5.
        times: of the data and of the latents. Default: (1, 0), as in flow matching; FFJORD: (0, 1).
        trace: how the divergence is computed: ``ExactTrace`` or ``HutchinsonTrace`` of
            ``inn_guard.layers.ode``. Default: exact up to 64 dimensions, above that an estimate by
            one random vector.

    Raises:
        TypeError: if the model is of an unknown kind, or the arguments do not describe one.
        ImportError: if a velocity is given and torchdiffeq is not installed.
    """
    check_is_context(context)
    others = {"model": model, "encode": encode, "decode": decode, "layers": layers}
    others["log_det"] = log_det
    if velocity is not None or solver is not None or trace is not None:
        return _from_velocity(velocity, solver, times, trace, context, others)
    if model is None:
        if layers is log_det is None and callable(encode) and callable(decode) and _can_be_tried(x):
            given = Pair(Call(Closure(encode), "encode"), Call(Closure(decode), "decode"))
            return recognise(encode, x, context, given=given)
        return _from_callables(encode, decode, layers, log_det, context)
    if any(given is not None for given in (encode, decode, layers, log_det)):
        raise TypeError(
            "expected either a model or callables, got both; "
            "call wrap(model) or wrap(encode=..., decode=...)"
        )
    return _from_model(_uncompiled(model), x, context)


def _from_model(model: Any, x: Any, context: Context) -> Invertible:
    if isinstance(model, Invertible):
        return model if context is None else model.with_context(context)
    adapter = _adapter_of(model)
    if adapter in (ADAPTERS["sbi"], ADAPTERS["bgflow"]):
        return importlib.import_module(adapter).adapt(model, context, x)
    if adapter is not None and adapter != _BY_METHODS:
        return importlib.import_module(adapter).adapt(model, context)
    if _can_be_tried(x):
        return _by_convention(model, x, context)
    if adapter is not None:
        return ForwardAndInverse(model, context)
    if pairs(model, context):
        raise TypeError(_needs_a_batch(model))
    raise TypeError(_refusal(model))


def _from_velocity(
    velocity: Any,
    solver: Any,
    times: Any,
    trace: Any,
    context: Context,
    others: Mapping[str, Any],
) -> Invertible:
    named = [name for name, value in others.items() if value is not None]
    if velocity is None or named:
        raise TypeError(
            f"expected a velocity and its solver alone, got {' and '.join(named) or 'no velocity'}"
            "; call wrap(velocity=v, solver=solver)"
        )
    if importlib.util.find_spec("torchdiffeq") is None:
        raise ImportError("wrap(velocity=...) needs torchdiffeq; call pip install torchdiffeq")
    flows = importlib.import_module("inn_guard.adapters.velocity")
    return flows.adapt(velocity, solver=solver, times=times, trace=trace, context=context)


def _can_be_tried(x: Any) -> TypeGuard[Tensor | tuple[Tensor, ...]]:
    """Whether x is a batch; anything else is refused with advice by who checks batches."""
    if isinstance(x, (tuple, list)):
        tensors = [part for part in x if isinstance(part, Tensor) and _can_be_tried(part)]
        return 1 < len(x) == len(tensors) and len({len(part) for part in tensors}) == 1
    if not isinstance(x, Tensor) or x.is_meta or x.layout is not torch.strided:
        return False
    return x.is_floating_point() and x.dim() > 1 and x.numel() > 0


def _by_convention(model: Any, x: Tensor | tuple[Tensor, ...], context: Context) -> Invertible:
    """The model by what a batch shows; forward and inverse as documented where nothing is shown."""
    if not pairs(model, context):
        raise TypeError(_refusal(model))
    if isinstance(model, nn.Module) and any(tensor.is_meta for tensor in model.parameters()):
        return ForwardAndInverse(model, context)  # is refused by who checks batches
    try:
        return recognise(model, x, context)
    except Unrecognised as error:
        inside = velocity_within(model)
        if inside is not None:
            raise Unrecognised(f"{error}, or wrap(velocity=model.{inside}, solver=...)") from error
        if _adapter_of(model) is None or not isinstance(x, Tensor) or _needs_more(model, context):
            raise
    # a broken model, about which an audit has more to say
    return ForwardAndInverse(model, context)


def _needs_more(model: Any, context: Context) -> bool:
    """Whether a module is called with more than one tensor."""
    return context is None and any(takes_several(pair.encode) for pair in pairs(model))


def _uncompiled(model: Any) -> Any:
    """The module inside of ``torch.compile(model)``, whose map is the same.

    Compiled code keeps no graph for a second backward pass, so that it has no spectrum.
    """
    if type(model).__module__ == "torch._dynamo.eval_frame" and isinstance(model, nn.Module):
        return model._orig_mod
    return model


def is_known(model: Any) -> bool:
    """Whether `wrap` takes the model as it is; nothing is imported to find out."""
    model = _uncompiled(model)
    return isinstance(model, Invertible) or _adapter_of(model) is not None


def _from_callables(
    encode: Any, decode: Any, layers: Any, log_det: Any, context: Context
) -> Invertible:
    """What the arguments of `wrap` other than a model describe."""
    chain: list[Invertible] = []
    if layers is not None and (not isinstance(layers, Iterable) or isinstance(layers, Tensor)):
        raise TypeError(
            f"expected layers as a list, got one {type(layers).__name__}: call wrap(model) for a "
            "whole model, or wrap(layers=[first, second])"
        )
    if layers is not None:
        chain = [_layer(layer) for layer in layers]
        if not chain:
            raise TypeError("expected at least one layer, got none: call wrap(layers=[first])")
    if encode is not None and decode is not None:
        return Functions(encode, decode, layers=chain, log_det=log_det, context=context)
    if chain and encode is None and decode is None and log_det is None:
        return Chain(*chain).with_context(context)
    arguments = {"encode": encode, "decode": decode, "layers": layers}
    given = [name for name, value in arguments.items() if value is not None]
    raise TypeError(
        f"expected both directions of a map, got {' and '.join(given) or 'nothing'}; "
        "call wrap(model), wrap(encode=f, decode=g) or wrap(layers=[...])"
    )


def _layer(layer: Any) -> Invertible:
    if isinstance(layer, tuple) and len(layer) == 2 and all(callable(part) for part in layer):
        return Functions(*layer)
    return wrap(layer)


def _adapter_of(model: Any) -> str | None:
    """The adapter's module, by the modules that define the model's class and its bases."""
    for base in type(model).__mro__:
        for package, adapter in ADAPTERS.items():
            if base.__module__ == package or base.__module__.startswith(f"{package}."):
                return adapter
    if isinstance(model, nn.Module) and callable(getattr(model, "inverse", None)):
        for part in model.modules():
            if type(part).__module__.startswith("memcnn."):
                return ADAPTERS["memcnn"]
        return _BY_METHODS
    return None


def _refusal(model: Any) -> str:
    """Why a model is not accepted, and what to pass instead."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, (list, tuple, nn.Sequential, nn.ModuleList)):
        return _refusal_of_a_list(model, name)
    if isinstance(model, nn.Module):
        return _refusal_of_a_module(model, name)
    if isinstance(model, type):
        return f"expected a model, got the class {model.__name__}; pass an instance of it"
    if isinstance(model, (str, os.PathLike)):
        return (
            f"expected a model, got the path {os.fspath(model)!r}; build the model, load its "
            "weights with model.load_state_dict(torch.load(path)), and pass the model"
        )
    if isinstance(model, Mapping) and any(isinstance(part, Tensor) for part in model.values()):
        return (
            "expected a model, got a state_dict (names and tensors); build the model, call "
            "model.load_state_dict(state_dict), and pass the model"
        )
    if isinstance(model, Tensor):
        return (
            f"expected a model, got a tensor of shape {tuple(model.shape)} ({name}); "
            "pass the model first and the data second: audit(model, x)"
        )
    return _unknown(model, name)


def _needs_a_batch(model: Any) -> str:
    """Why a model with two directions is not accepted without a batch on which to try them."""
    ways = [f"{pair.encode.written('x')} with {pair.decode.written('z')}" for pair in pairs(model)]
    shown = ", ".join(list(dict.fromkeys(ways))[:2])
    return (
        f"expected data to see how {type(model).__name__} is to be called (perhaps {shown}); call "
        "wrap(model, x=batch), or wrap(encode=f, decode=g) with its two directions"
    )


def _unknown(model: Any, name: str) -> str:
    if callable(getattr(model, "log_prob", None)):
        return (
            f"expected a map with two directions, got {name}, which shows its density and no map "
            "x -> z; call wrap(encode=f, decode=g) with its two directions, or pass the attribute "
            "that holds its transform"
        )
    inside = velocity_within(model)
    if inside is not None or is_called_like_a_velocity(model):
        velocity = "model" if inside is None else f"model.{inside}"
        return (
            f"expected a map with two directions, got {name}, which looks like a velocity; call "
            f"wrap(velocity={velocity}, solver=...), or wrap(encode=f, decode=g) with two functions"
        )
    return (
        f"expected an Invertible, a model of {', '.join(ADAPTERS)}, or a module with forward and "
        f"inverse; got {name}; call wrap(encode=f, decode=g) with its two directions"
    )


def _refusal_of_a_module(model: nn.Module, name: str) -> str:
    """The same for a module, which may hold the model that was meant."""
    if isinstance(getattr(model, "module", None), nn.Module):  # of DataParallel
        return (
            f"expected the model inside {type(model).__name__}; pass its attribute: "
            "wrap(model.module)"
        )
    for part, child in model.named_children():
        if isinstance(child, Invertible) or _adapter_of(child) is not None:
            return f"{_unknown(model, name)}, or pass its invertible part: wrap(model.{part})"
    return _unknown(model, name)


def _refusal_of_a_list(model: Iterable[Any], name: str) -> str:
    """The same for a list. wrap(layers=...) accepts it if each part has both directions."""
    for k, part in enumerate(model):
        known = isinstance(part, (Invertible, tuple)) or _adapter_of(part) is not None
        if not known:
            return (
                f"expected an Invertible or a model, got {name}, whose part {k} is a "
                f"{type(part).__name__} without an inverse; call wrap(encode=f, decode=g) with "
                "the two directions of the whole"
            )
    return f"expected one model, got {name} of layers; call wrap(layers=model)"

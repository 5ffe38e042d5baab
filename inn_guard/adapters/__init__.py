"""wrap(): any invertible model as an Invertible, without copying or changing it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from inn_guard.adapters.callables import Functions
from inn_guard.core.invertible import Context, Invertible
from inn_guard.layers.chain import Chain

__all__ = ["ADAPTERS", "wrap"]

#: Module name in which a model's class (or one of its bases) is defined -> adapter; each has adapt(model, context).
ADAPTERS: dict[str, str] = {
    "nflows": "inn_guard.adapters.nflows.adapter",
    "FrEIA": "inn_guard.adapters.freia.adapter",
    "normflows": "inn_guard.adapters.normflows.adapter",
    "zuko": "inn_guard.adapters.zuko.adapter",
    "memcnn": "inn_guard.adapters.memcnn.adapter",
    "sbi": "inn_guard.adapters.sbi",
    "torch.distributions.transforms": "inn_guard.adapters.torch_transforms",
}


def wrap(
    model: Any = None,
    *,
    encode: Callable[..., Any] | None = None,
    decode: Callable[..., Any] | None = None,
    layers: Iterable[Any] | None = None,
    log_det: Callable[..., Any] | None = None,
    context: Context = None,
) -> Invertible:
    """The model as an Invertible: forward is data x -> latent z, inverse is z -> x, log-determinants are (B,) in nats.

    Nothing is copied and nothing is changed in the model: the result shares its parameters and its modes.

    Taken are an Invertible (returned as it is, with ``context`` if one is given), a model of a library in ADAPTERS,
    a module whose ``forward`` and ``inverse`` return a tensor or (tensor, log_det), and any pair of callables.
    Conventions met in the wild::

        # forward(x, reverse=False): one method and a flag
        model = wrap(encode=net, decode=functools.partial(net, reverse=True))
        audit(model, x)

        # forward(x) -> (z, log_det) and decode(z): methods by other names
        model = wrap(encode=net, decode=net.decode)
        audit(model, x)

        # forward(x, logp) -> (z, logp - log_det): a running sum with a minus sign
        zero = torch.zeros(1)
        model = wrap(encode=net, decode=net.inverse, log_det=lambda x: -net(x, zero)[1])
        audit(model, x)

    Modules that the callables use are found and registered, also in closures (see ``closures.Closure``).

    >>> import torch
    >>> model = wrap(encode=lambda x: 2 * x, decode=lambda z: z / 2)
    >>> model(torch.tensor([[1.0, 3.0]])).tolist(), model.inverse(torch.tensor([[1.0, 3.0]])).tolist()
    ([[2.0, 6.0]], [[0.5, 1.5]])

    Args:
        model: the model; leave it out when giving callables.
        encode: x -> z or x -> (z, log_det); with a context it is called as encode(x, context).
        decode: z -> x or z -> (x, log_det of the inverse); with a context, decode(z, context).
        layers: the chain whose composition is ``encode``: Invertibles, (encode, decode) pairs or anything that
            ``wrap`` accepts. Alone, they are the model.
        log_det: x -> log|det d encode(x)/dx|, where ``encode`` does not return it.
        context: a tensor (B, ...) or a nested tuple, list or dict of tensors, row-aligned with x.

    Raises:
        TypeError: if the model is of an unknown kind, or the arguments do not describe one.
    """
    callables = (encode, decode, layers, log_det)
    if model is None:
        return _of_callables(encode, decode, layers, log_det, context)
    if any(given is not None for given in callables):
        raise TypeError(
            "expected either a model or callables, got both; type wrap(model) or wrap(encode=..., decode=...) instead"
        )
    if isinstance(model, Invertible):
        return model if context is None else model.with_context(context)
    return importlib.import_module(_adapter_of(model)).adapt(model, context)


def _of_callables(
    encode: Any, decode: Any, layers: Any, log_det: Any, context: Context
) -> Invertible:
    chain = None if layers is None else [_layer(layer) for layer in layers]
    if encode is not None and decode is not None:
        return Functions(encode, decode, layers=chain or (), log_det=log_det, context=context)
    if chain and encode is None and decode is None and log_det is None:
        return Chain(*chain).with_context(context)
    given = [
        name
        for name, value in (("encode", encode), ("decode", decode), ("layers", layers))
        if value is not None
    ]
    raise TypeError(
        f"expected both directions of a map, got {' and '.join(given) or 'nothing'}; "
        "type wrap(model), wrap(encode=f, decode=g) or wrap(layers=[...]) instead"
    )


def _layer(layer: Any) -> Invertible:
    if (
        isinstance(layer, tuple)
        and len(layer) == 2
        and all(callable(function) for function in layer)
    ):
        return Functions(*layer)
    return wrap(layer)


def _adapter_of(model: Any) -> str:
    """The adapter's module path, by the names of the modules that define the model's class and its bases."""
    for base in type(model).__mro__:
        for package, adapter in ADAPTERS.items():
            if base.__module__ == package or base.__module__.startswith(f"{package}."):
                return adapter
    if isinstance(model, nn.Module) and callable(getattr(model, "inverse", None)):
        holds_memcnn = any(type(part).__module__.startswith("memcnn.") for part in model.modules())
        return ADAPTERS["memcnn"] if holds_memcnn else "inn_guard.adapters.callables"
    for wrapper in ("module", "_orig_mod"):  # DataParallel, torch.compile
        if isinstance(getattr(model, wrapper, None), nn.Module):
            raise TypeError(
                f"expected the model inside {type(model).__name__}; type wrap(model.{wrapper}) instead"
            )
    raise TypeError(
        f"expected an Invertible, a model of {', '.join(ADAPTERS)}, or a module with forward and inverse; got "
        f"{type(model).__module__}.{type(model).__qualname__}; type wrap(encode=f, decode=g) with its two directions "
        "instead"
    )

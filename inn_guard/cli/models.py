"""From the names on a command line to a model with its weights."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from inn_guard.cli.usage import WrongUsage, note, origin

__all__ = ["load_weights", "make_model", "own_dtype"]

_NESTED = (
    "state_dict",
    "model_state_dict",
    "model",
)  # where training loops put the weights in a checkpoint
_SHOWN = 4


def make_model(name: str, *, seed: int) -> Any:
    """Import ``package.module`` and call its ``factory`` without arguments; a ready-made nn.Module is taken as it is.

    Args:
        name: "package.module:factory"; the current folder is searched too.
        seed: of the random numbers that the factory draws; the global generator is as before afterwards.

    Raises:
        WrongUsage: if there is no such name, or the code behind it raises.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise WrongUsage(f"expected --model package.module:factory, got {name!r}")
    found = _attribute(_import(module_name), attribute, module_name)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise WrongUsage(
            f"expected {name} to be a function that makes the model, got {type(found).__name__}"
        )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return found()
    except (Exception, SystemExit) as error:
        raise WrongUsage(f"calling {name}() raised {origin(error)}") from error


def _import(name: str) -> Any:
    note(f"importing {name}, which runs its code")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise WrongUsage(f"importing {name} raised {origin(error)}") from error
        advice = "type the command in the folder that holds it, or set PYTHONPATH"
        raise WrongUsage(f"there is no module {error.name!r}; {advice}") from error
    except (Exception, SystemExit) as error:
        raise WrongUsage(f"importing {name} raised {origin(error)}") from error


def _attribute(module: Any, path: str, module_name: str) -> Any:
    found = module
    for part in path.split("."):
        if not hasattr(found, part):
            raise WrongUsage(f"the module {module_name} has no {path!r}")
        found = getattr(found, part)
    return found


def load_weights(model: Any, path: Path) -> None:
    """Load a file of weights into the model; every key and every shape must match.

    Args:
        model: an nn.Module.
        path: safetensors if so named, else a torch file, which is read with ``weights_only=True``.

    Raises:
        WrongUsage: if the file cannot be read, or does not belong to this model.
    """
    if not isinstance(model, nn.Module):
        raise WrongUsage(
            f"--weights needs a torch.nn.Module, but the factory made a {type(model).__name__}"
        )
    state, own = _read(path), model.state_dict()
    _check_keys(state, own, path)
    dtypes = {
        str(state[key].dtype)
        for key in own
        if isinstance(own[key], Tensor) and state[key].dtype != own[key].dtype
    }
    if dtypes:
        note(
            f"{path.name} holds weights of {', '.join(sorted(dtypes))}: converted to those of the model"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WrongUsage(f"{path} does not fit the model: {error}") from error


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise WrongUsage(f"there is no file of weights {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may raise anything
        first = str(error).partition("\n")[0]
        advice = "save model.state_dict() with safetensors.torch.save_file or torch.save"
        raise WrongUsage(
            f"{path} cannot be read as weights: {first} ({type(error).__name__}); {advice}"
        ) from error
    return _state(content, path)


def _state(content: Any, path: Path) -> Mapping[str, Any]:
    """The weights in a checkpoint: the checkpoint itself, or what lies under one of the usual names."""
    nested = next(
        (
            name
            for name in _NESTED
            if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)
        ),
        "",
    )
    if nested:
        note(f"using the weights under {nested!r} in {path.name}")
        content = content[nested]
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise WrongUsage(
            f"expected weights by name in {path}, got {type(content).__name__}; save model.state_dict()"
        )
    return content


def _check_keys(state: Mapping[str, Any], own: Mapping[str, Any], path: Path) -> None:
    faults = []
    if missing := [key for key in own if key not in state]:
        faults.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected := [key for key in state if key not in own]:
        faults.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    if faults:
        raise WrongUsage(
            f"{path} does not fit the model: of {len(own)} weights {' and '.join(faults)}"
        )
    for key, value in own.items():
        if isinstance(value, Tensor) and not isinstance(state[key], Tensor):
            raise WrongUsage(
                f"{path} does not fit the model: {key} is a {type(state[key]).__name__}, not a tensor"
            )
        if isinstance(value, Tensor) and state[key].shape != value.shape:
            got, expected = tuple(state[key].shape), tuple(value.shape)
            raise WrongUsage(
                f"{path} does not fit the model: {key} has shape {got}, expected {expected}"
            )


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:_SHOWN]) + (", …" if len(shown) > _SHOWN else "")


def own_dtype(model: Any) -> torch.dtype:
    """The dtype of the model's first floating-point weight; torch's default if it has none."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return next(
        (tensor.dtype for tensor in tensors if tensor.is_floating_point()),
        torch.get_default_dtype(),
    )

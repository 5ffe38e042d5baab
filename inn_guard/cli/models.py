"""From the names on a command line to a model with its weights."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from inn_guard.cli.archives import check_archive
from inn_guard.cli.usage import WrongUsage, error_location, notice
from inn_guard.execution.files import atomic_write

__all__ = [
    "check_name",
    "find",
    "load_weights",
    "make",
    "own_dtype",
    "parse_arguments",
    "save_weights",
]

# where training loops put the weights in a checkpoint
NESTED = ("state_dict", "model_state_dict", "model")
# what DistributedDataParallel, LightningModules and torch.compile put before the names of weights
USUAL_PREFIXES = ("module.", "model.", "_orig_mod.")
SHOWN = 4


def check_name(name: str, option: str = "MODEL") -> None:
    """Check the form of a name without importing anything.

    Raises:
        WrongUsage: if it is not "package.module:factory" or "path/to/file.py:factory", or there
            is no such file.
    """
    module, _, attribute = name.rpartition(":")
    if not module or not attribute:
        raise WrongUsage(
            f"expected {option} as package.module:factory or path/to/file.py:factory, got {name!r}"
        )
    if module.endswith(".py") and not Path(module).is_file():
        raise WrongUsage(f"there is no file {module}")


def parse_arguments(words: Sequence[str]) -> dict[str, Any]:
    """The factory's arguments from "name=value"; a value that is no Python literal is a string.

    Raises:
        WrongUsage: if a word has another form, or a name comes twice.

    >>> parse_arguments(["layers=8", "widths=(64, 64)", "activation=tanh"])
    {'layers': 8, 'widths': (64, 64), 'activation': 'tanh'}
    """
    arguments: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise WrongUsage(f"expected --arg name=value, got {word!r}")
        if name in arguments:
            raise WrongUsage(f"expected each --arg once, got {name} twice")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            arguments[name] = value
    return arguments


def make(name: str, *, seed: int, arguments: Mapping[str, Any] | None = None) -> Any:
    """Import a module and call its factory; a ready-made object that cannot be called is returned.

    A ready-made nn.Module is returned too.

    Args:
        name: "package.module:factory", where the current folder is searched too, or
            "path/to/file.py:factory".
        seed: of the random numbers that the factory draws; the global generator is restored.
        arguments: keyword arguments of the factory.

    Raises:
        WrongUsage: if there is no such name, or the code behind it raises.
    """
    arguments = arguments or {}
    found = find(name)
    if isinstance(found, nn.Module) or not callable(found):
        if arguments:
            raise WrongUsage(f"--arg is for a factory, but {name} is a {type(found).__name__}")
        return found
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return found(**arguments)
    except (Exception, SystemExit) as error:
        raise WrongUsage(f"calling {name}() raised {error_location(error)}") from error


def find(name: str) -> Any:
    """What a name refers to: "package.module:name" or "path/to/file.py:name".

    Raises:
        WrongUsage: if there is no such name, or importing its module raises.
    """
    check_name(name)
    module_name, _, attribute = name.rpartition(":")
    return _attribute(_import(module_name), attribute, module_name)


def _import(name: str) -> ModuleType:
    notice(f"importing {name}, which runs its code")
    try:
        if name.endswith(".py"):
            return _import_file(Path(name))
        _search_in(Path.cwd())
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # the module itself or a package that holds it is missing, not something that it imports
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise WrongUsage(f"importing {name} raised {error_location(error)}") from error
        raise WrongUsage(
            f"there is no module {error.name!r}: run the command in the folder that holds it, set "
            "PYTHONPATH, or pass path/to/file.py:factory"
        ) from error
    except (Exception, SystemExit) as error:
        raise WrongUsage(f"importing {name} raised {error_location(error)}") from error


def _import_file(path: Path) -> ModuleType:
    """The module of a file, which finds its neighbours as a script does."""
    _search_in(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise WrongUsage(f"{path} cannot be imported as a module")
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickle look their module up; an imported one of the same name stays
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _search_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _attribute(module: Any, path: str, module_name: str) -> Any:
    found = module
    for part in path.split("."):
        if not hasattr(found, part):
            raise WrongUsage(
                f"the module {module_name} has no {path!r}: pass {module_name}:NAME, the name of "
                "a model or of a function that makes one"
            )
        found = getattr(found, part)
    return found


def load_weights(model: Any, path: Path) -> None:
    """Load a file of weights into the model; every key and every shape must match.

    A prefix that all weights of the model have in the file ("module.") is removed, and said.

    Args:
        model: an nn.Module.
        path: safetensors by its suffix, else a torch file, read with ``weights_only=True``.

    Raises:
        WrongUsage: if the file cannot be read, or does not belong to this model.
    """
    if not isinstance(model, nn.Module):
        raise WrongUsage(
            f"--weights needs a torch.nn.Module, but the factory made a {type(model).__name__}"
        )
    own = model.state_dict()
    state = _without_prefix(_read_weights(path), own, path)
    _check_keys(state, own, path)
    _check_shapes(state, own, path)
    converted = set()
    for key, value in own.items():
        if isinstance(value, Tensor) and state[key].dtype != value.dtype:
            converted.add(str(state[key].dtype))
    if converted:
        dtypes = ", ".join(sorted(converted))
        notice(f"{path.name} holds weights of {dtypes}: converted to those of the model")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WrongUsage(f"{path} does not fit the model: {error}") from error


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state dict of a model: safetensors by its suffix, else a torch file.

    Raises:
        WrongUsage: if it cannot be written.
    """
    state = model.state_dict()
    try:
        with atomic_write(path) as partial:
            if path.suffix == ".safetensors":
                # it refuses tensors that share memory, and takes no others than tensors
                tensors = {k: v.clone().contiguous() for k, v in state.items()}
                safetensors.torch.save_file(tensors, partial)
            else:
                torch.save(state, partial)
    except (OSError, AttributeError) as error:
        raise WrongUsage(f"the weights could not be written to {path}: {error}") from error


def _read_weights(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise WrongUsage(
            f"there is no file of weights {path}: pass one that torch.save or safetensors wrote"
        )
    check_archive(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may raise anything
        first = str(error).partition("\n")[0]
        raise WrongUsage(
            f"{path} cannot be read as weights: {first} ({type(error).__name__}); save "
            "model.state_dict() with safetensors.torch.save_file or torch.save"
        ) from error
    return _state(content, path)


def _state(content: Any, path: Path) -> Mapping[str, Any]:
    """The weights in a checkpoint: the checkpoint itself, or what it holds under a usual name."""
    if isinstance(content, Mapping):
        for name in NESTED:
            if isinstance(content.get(name), Mapping):
                notice(f"using the weights under {name!r} in {path.name}")
                content = content[name]
                break
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise WrongUsage(
            f"expected weights by name in {path}, got {type(content).__name__}: save "
            "model.state_dict()"
        )
    return content


def _without_prefix(
    state: Mapping[str, Any], own: Mapping[str, Any], path: Path
) -> Mapping[str, Any]:
    if all(key in state for key in own):
        return state
    prefixes = _prefixes(state, own)
    if not prefixes:
        return state
    prefix, others = prefixes[0], prefixes[1:]
    said = f"using the {len(own)} weights in {path.name} whose names begin with {prefix!r}"
    if left := len(state) - len(own):
        said += f", leaving out {left} others"
    if others:
        said += f" (also found: {', '.join(map(repr, others))})"
    notice(said)
    return {key: state[prefix + key] for key in own}


def _prefixes(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """The prefixes under which the file has every weight of the model, usual ones first."""
    first = next(iter(own))
    found = []
    for key in state:
        prefix = key.removesuffix(first)
        complete = prefix.endswith(".") and all(prefix + name in state for name in own)
        if prefix != key and complete:
            found.append(prefix)
    return sorted(found, key=lambda prefix: prefix not in USUAL_PREFIXES)


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


def _check_shapes(state: Mapping[str, Any], own: Mapping[str, Any], path: Path) -> None:
    for key, value in own.items():
        if not isinstance(value, Tensor):
            continue
        if not isinstance(state[key], Tensor):
            kind = type(state[key]).__name__
            raise WrongUsage(f"{path} does not fit the model: {key} is a {kind}, not a tensor")
        if state[key].shape != value.shape:
            got, expected = tuple(state[key].shape), tuple(value.shape)
            raise WrongUsage(
                f"{path} does not fit the model: {key} has shape {got}, expected {expected}"
            )


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    text = ", ".join(shown[:SHOWN])
    if len(shown) > SHOWN:
        text += ", …"
    return text


def own_dtype(model: Any) -> torch.dtype:
    """The dtype of the model's first floating-point weight; torch's default if it has none."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.get_default_dtype()

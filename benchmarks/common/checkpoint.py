"""Checkpoints in one safetensors file: weights, buffers, optimiser state and counters.

A file is written whole or not at all, holds no pickles, and carries everything that an exact
continuation needs: resuming from it gives, bit for bit, the weights of a run that was never
interrupted.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from inn_guard.execution.files import atomic_write

__all__ = ["load_checkpoint", "save_checkpoint"]

FORMAT = "inn_guard checkpoint 1"


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, progress: Mapping[str, Any]
) -> None:
    """Write model, optimiser and ``progress`` (anything that JSON can hold) to ``path``.

    Args:
        path: the file; it is replaced only once the new one is complete.
        model: its state_dict is stored; tensors shared between two names are stored under each.
        optimizer: its per-parameter tensors and its parameter groups' settings are stored.
        progress: stored as JSON; NaN and Inf survive.

    Raises:
        ValueError: if progress or the optimizer's settings are nothing that JSON holds, such as
            tensors.
    """
    state = optimizer.state_dict()
    tensors = {}
    for name, tensor in _state(model).items():
        tensors[f"model.{name}"] = _stored(tensor)
    scalars: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = _stored(value)
            else:
                scalars[f"{index}.{key}"] = value
    header = {
        "format": FORMAT,
        "progress": progress,
        "groups": state["param_groups"],
        "scalars": scalars,
    }
    try:
        written = json.dumps(header)
    except TypeError as error:
        raise ValueError(
            "expected progress and the optimizer's settings as numbers, strings, lists and "
            f"dictionaries, such as lr=1e-3 and not a tensor: {error}"
        ) from error
    with atomic_write(path) as partial:
        partial.write_bytes(save(tensors, metadata={"inn_guard": written}))


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore model and optimiser from ``path``; nothing is changed if the file does not fit.

    Returns:
        the ``progress`` that was saved.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a checkpoint, is damaged, or belongs to another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint at {path}; there is no such file")
    try:
        with safe_open(path, framework="pt") as handle:
            header = json.loads((handle.metadata() or {}).get("inn_guard", "{}"))
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise ValueError(f"expected a file of format {FORMAT!r}, got {header.get('format')!r}")
        progress = dict(header["progress"])
        moments, groups = _optimizer_state(tensors, header), _groups(optimizer, header["groups"])
    except (
        SafetensorError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        OSError,
    ) as error:
        raise ValueError(
            f"{path} is not a complete checkpoint ({type(error).__name__}: {error})"
        ) from error
    saved = {}
    for name, tensor in tensors.items():
        if name.startswith("model."):
            saved[name.removeprefix("model.")] = tensor
    _check_fit(path, model, saved)
    _check_moments(path, optimizer, moments)
    try:
        # it checks before it changes anything
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{path} belongs to another optimizer ({type(error).__name__}: {error})"
        ) from error
    model.load_state_dict(saved)
    return progress


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().contiguous()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _check_fit(path: Path, model: nn.Module, saved: dict[str, Tensor]) -> None:
    here, there = _kinds(_state(model)), _kinds(saved)
    different = [name for name in here.keys() | there.keys() if here.get(name) != there.get(name)]
    if different:
        name = min(different)
        raise ValueError(
            f"{path} belongs to another model: {len(different)} tensors differ, first {name!r}: "
            f"expected {_described(here.get(name))}, got {_described(there.get(name))}"
        )


def _kinds(tensors: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _described(tensor: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    if tensor is None:
        return "none of that name"
    return f"shape {tensor[0]} of {tensor[1]}"


def _check_moments(
    path: Path, optimizer: torch.optim.Optimizer, saved: dict[int, dict[str, Any]]
) -> None:
    """The state of a parameter must broadcast to its shape: per entry, row, column, or a number."""
    parameters = itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups)
    shapes = {index: parameter.shape for index, parameter in enumerate(parameters)}
    for index, entries in saved.items():
        for key, value in entries.items():
            wanted = shapes.get(index)
            fits = wanted is not None
            if fits and isinstance(value, Tensor):
                fits = _broadcasts(value.shape, wanted)
            if not fits:
                raise ValueError(
                    f"{path} belongs to another optimizer: {key!r} of parameter {index} does not "
                    f"fit its shape {wanted}"
                )


def _broadcasts(shape: torch.Size, wanted: torch.Size) -> bool:
    aligned = zip(reversed(shape), reversed(wanted), strict=False)
    return len(shape) <= len(wanted) and all(size in (1, whole) for size, whole in aligned)


def _groups(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved parameter groups, if they have the settings that the optimizer's own have."""
    for own, loaded in zip(optimizer.state_dict()["param_groups"], saved, strict=True):
        for name in own.keys() | loaded.keys():
            known = name in own and name in loaded
            if not known or _kind(own[name]) is not _kind(loaded[name]):
                raise ValueError(
                    f"expected {name!r} of the optimizer as {own.get(name)!r}, "
                    f"got {loaded.get(name)!r}"
                )
    return saved


def _kind(setting: Any) -> type:
    """JSON has lists for tuples and may have 1 for 1.0; None stands for whatever is left out."""
    if isinstance(setting, (list, tuple)):
        return list
    if isinstance(setting, (int, float)) and not isinstance(setting, bool):
        return float
    return type(setting)


def _optimizer_state(
    tensors: dict[str, Tensor], header: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, key = rest.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
    for name, value in header["scalars"].items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return state

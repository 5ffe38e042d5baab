"""What a result of a foreign model holds: the latent, the log-determinant, and what is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.core.tensors import concatenate_flat, split_flat

__all__ = ["Path", "State", "leaves", "log_det_paths", "pick", "states", "written"]

Path = tuple[Any, ...]  #: keys that lead from a result to a part of it; () is the result itself


def leaves(result: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every tensor and number in a result, with the keys that lead to it."""
    if isinstance(result, (Tensor, float, int)) and not isinstance(result, bool):
        yield path, result
        return
    for key, part in _items(result):
        yield from leaves(part, (*path, key))


def pick(result: Any, path: Path) -> Any:
    """The part of a result that the keys lead to."""
    for key in path:
        result = getattr(result, key) if _is_record(result) else result[key]
    return result


def written(path: Path, call: str, result: Any) -> str:
    """The code that takes this part out of a call's result."""
    text = call
    for key in path:
        text += f".{key}" if _is_record(result) else f"[{key!r}]"
        result = getattr(result, key) if _is_record(result) else result[key]
    return text


@dataclass(frozen=True)
class State:
    """Which part of a result is the latent, and how the inverse takes it.

    Attributes:
        paths: of its tensors.
        shapes: of one sample of each of several tensors; None for a single one.
        makes_tuple: whether the inverse takes several as a tuple.
    """

    paths: tuple[Path, ...]
    shapes: tuple[tuple[int, ...], ...] | None = None
    makes_tuple: bool = False

    def joined(self, result: Any) -> Tensor:
        """The latent as one tensor: (B, *latent), or (B, D) of several."""
        parts = [pick(result, path) for path in self.paths]
        return parts[0] if self.shapes is None else concatenate_flat(parts)

    def split(self, z: Tensor) -> Any:
        """What the inverse takes."""
        if self.shapes is None:
            return z
        parts = split_flat(z, self.shapes)
        return tuple(parts) if self.makes_tuple else parts

    def written(self, call: str, result: Any) -> str:
        """The code that makes the latent of a call's result."""
        parts = [written(path, call, result) for path in self.paths]
        if self.shapes is None:
            return parts[0]
        return f"torch.cat([{', '.join(f'{part}.flatten(1)' for part in parts)}], 1)"


def states(result: Any, batch: int) -> list[State]:
    """Everything in a result that can be the latent of a batch, the likeliest first."""
    if _is_state(result, batch):
        return [State(((),))]
    single = [State((path,)) for path, leaf in leaves(result) if _is_state(leaf, batch)]
    lists = list(_lists(result, batch))
    # a list inside of a result is what its inverse takes; its entries may be steps on the way
    nested = any(len(state.paths[0]) > 1 for state in lists)
    return lists + single[::-1] if nested else single + lists


def log_det_paths(result: Any, state: State, batch: int) -> list[Path]:
    """The parts beside the latent that can be log-determinants, first those with (B,) numbers.

    A list, one log-determinant for each layer, is a part of its own.
    """
    per_sample, other = [], []
    for path, leaf in leaves(result):
        if path in state.paths:
            continue
        size = leaf.numel() if isinstance(leaf, Tensor) else 1
        rows = leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() else 0
        if isinstance(leaf, Tensor) and not leaf.is_floating_point():
            continue
        if rows == batch and size == batch:
            per_sample.append(path)
        elif size == 1 or rows == batch:
            other.append(path)
    lists = [path for path in _list_paths(result, batch) if not _overlaps(path, state.paths)]
    return per_sample + lists + other


def _list_paths(result: Any, batch: int, path: Path = ()) -> Iterator[Path]:
    """The lists within a result that hold nothing but two or more tensors of the batch."""
    for key, part in _items(result):
        if isinstance(part, (list, tuple)) and not _is_record(part):
            tensors = all(isinstance(t, Tensor) and t.is_floating_point() for t in part)
            if len(part) > 1 and tensors and all(t.dim() and len(t) == batch for t in part):
                yield (*path, key)
        if not isinstance(part, (Tensor, str)):
            yield from _list_paths(part, batch, (*path, key))


def _overlaps(path: Path, others: tuple[Path, ...]) -> bool:
    return any(other[: len(path)] == path for other in others)


def _is_state(leaf: Any, batch: int) -> bool:
    if not isinstance(leaf, Tensor) or leaf.dim() < 2 or not leaf.is_floating_point():
        return False
    return len(leaf) == batch and leaf.numel() > 0


def _lists(result: Any, batch: int, path: Path = ()) -> Iterator[State]:
    """The lists in a result whose tensors, two at least, can be latents."""
    if isinstance(result, (list, tuple)) and not _is_record(result):
        parts = {k: part for k, part in enumerate(result) if _is_state(part, batch)}
        last = next(reversed(parts.values()), None)
        if len(parts) > 2 and last is not None and last[0].numel() == 1:
            # a log-determinant of shape (B, 1) behind the latents
            yield _list_state(result, dict(list(parts.items())[:-1]), path)
        if len(parts) > 1:
            yield _list_state(result, parts, path)
    if not isinstance(result, Tensor):
        for key, part in _items(result):
            yield from _lists(part, batch, (*path, key))


def _list_state(result: Any, parts: Mapping[int, Tensor], path: Path) -> State:
    shapes = tuple(tuple(part.shape[1:]) for part in parts.values())
    makes_tuple = isinstance(result, tuple) and len(parts) == len(result)
    return State(tuple((*path, k) for k in parts), shapes, makes_tuple)


def _items(result: Any) -> Sequence[tuple[Any, Any]]:
    if isinstance(result, Mapping):
        return list(result.items())
    if _is_record(result):
        names = getattr(result, "_fields", None) or [f.name for f in dataclasses.fields(result)]
        return [(name, getattr(result, name)) for name in names]
    if isinstance(result, (list, tuple)):
        return list(enumerate(result))
    return []


def _is_record(result: Any) -> bool:
    """Whether the parts of a result are attributes: of a dataclass or a named tuple."""
    if isinstance(result, type) or torch.is_tensor(result):
        return False
    return dataclasses.is_dataclass(result) or hasattr(result, "_fields")

"""Tape: what the integer arithmetic of one layer leaves behind, last in, first out."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Mismatch", "Packed", "PackedMask", "Tape", "checksum", "digest"]

ODD = 0x1E3779B97F4A7C15  #: a number without a pattern in its bits


class Mismatch(RuntimeError):
    """What the decoder computes is not what the encoder computed: the result would be wrong."""


@dataclass(frozen=True)
class Packed:
    """Integers in as few bytes each as the largest of them needs.

    Attributes:
        content: (n, width) uint8, the lowest byte first.
        shape: of the integers.
    """

    content: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, integers: Tensor) -> Packed:
        """The integers (int64, any shape) packed.

        >>> packed = Packed.of(torch.tensor([[-3, 200]]))
        >>> packed.content.shape, packed.unpack().tolist()
        (torch.Size([2, 2]), [[-3, 200]])
        """
        low, high = (int(end) for end in torch.aminmax(integers))
        width = 1
        while not -(1 << 8 * width - 1) <= low <= high < 1 << 8 * width - 1:
            width += 1
        content = _dense(integers).view(torch.uint8).reshape(-1, 8)
        return cls(content[:, :width].clone(), tuple(integers.shape))

    def unpack(self) -> Tensor:
        """The integers, int64."""
        count, width = self.content.shape
        whole = self.content.new_zeros(count, 8)
        whole[:, 8 - width :] = self.content
        # the shift to the right is arithmetic: it restores the sign
        integers = whole.flatten().view(torch.int64) >> 8 * (8 - width)
        return integers.reshape(self.shape)

    @property
    def bits(self) -> int:
        """Size of the content."""
        return 8 * self.content.numel()


@dataclass(frozen=True)
class PackedMask:
    """A boolean tensor, one bit an entry.

    Attributes:
        content: (n / 8,) uint8, on the CPU.
        shape: of the mask.
    """

    content: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, mask: Tensor) -> PackedMask:
        """The mask packed.

        >>> PackedMask.of(torch.tensor([[True, False, True]])).unpack().tolist()
        [[True, False, True]]
        """
        content = torch.from_numpy(np.packbits(mask.cpu().numpy()))
        return cls(content, tuple(mask.shape))

    def unpack(self) -> Tensor:
        """The mask, on the CPU."""
        count = math.prod(self.shape)
        bits = np.unpackbits(self.content.numpy(), count=count)
        return torch.from_numpy(bits).bool().reshape(self.shape)


@dataclass
class Tape:
    """Events of one layer. The decoder takes them off in the opposite order.

    Attributes:
        events: (kind, value) pairs, the latest last.
        spilled_bits: bits that did not fit into the words any more.
        stored_bits: size of stored inputs.
        logged_bits: size of masks and changes of exponents.
    """

    events: list[tuple[str, Any]] = field(default_factory=list)
    spilled_bits: int = 0
    stored_bits: int = 0
    logged_bits: int = 0

    def push(self, kind: str, value: Any) -> None:
        """Log an event."""
        self.events.append((kind, value))

    def pop(self, kind: str) -> Any:
        """The latest event, which must be of this kind.

        Raises:
            Mismatch: if it is another one.
        """
        found, value = self.events.pop() if self.events else ("nothing", None)
        if found != kind:
            raise Mismatch(f"expected {kind!r} on the tape, found {found!r}")
        return value

    def compare(self, now: tuple[int, ...]) -> None:
        """Compare a checksum with the one that the encoder logged.

        Raises:
            Mismatch: if they differ.
        """
        if self.pop("digest") != now:
            raise Mismatch("its parameters have other bits than in encode")

    def copy(self) -> Tape:
        """A tape with the same events, to be taken off without changing this one."""
        return Tape(list(self.events))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Tape:
        """The tape with ``function(tensor)`` in the place of every tensor on it."""
        return replace(self, events=[(kind, _mapped(v, function)) for kind, v in self.events])


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A value of an event with ``function(tensor)`` in the place of every tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Packed | PackedMask):
        return replace(value, content=function(value.content))
    if isinstance(value, list | tuple):
        return type(value)(_mapped(part, function) for part in value)
    return value


def checksum(*tensors: Tensor | None) -> tuple[int, ...]:
    """An integer of 64 bits for each size, that depends on every bit and on their order.

    It is not meant against somebody who looks for collisions, and faster than ``digest``.
    """
    by_size: dict[int, Tensor] = {}
    for tensor in tensors:
        if tensor is None:
            continue
        words = _words(tensor.detach())
        count = words.numel()
        if count in by_size:
            # one pass for both: scale and shift of a layer have the same size
            words = torch.add(words.reshape(by_size[count].shape), by_size[count], alpha=ODD)
        by_size[count] = words
    return tuple(_checksum(words) for words in by_size.values())


def _checksum(words: Tensor) -> int:
    # the upper halves count as lower ones, too: a product would lose their highest bits
    mixed = words.bitwise_right_shift(32).bitwise_xor_(words).flatten()
    weights = _weights(len(mixed), mixed.device)
    if mixed.device.type == "cpu":
        return int(mixed.dot(weights))
    # GPUs have no product of integer vectors
    return int(mixed.mul_(weights).sum())


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as int64, with zeros at the end if there are too few."""
    count = 8 // tensor.element_size()
    # a slice of channels, such as half of a network's output, needs no copy
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor[None]
    if rows.dim() == 2 and rows.stride(1) == 1:
        lengths = (rows.shape[1], rows.stride(0), rows.storage_offset())
        if not any(length % count for length in lengths):
            return rows.view(torch.int64)
    content = _dense(tensor).view(torch.uint8)
    missing = -len(content) % 8
    if missing:
        content = torch.cat([content, content.new_zeros(missing)])
    return content.view(torch.int64)


@functools.lru_cache(maxsize=8)
def _weights(count: int, device: torch.device) -> Tensor:
    """Odd numbers, so that a change of one word always shows."""
    numbers = torch.arange(1, count + 1, device=device)
    return numbers.mul_(ODD).bitwise_or_(1)


def digest(*tensors: Tensor | None) -> bytes:
    """A hash of 8 bytes that depends on every bit of the tensors and on their order."""
    hashed = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        if tensor is None:
            hashed.update(b"none")
            continue
        hashed.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        hashed.update(_dense(tensor.detach().cpu()).view(torch.uint8).numpy().data)
    return hashed.digest()


def _dense(tensor: Tensor) -> Tensor:
    """Flat, with stride 1: ``contiguous`` leaves the strides of a single entry as they are."""
    flat = tensor.flatten()
    if flat.stride() != (1,):
        return flat.clone(memory_format=torch.contiguous_format)
    return flat

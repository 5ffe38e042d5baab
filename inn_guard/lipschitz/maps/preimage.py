"""Boxes that hold the preimage of a box, for maps that increase entry by entry."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from inn_guard.numerics.intervals import Interval

__all__ = ["everywhere", "is_everywhere", "preimage"]

SIZES = 16.0 ** torch.arange(
    20, dtype=torch.float64
)  #: distances from 0 at which both ends are sought
BITS = 20  #: by which the range of an end is narrowed
FEWEST, ENTRIES = 15, 1024  #: points compared at once; more of them for maps of few entries


def everywhere(box: Interval) -> Interval:
    """All of the space that the box lies in."""
    everything = torch.full_like(box.lo, math.inf)
    return Interval(-everything, everything)


def is_everywhere(box: Interval) -> bool:
    """Whether the box is all of its space, so that bounds on it are global."""
    return bool((box.lo == -math.inf).all() and (box.hi == math.inf).all())


def preimage(value: Callable[[Interval], Interval], image: Interval) -> Interval:
    """A box that holds every x with h(x) in ``image``, for h increasing in each entry.

    A point whose enclosure is wholly below the image is left of every such x, one wholly above is
    right of all. Both ends are the innermost such points found, and infinite where there are none.

    Args:
        value: encloses h at many points at once, (points, *shape).
        image: (*shape).

    >>> third = preimage(lambda x: x * 3.0 + 1.0, Interval.of(torch.tensor([1.0, 4.0])))
    >>> bool(((third.lo < torch.tensor([0.0, 1.0])) & (third.hi - third.lo < 1e-4)).all())
    True
    """

    def beyond(points: Tensor) -> Tensor:
        """Whether points (2, n, *shape) are proved to lie left, and right, of all x."""
        flat = points.flatten(0, 1)
        y = value(Interval(flat, flat)).map(lambda t: t.unflatten(0, points.shape[:2]))
        return torch.stack([y.hi[0] < image.lo, y.lo[1] > image.hi])

    outwards = torch.stack([-torch.ones_like(image.lo), torch.ones_like(image.lo)])
    left, right = _innermost(beyond, outwards)
    return Interval(left, right)


def _innermost(beyond: Callable[[Tensor], Tensor], outwards: Tensor) -> Tensor:
    """For both ends the point found to be beyond that is nearest to the other end, (2, *shape)."""
    count = max(FEWEST, ENTRIES // max(1, outwards[0].numel()))
    along = (1, -1, *[1] * (outwards.dim() - 1))
    far = beyond(SIZES.reshape(along) * outwards[:, None])
    found = far.any(1)
    outside = SIZES[far.double().argmax(1)] * outwards
    # what is beyond the one end is not beyond the other
    inside = torch.where(found.flip(0), outside.flip(0), -outside)
    order = torch.arange(1, count + 1).reshape(along)
    for _ in range(math.ceil(BITS / math.log2(count + 1))):
        points = outside[:, None] + (inside - outside)[:, None] * (order / (count + 1))
        ladder = torch.cat([outside[:, None], points, inside[:, None]], 1)
        last = (beyond(points) * order).amax(1, keepdim=True)
        outside, inside = ladder.gather(1, last)[:, 0], ladder.gather(1, last + 1)[:, 0]
    return torch.where(found, outside, outwards * math.inf)

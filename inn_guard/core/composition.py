"""Whether layers are the map that they stand for: its values, its inverse, its log-determinant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from inn_guard.core.base import seeded
from inn_guard.core.invertible import Invertible
from inn_guard.core.tensors import finite_rows

__all__ = ["Composition", "compare_inverses", "compare_layers"]

COMPARED = 4  #: samples that are compared
#: Two orders of the same sums may differ by this many times what one rounding of the input does.
ROUNDINGS = 1e3
NATS = 1e-3  #: up to which log-determinants agree, in addition to their rounding
EPS_OF_LOG_DET = 100.0  #: roundings of a log-determinant, of its size and dimension

Function = Callable[[Tensor], Tensor]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Composition:
    """How the layers of a map differ from it, in words; "" where they do not, or it is not known.

    Attributes:
        forward: their composition is another map.
        inverse: their inverses, composed backwards, are not the map's own inverse.
        log_det: their log-determinants do not add up to the map's own.
    """

    forward: str = ""
    inverse: str = ""
    log_det: str = ""

    @property
    def other_map(self) -> str:
        """Why the layers cannot stand for the map; "" if they can."""
        return self.forward or self.inverse


def compare_layers(model: Invertible, x: Tensor, *, restore: Callable[[], None]) -> Composition:
    """Compare a map with its layers at a few finite samples.

    What raises cannot be compared, and is no difference. Values may differ by the root of the
    dtype's eps, relative to the largest value of the entry, or by what rounding the input explains.

    Args:
        model: the map, in the mode in which it is to be compared.
        x: data, (B, *data).
        restore: puts the model back as it was, after a call that raised.
    """
    compared = _Comparison(model, x, restore)
    if not compared.is_chain:
        return Composition()
    return Composition(
        forward=compared.attempt(compared.forward),
        inverse=compared.attempt(compared.inverse),
        log_det=compared.attempt(lambda: compared.log_det("forward_and_log_det")),
    )


def compare_inverses(model: Invertible, z: Tensor, *, restore: Callable[[], None]) -> Composition:
    """The same from latents z, (B, *latent): the inverse and its log-determinant."""
    compared = _Comparison(model, z, restore)
    if not compared.is_chain:
        return Composition()
    return Composition(
        inverse=compared.attempt(lambda: compared.inverse_at(compared.t)),
        log_det=compared.attempt(lambda: compared.log_det("inverse_and_log_det")),
    )


class _Comparison:
    """A map and its layers at the first finite rows of a batch."""

    def __init__(self, model: Invertible, t: Tensor, restore: Callable[[], None]) -> None:
        rows = finite_rows(t).nonzero()[:COMPARED, 0]
        self.model, self.t, self.restore = model.select(rows), t[rows], restore
        found = self.attempt(lambda: "some" if self.model.layers() else "")
        self.is_chain = bool(found) and len(rows) > 0

    def attempt(self, compare: Callable[[], str]) -> str:
        """What ``compare`` says; "" if a call raises."""
        try:
            with torch.no_grad():
                return compare()
        except Exception:  # nothing is known then, and other checks find out what raises
            self.restore()
            return ""

    def forward(self) -> str:
        if _same(self.model, _composed(self.model.layers()), self.t):
            return ""
        return "its layers do not compose to its forward"

    def inverse(self) -> str:
        z = self.model(self.t.clone())
        return self.inverse_at(z) if bool(finite_rows(z).all()) else ""

    def inverse_at(self, z: Tensor) -> str:
        backwards = [layer.inverse for layer in reversed(self.model.layers())]
        if _same(self.model.inverse, _composed(backwards), z, overflow_differs=False):
            return ""
        return "the inverses of its layers do not compose to its inverse"

    def log_det(self, method: str) -> str:
        """Of the direction of that method."""
        t = self.t
        own = _seeded(lambda: getattr(self.model, method)(t.clone())[1], t)
        layers = self.model.layers()
        if method.startswith("inverse"):
            layers = layers[::-1]
        total, size = _seeded(lambda: _sum_of_log_dets(layers, method, t), t)
        if own.shape != total.shape:
            return ""
        eps = torch.finfo(t.dtype).eps
        allowed = NATS + EPS_OF_LOG_DET * eps * (size + t[0].numel())
        gap = (own - total).abs().double()
        if not bool((gap > allowed).any()):
            return ""
        # Hutchinson's estimator and the like give another number at every call
        scatter = (getattr(self.model, method)(t.clone())[1] - own).abs()
        if bool((scatter > NATS).any()):
            return ""
        largest = gap.nan_to_num(0.0, 0.0).max().item()
        return (
            f"the log-determinants of its layers add up to another number than its own, by "
            f"{largest:.1e} nats"
        )


def _sum_of_log_dets(layers: Iterable[Invertible], method: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """Of all layers along the chain, and the sum of their magnitudes, (B,) each."""
    state = t.clone()
    total, size = t.new_zeros(len(t)), torch.zeros(len(t), dtype=torch.float64, device=t.device)
    for layer in layers:
        state, log_det = getattr(layer, method)(state)
        total = total + log_det
        size = size + log_det.abs().double()
    return total, size


def _seeded(call: Callable[[], Answer], like: Tensor) -> Answer:
    """The call with the same random numbers every time."""
    with seeded(0, like.device):
        return call()


def _composed(functions: Iterable[Function]) -> Function:
    def composition(t: Tensor) -> Tensor:
        for function in functions:
            t = function(t)
        return t

    return composition


def _same(first: Function, second: Function, t: Tensor, *, overflow_differs: bool = True) -> bool:
    """Whether two functions have the same values at t, up to rounding."""
    a, b = _seeded(lambda: first(t.clone()), t), _seeded(lambda: second(t.clone()), t)
    if a.shape != b.shape:
        return False
    known = a.isfinite() & b.isfinite()
    if overflow_differs and not torch.equal(a.isfinite(), b.isfinite()):
        return False
    gap = torch.where(known, a.double() - b.double(), 0.0).abs()
    size = torch.where(known, a.double(), 0.0).abs()
    eps = torch.finfo(t.dtype).eps
    if not gap.numel() or not bool((gap > eps**0.5 * size.amax(0)).any()):
        return True
    # an entry that is small by cancellation carries the rounding of the numbers that cancel
    generator = torch.Generator().manual_seed(0)
    sign = 2 * torch.randint(2, t.shape, generator=generator, device="cpu").to(t) - 1
    moved = (first(t * (1 + eps * sign)).double() - a.double()).abs()
    # where one rounding makes a value overflow it explains every difference
    explained = ROUNDINGS * moved.nan_to_num(torch.inf, torch.inf, torch.inf).amax(0)
    return not bool((gap > torch.maximum(explained, eps**0.5 * size.amax(0))).any())

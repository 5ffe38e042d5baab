"""J^-1 u of every layer by differences of its inverse, at the states of one forward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import INEXACT, NotApplicable

__all__ = ["InverseDifferences"]

#: largest entry of the nudge in units of h's: the root of float64's eps, where rounding and curvature cost the same
STEP = math.sqrt(torch.finfo(torch.float64).eps)
CHECKED = 16  #: samples for which a layer's inverse is compared with the state before it
SMALL = (
    2.0**-40
)  #: size of the errors carried through the whole inverse: far above float64's, far below curvature
FIRST_ORDER = 1e-3  #: deviation in units of a state's largest entry up to which the whole inverse is as good as linear


class InverseDifferences:
    """J_k^-1 u = (F_k^-1(h_k + s u) - h_(k-1)) / s for every layer k, at the states h of one forward pass.

    No derivative is needed, and the inverse of the whole chain is never run. Whenever a layer is asked, its inverse
    must come back from h_k to h_(k-1) on the first samples, up to a small part of what the nudge moves it.

    Args:
        model: in float64: in float32 the differences would drown in rounding.
        x: data in float64, (B, *data).

    Attributes:
        layers: the layers, first one first.
        states: the layers' inputs and last the output, n + 1 tensors.

    Raises:
        ValueError: if x is not in float64.
    """

    def __init__(self, model: Invertible, x: Tensor) -> None:
        if x.dtype != torch.float64:
            raise ValueError(
                f"expected x in float64, got {x.dtype}: type model.to_dtype(torch.float64) and x.double()"
            )
        self.layers = model.layers() or (model,)
        self.states = [x.detach()]
        self._rows = torch.cat([torch.arange(len(x)), torch.arange(min(CHECKED, len(x)))]).to(
            x.device
        )
        with torch.no_grad():
            for layer in self.layers:
                self.states.append(layer(self.states[-1]))

    def inverse_product(self, k: int) -> Callable[[Tensor], Tensor]:
        """u -> J^-1 u of layer k: (B, *latent) -> (B, *data).

        Calling it raises NotApplicable where the layer's inverse does not come back to the state before it.
        """
        return functools.partial(self._product, k)

    def carried(self, errors: Sequence[Tensor]) -> Tensor | None:
        """sum_k A_k e_k, with A_k the Jacobian of (F_k ... F_1)^-1 at h_k, by one pass of the whole inverse.

        Every state is moved by a small multiple of its error, on top of what the errors after it have moved it.

        Args:
            errors: one for every state, last one first, about of the states' size.

        Returns:
            the sum, (B, *data); None where a deviation does not stay small, or the inverse does not come back.
        """
        count, state = len(self.states[0]), self.states[-1]
        free = state[:CHECKED]
        with torch.no_grad():
            moved = SMALL * errors[0]
            for k in reversed(range(len(self.layers))):
                both = self.layers[k].select(self._rows).inverse(torch.cat([state + moved, free]))
                state, free = self.states[k], both[count:]
                moved = both[:count] - state
                if bool((_peak(moved) > FIRST_ORDER * _peak(state)).any()):
                    return None
                moved = moved + SMALL * errors[len(self.layers) - k]
        off = _peak(free - state[:CHECKED])
        # samples that are not finite say nothing about the others
        return None if bool((off > INEXACT * _peak(moved[:CHECKED])).any()) else moved / SMALL

    def _product(self, k: int, u: Tensor) -> Tensor:
        before, state = self.states[k], self.states[k + 1]
        length, step = _nonzero_peak(u), STEP * _nonzero_peak(state)
        with torch.no_grad():
            nudged = torch.cat([state + step * (u / length), state[:CHECKED]])
            moved, back = self.layers[k].select(self._rows).inverse(nudged).tensor_split([len(u)])
        difference = moved - before
        off, size = _peak(back - before[:CHECKED]), _peak(difference[:CHECKED])
        # samples that are not finite say nothing about the others
        if bool(((size > 0) & (off > INEXACT * size)).any()):
            name = self.layers[k].name
            raise NotApplicable(
                f"layer {k} ({name}): its inverse is too far off for differences of it"
            )
        like = (-1, *[1] * (before.dim() - 1))
        return difference / step.reshape(like) * length.reshape(like)


def _peak(t: Tensor) -> Tensor:
    """The largest absolute entry of every sample: no square that could leave the range."""
    return t.abs().amax(tuple(range(1, t.dim())))


def _nonzero_peak(t: Tensor) -> Tensor:
    """The same, broadcastable to t; 1 where it is 0."""
    peak = _peak(t)
    return torch.where(peak > 0, peak, 1.0).reshape(-1, *[1] * (t.dim() - 1))

"""J^-1 u of every layer by finite differences of its inverse, at the states of a forward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import INEXACT, NotApplicable
from inn_guard.core.tensors import dtype_name, peak, per_sample

__all__ = ["InverseDifferences"]

#: step relative to the state: sqrt(eps), where rounding and curvature cost the same
STEP = math.sqrt(torch.finfo(torch.float64).eps)
CHECKED = 16  #: samples for which a layer's inverse is compared with the state before it
#: relative size of the errors that propagate: far above float64's eps, far below curvature
SMALL = 2.0**-40
FIRST_ORDER = 1e-3  #: relative deviation of a state up to which the inverse counts as linear


class InverseDifferences:
    """J_k^-1 u = (F_k^-1(h_k + s u) - h_(k-1)) / s for every layer k, at the states h.

    No derivative is needed, and the inverse of the whole chain never runs. Every product also
    inverts h_k itself on the first samples: the inverse must return to h_(k-1), up to a small part
    of the difference.

    Args:
        model: the map, in float64: in float32, rounding would exceed the differences.
        x: data in float64, (B, *data).

    Attributes:
        layers: the layers, first layer first.
        states: the layers' inputs and then the output, n + 1 tensors.

    Raises:
        ValueError: if x is not in float64.
    """

    def __init__(self, model: Invertible, x: Tensor) -> None:
        if x.dtype != torch.float64:
            raise ValueError(
                f"expected x in float64, got {dtype_name(x.dtype)}: "
                "use model.to_dtype(torch.float64) and x.double()"
            )
        self.layers = model.layers() or (model,)
        self.states = [x.detach()]
        # all samples, and once more the first ones, whose inverse is checked
        rows = [*range(len(x)), *range(min(CHECKED, len(x)))]
        self._rows = torch.tensor(rows, device=x.device)
        with torch.no_grad():
            for layer in self.layers:
                self.states.append(layer(self.states[-1]))

    def inverse_product(self, k: int) -> Callable[[Tensor], Tensor]:
        """The function u -> J^-1 u of layer k, (B, *latent) -> (B, *data).

        It raises NotApplicable where the layer's inverse does not return to the state before it.
        """
        return functools.partial(self._product, k)

    def propagate_errors(self, errors: Sequence[Tensor]) -> Tensor | None:
        """sum_k A_k e_k by one pass of the whole inverse; A_k: Jacobian of (F_k ... F_1)^-1 at h_k.

        Every state is displaced by a small multiple of its error, in addition to the displacement
        that the errors of later states cause.

        Args:
            errors: one for every state, last state first, of about the states' size.

        Returns:
            the sum, (B, *data); None where a displacement does not stay small, or the inverse does
            not return to the states.
        """
        count = len(self.states[0])
        state = self.states[-1]
        # these samples are not displaced: they show what the inverse alone does
        free = state[:CHECKED]
        with torch.no_grad():
            moved = SMALL * errors[0]
            for k in reversed(range(len(self.layers))):
                both = self.layers[k].select(self._rows).inverse(torch.cat([state + moved, free]))
                state = self.states[k]
                moved = both[:count] - state
                free = both[count:]
                if bool((peak(moved) > FIRST_ORDER * peak(state)).any()):
                    return None
                moved = moved + SMALL * errors[len(self.layers) - k]
        off = peak(free - state[:CHECKED])
        # comparisons with NaN are false: samples that are not finite do not stop the others
        if bool((off > INEXACT * peak(moved[:CHECKED])).any()):
            return None
        return moved / SMALL

    def _product(self, k: int, u: Tensor) -> Tensor:
        """(F_k^-1(h_k + s u) - h_(k-1)) / s, if the inverse returns from h_k to h_(k-1)."""
        before, state = self.states[k], self.states[k + 1]
        # largest entries as lengths: no square that could exceed the range
        length = _divisor(u)
        step = STEP * _divisor(state)
        displaced = state + per_sample(step, state) * (u / per_sample(length, u))
        with torch.no_grad():
            both = torch.cat([displaced, state[:CHECKED]])
            moved, back = self.layers[k].select(self._rows).inverse(both).tensor_split([len(u)])
        difference = moved - before
        off = peak(back - before[:CHECKED])
        size = peak(difference[:CHECKED])
        # comparisons with NaN are false: samples that are not finite do not stop the others
        if bool(((size > 0) & (off > INEXACT * size)).any()):
            name = self.layers[k].name
            raise NotApplicable(
                f"layer {k} ({name}): its inverse is too far off for finite differences"
            )
        return difference / per_sample(step, before) * per_sample(length, before)


def _divisor(t: Tensor) -> Tensor:
    """The largest magnitude of every sample, (B,); 1 where it is 0 or NaN."""
    largest = peak(t)
    return torch.where(largest > 0, largest, 1.0)

"""Guard: compares a rebuilt state with the true one by a few numbers per sample."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

__all__ = ["Guard"]

PROJECTIONS = 8  #: per sample and state


class Guard:
    """Compares states by random projections, so that no state has to be stored.

    The fingerprint of a state x (B, D) is P x / sqrt(m), with P of m = 8 rows of N(0, 1), and |x|.
    The distance of the projections of x and x' is |x' - x| sqrt(chi^2_m / m). It is smaller than a
    tenth of |x' - x| with a probability of 1e-7.

    Args:
        tolerance: largest accepted |x' - x| / |x| of any sample.

    Raises:
        ValueError: if the tolerance is not positive.
    """

    def __init__(self, tolerance: float) -> None:
        number = isinstance(tolerance, numbers.Real) and not isinstance(tolerance, bool)
        if not number or not tolerance > 0:
            raise ValueError(
                "expected a positive guard, the largest accepted relative error; got "
                f"{tolerance!r:.60}"
            )
        self.tolerance = tolerance
        self._projections: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def fingerprint(self, state: Tensor) -> Tensor:
        """Eight projections and the norm of every sample: (B, 9), in float32 at least."""
        flat = state.detach().flatten(1)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        return torch.cat([flat @ self._projection(flat), flat.norm(dim=1, keepdim=True)], dim=1)

    def accepts(self, state: Tensor, fingerprint: Tensor) -> bool:
        """Whether all samples of ``state`` are within the tolerance of the true state; NaN is not.

        Args:
            state: the rebuilt state, (B, *shape).
            fingerprint: of the true state, (B, 9).
        """
        if not state.numel():
            return True
        difference = (self.fingerprint(state) - fingerprint)[:, :-1].norm(dim=1)
        return bool((difference <= self.tolerance * fingerprint[:, -1]).all())

    def _projection(self, flat: Tensor) -> Tensor:
        key = (flat.shape[1], flat.dtype, flat.device)
        if key not in self._projections:
            generator = torch.Generator().manual_seed(0)
            shape = (flat.shape[1], PROJECTIONS)
            matrix = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)
            self._projections[key] = (matrix / PROJECTIONS**0.5).to(flat)
        return self._projections[key]

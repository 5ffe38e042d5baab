"""Guard: notices, by a few numbers per sample, that a rebuilt state is not the one that was there."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Guard"]

PROJECTIONS = 8  #: per sample and state


class Guard:
    """Compares states by random projections, so that no state has to be stored.

    A sketch of a state x (B, D) is P x / sqrt(m) with P of m = 8 rows of N(0, 1), and |x|. Sketches of x and x' differ
    by |x' - x| sqrt(chi^2_m / m) in length: by less than a tenth of |x' - x| with probability 1e-7.

    Args:
        tolerance: largest accepted |x' - x| / |x| of any sample.
    """

    def __init__(self, tolerance: float) -> None:
        if not tolerance > 0:
            raise ValueError(
                f"expected a positive guard, the largest relative error accepted; got {tolerance}"
            )
        self.tolerance = tolerance
        self._projections: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def sketch(self, state: Tensor) -> Tensor:
        """(B, 9): eight projections and the length of every sample."""
        flat = state.detach().flatten(1)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        return torch.cat([flat @ self._projection(flat), flat.norm(dim=1, keepdim=True)], dim=1)

    def accepts(self, state: Tensor, sketch: Tensor) -> bool:
        """Whether every sample of ``state`` lies within the tolerance of the one sketched; never where it is NaN."""
        if not state.numel():
            return True
        difference = (self.sketch(state) - sketch)[:, :-1].norm(dim=1)
        return bool((difference <= self.tolerance * sketch[:, -1]).all())

    def _projection(self, flat: Tensor) -> Tensor:
        key = (flat.shape[1], flat.dtype, flat.device)
        if key not in self._projections:
            generator = torch.Generator().manual_seed(0)
            matrix = torch.randn(
                flat.shape[1], PROJECTIONS, generator=generator, device="cpu", dtype=torch.float64
            )
            self._projections[key] = (matrix / PROJECTIONS**0.5).to(flat)
        return self._projections[key]

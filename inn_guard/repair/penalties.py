"""Which penalty is added to the loss for which failing use."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable
from inn_guard.training.regularizer_hook import Regularizer
from inn_guard.training.regularizers import FiniteDifferences

__all__ = ["MOST", "Penalty", "VolumeAgainstSize", "is_trainable", "penalties_for"]

MOST = 1e3  #: times its first coefficient a penalty may grow; beyond it the loss no longer counts
FACTOR = 3.0  #: by which a coefficient changes, and a figure must fall in a trial
TRIAL = 20  #: steps for which a coefficient is tried at least
FIRST_AT_PRIOR = 0.1
FIRST_AT_DATA = 1e-3
AT_DATA = ("reconstruction", "gradients")


class VolumeAgainstSize:
    """What F loses of the volume for the size of its latents.

        R = D/2 log( mean |z|^2 / D ) - mean log|det J_F(x)|,    z = F(x)

    in nats, with the means over the batch; D is the size of z. It is the normalizing-flow loss with
    a normal base of the best deviation, up to a constant. For a linear map of data of unit
    covariance it is D log(root mean square / geometric mean) of the singular values. A common
    factor of all latents does not change it; a shift that is large beside their spread, and so
    costs digits, does. It needs no inverse, and is finite where the inverse overflows.
    """

    def __call__(self, model: Invertible, x: Tensor, z: Tensor | None = None) -> Tensor:
        """The penalty at a batch; z is not used, because it does not give the log-determinant."""
        z, log_det = model.forward_and_log_det(x)
        flat = z.flatten(1)
        return flat.shape[1] / 2 * flat.square().mean().log() - log_det.mean()


@dataclass
class Penalty:
    """A regularizer with its current coefficient, for some uses.

    Attributes:
        uses: that it repairs.
        regularizer: with coefficient 1.
        coefficient: by which it is multiplied now.
        most: largest coefficient.
        held_since: after how many steps the current trial of the coefficient began.
        figure: of the worst of its uses then, over the limit.
    """

    uses: tuple[str, ...]
    regularizer: Regularizer
    coefficient: float
    most: float
    held_since: int = 0
    figure: float = math.inf

    def __call__(self, model: Invertible, x: Tensor) -> Tensor:
        """The penalty at a batch."""
        return self.coefficient * self.regularizer(model, x)

    def relax(self) -> None:
        """All uses pass: divide the coefficient by 3."""
        self.coefficient /= FACTOR

    def adapt(self, figure: float, step: int) -> None:
        """A use is open: multiply the coefficient by 3 if 20 steps have not brought enough.

        Args:
            figure: of the worst of the uses, over the limit.
            step: steps made so far.
        """
        if step - self.held_since < TRIAL:
            return
        fell = math.isfinite(figure) and figure * FACTOR <= self.figure
        if not fell:
            self.coefficient = min(self.coefficient * FACTOR, self.most)
        self.held_since, self.figure = step, figure


def penalties_for(
    uses: Iterable[str],
    model: Invertible,
    x: Tensor,
    *,
    coefficient: float | None,
    seed: int,
) -> list[Penalty]:
    """The penalties for the failing uses; [] if there is none for any of them.

    Sampling: the logarithm of |J_F^-1| at draws from the base. Reconstruction and gradients:
    `VolumeAgainstSize`, or where there is no log-determinant the logarithm of |J_F^-1| at the
    data. The square of |J_F^-1| overflows where the inverse has exploded.

    Args:
        uses: that fail.
        model: the map.
        x: a batch, on which it is tried whether there is a log-determinant.
        coefficient: the first one. Default: 0.1 at draws, 1e-3 at the data.
        seed: of the noise.
    """
    failing = set(uses)
    made = []
    if "sampling" in failing:
        regularizer: Regularizer = FiniteDifferences(
            1.0, direction="inverse", at="prior", form="log", seed=seed
        )
        first = coefficient or FIRST_AT_PRIOR
        made.append(Penalty(("sampling",), regularizer, first, MOST * first))
    at_data = tuple(use for use in AT_DATA if use in failing)
    if at_data:
        regularizer = VolumeAgainstSize()
        if not _has_log_det(model, x):
            regularizer = FiniteDifferences(1.0, direction="inverse", form="log", seed=seed)
        first = coefficient or FIRST_AT_DATA
        made.append(Penalty(at_data, regularizer, first, MOST * first))
    return made


def is_trainable(penalty: Penalty, model: Invertible, x: Tensor) -> bool:
    """Whether the penalty at a batch has a gradient.

    It has none where the direction that it goes through runs under ``torch.no_grad``, detaches, or
    writes into tensors that the gradient needs.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(penalty(model, x), parameters, allow_unused=True)
    except RuntimeError:
        return False
    return any(gradient is not None for gradient in gradients)


def _has_log_det(model: Invertible, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            model.forward_and_log_det(x)
    except NotApplicable:
        return False
    return model.bijective

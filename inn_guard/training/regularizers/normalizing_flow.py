"""Normalizing-flow loss: a little maximum likelihood keeps a map trained for another task invertible in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Shaped
from torch import Tensor

from inn_guard.core.invertible import Invertible, standard_normal_log_prob
from inn_guard.training.regularizers.autocast import autocast_disabled
from inn_guard.training.regularizers.checks import check_coefficient

__all__ = ["NormalizingFlowLoss"]


@dataclass(frozen=True)
class NormalizingFlowLoss:
    """coefficient * (negative log-likelihood of the batch under a standard normal base), in nats per sample.

        R = mean_B( -log N(F(x); 0, I) - log|det J_F(x)| )

    -log|det J| resists small singular values, |F(x)|^2 large ones. The base is standard normal whatever base the
    model's own library gives it. The constant of dequantization is left out, having no gradient. Under autocast the
    pass runs in float32.

    This differs from the paper in: the log-determinant takes a forward pass of its own, which K = 10 makes negligible;
    the paper takes it from the task's forward pass. A loop that has z and log_det at hand calls ``of`` instead.

    Args:
        coefficient: c >= 0; the paper searched 1e-3, 1e-4, 1e-5.

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann, Vicol, Wang, Grosse,
        Jacobsen, 2021), section 3.2.
    """

    coefficient: float

    def __post_init__(self) -> None:
        check_coefficient(self.coefficient)

    def __call__(
        self, model: Invertible, x: Shaped[Tensor, "batch *data"], z: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """The penalty at a batch.

        Args:
            model: the map F.
            x: data, (B, *data).
            z: not used: the log-determinant does not follow from it.

        Returns:
            A scalar with gradients for the parameters of F (and for x, if x wants them).

        Raises:
            NotApplicable: if the map has no log-determinant.
        """
        with autocast_disabled(x) as x:
            return self.of(*model.forward_and_log_det(x))

    def of(
        self, z: Float[Tensor, "batch *latent"], log_det: Float[Tensor, "batch"]
    ) -> Float[Tensor, ""]:
        """The penalty from a forward pass that the task has made already, as the paper has it: no pass of its own."""
        return -self.coefficient * (standard_normal_log_prob(z) + log_det).mean()

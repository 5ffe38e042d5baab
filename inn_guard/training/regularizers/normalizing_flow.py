"""Normalizing-flow loss: a small share of maximum likelihood keeps a map numerically invertible."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Shaped
from torch import Tensor

from inn_guard.core.invertible import Invertible, standard_normal_log_prob
from inn_guard.training.regularizers.checks import check_batch, check_coefficient
from inn_guard.training.regularizers.passes import autocast_disabled

__all__ = ["NormalizingFlowLoss"]


@dataclass(frozen=True)
class NormalizingFlowLoss:
    """coefficient * (mean negative log-likelihood under a standard normal base), in nats.

        R = mean_B( -log N(F(x); 0, I) - log|det J_F(x)| )

    -log|det J| resists small singular values, |F(x)|^2 large ones. The base is standard normal,
    whatever base the model itself has. The constant of dequantization has no gradient and is left
    out. Under autocast the pass runs in float32.

    This differs from the paper in: the log-determinant takes a forward pass of its own, where the
    paper takes it from the task's pass. With K = 10 the cost is negligible. A loop that has z and
    log_det already calls ``from_forward``.

    Args:
        coefficient: c >= 0; the paper searched 1e-3, 1e-4, 1e-5.

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), section 3.2.
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
            z: not used, because z does not give the log-determinant.

        Returns:
            A scalar with gradients for the parameters of F, and for x if it requires them.

        Raises:
            NotApplicable: if the map has no log-determinant.
        """
        check_batch(model, x, z)
        with autocast_disabled(x) as x:
            return self.from_forward(*model.forward_and_log_det(x))

    def from_forward(
        self, z: Float[Tensor, "batch *latent"], log_det: Float[Tensor, "batch"]
    ) -> Float[Tensor, ""]:
        """The penalty from z and log_det of the task's own forward pass, as in the paper."""
        return -self.coefficient * (standard_normal_log_prob(z) + log_det).mean()

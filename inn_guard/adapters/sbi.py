"""sbi: density estimators and posteriors as Invertibles: parameters theta -> latent, given the observation.

An estimator holds a flow of nflows or zuko in its attribute ``net``, and a net that embeds the observation: inside the
flow for nflows, beside it for zuko.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.adapters.base import Adapted
from inn_guard.core.invertible import Context, Invertible

__all__ = ["SbiEstimator", "adapt"]


def adapt(model: Any, context: Context = None) -> Invertible:
    """A density estimator, or a posterior that holds one, as an Invertible.

    Args:
        model: what ``trainer.train()`` or ``trainer.build_posterior()`` of sbi returns.
        context: observations x, (B, *x_shape), one for each theta.

    Raises:
        TypeError: if there is no flow inside.
    """
    estimator = getattr(model, "posterior_estimator", model)
    if not isinstance(getattr(estimator, "net", None), nn.Module):
        raise TypeError(
            f"expected a density estimator of sbi with a flow in its attribute net, got {type(model).__name__}; "
            "type wrap(posterior.posterior_estimator, context=x) instead"
        )
    return SbiEstimator(estimator, context)


class SbiEstimator(Adapted):
    """A density estimator; its flow's layers are its layers, in the observation that is its context."""

    def __init__(self, module: nn.Module, context: Context = None) -> None:
        super().__init__(module, context)
        wrap(module.net)  # raises for what is no flow

    def forward(self, x: Tensor) -> Tensor:
        """z = F(theta)."""
        return self._flow()(x)

    def inverse(self, z: Tensor) -> Tensor:
        """theta = F^-1(z)."""
        return self._flow().inverse(z)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """F(theta) and log|det dF/dtheta|, (B,)."""
        return self._flow().forward_and_log_det(x)

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """F^-1(z) and its log-determinant, (B,)."""
        return self._flow().inverse_and_log_det(z)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(theta | x) in nats, (B,)."""
        return self._flow().log_prob(x)

    def layers(self) -> tuple[Invertible, ...]:
        """The flow's layers, flat."""
        return self._flow().layers()

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.forward_and_log_det(x)

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        return self.inverse_and_log_det(z)

    def _flow(self) -> Invertible:
        if self.context is None:
            raise ValueError(
                "expected the observations that the estimator is conditioned on: type wrap(estimator, context=x), "
                "one x for each theta, instead"
            )
        net: Any = self.module.net
        embeds_itself = hasattr(net, "_embedding_net")
        return wrap(
            net, context=self.context if embeds_itself else self.module.embedding_net(self.context)
        )  # type: ignore[operator]

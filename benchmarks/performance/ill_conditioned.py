"""sigma_min of ill-conditioned nets in float32: Lanczos, and a dense J with numpy's SVD.

The net is the 48-block affine Glow trunk (D = 3072) with the last convolution of every coupling
multiplied by a gain before ActNorm sets itself from data. Truth: the same Lanczos run on the net in
float64, to a hundredth of the tolerance. The peer decomposes the float32 Jacobian (composed, which
is exact to rounding) with numpy, as one that stores J in float32 must.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch

from benchmarks.common.runner import Row, collect, keyed, main
from benchmarks.performance.nets import Sizes
from benchmarks.performance.peer import svd_seconds
from inn_guard.jacobian.dense import composed_jacobian
from inn_guard.layers.actnorm import ActNorm
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling


@dataclass(frozen=True)
class Config(Sizes):
    """How ill-conditioned the nets are."""

    blocks: int = 48
    batch: int = 32
    # factors on the last convolution of every coupling
    gains: tuple[float, ...] = (11.0, 13.0, 16.0, 18.0, 19.0)
    tolerance: float = 1e-2

    def amplified(self, gain: float) -> Chain:
        """The net with this gain, ActNorms set anew."""
        net = self.net(self.blocks)
        with torch.no_grad():
            for layer in net.layers():
                if isinstance(layer, AffineCoupling):
                    layer.network[-1].weight.mul_(gain)  # type: ignore[index,operator,union-attr]
                if isinstance(layer, ActNorm):
                    layer.initialized.zero_()
            net.train()(self.data())
        return net.eval()


PRESETS = {
    "smoke": {"blocks": 3, "hidden": 8, "size": 8, "batch": 4, "gains": (10.0,)},
    "cpu": {},  # the claim's sizes
}


def measure(config: Config, gain: float) -> list[Row]:
    """One row: logarithms to base 10 of condition and sigma_min, relative errors, steps."""
    torch.set_num_threads(1)
    net, x = config.amplified(gain), config.data()[:1]
    exact = net.to_dtype(torch.float64)
    truth = config.extremes(exact, x.double(), tolerance=config.tolerance / 100)
    ours = config.extremes(net, x, tolerance=config.tolerance)
    values = svd_seconds(composed_jacobian(net, x)[0])[1].double()
    with torch.no_grad():
        back = (net.inverse(net(x)) - x).norm() / x.norm()
    return [
        {
            "gain": gain,
            "log10_condition": truth.log_condition.item() / math.log(10),
            "log10_sigma_min": truth.log_min.item() / math.log(10),
            "sigma_max_error": (ours.log_max - truth.log_max).expm1().abs().item(),
            "sigma_min_error": (ours.log_min - truth.log_min).expm1().abs().item(),
            "error_estimate": max(
                ours.forward.relative_error.item(), ours.backward.relative_error.item()
            ),
            "steps": int(ours.forward.steps + ours.backward.steps),
            "peer_sigma_max_error": (values[0].log() - truth.log_max).expm1().abs().item(),
            "peer_sigma_min_factor": (values[-1].log() - truth.log_min).abs().exp().item(),
            "round_trip_error": back.item(),
        }
    ]


def run(config: Config) -> pd.DataFrame:
    return collect(config, keyed("gain {:g}", config.gains), measure)


if __name__ == "__main__":
    main(__name__)

"""Memory-saving gradients deviate as training explodes the inverse; FD or NF prevent it.

    inn-guard bench exploding_inverses.gradient_angles --preset cpu --data-root FOLDER

The classifiers of ``cifar10_classifiers`` with affine couplings and 1x1 convolutions: the
unregularized one trained by plain backpropagation, the regularized ones with memory-saving
gradients, as in the paper, and evaluated more often and on more minibatches. Angles are
over the parameters of the invertible trunk; the head's gradient is the same either way.
"""

from __future__ import annotations

import dataclasses

import pandas as pd

from benchmarks.common.runner import collect, main
from benchmarks.exploding_inverses import cifar10_classifiers
from benchmarks.exploding_inverses.classifier_report import draw_angles as draw
from benchmarks.exploding_inverses.image_classifiers import Run

__all__ = ["PRESETS", "Config", "draw", "run"]

RUNS = ("affine conv none", "affine conv FD 1e-4", "affine conv NF 1e-5")


@dataclasses.dataclass(frozen=True)
class Config(cifar10_classifiers.Config):
    """As in ``cifar10_classifiers``; only the reconstructions and the angles are measured."""


def preset(base: str, **changes: object) -> dict[str, object]:
    """The fields of that preset of ``cifar10_classifiers``, for three runs, with these changes."""
    return {**cifar10_classifiers.PRESETS[base], "runs": RUNS, **changes}


PRESETS = {
    "smoke": preset("smoke", epochs=1),
    # six minutes of one core: the small net, 312 steps, four minibatches at each of eight
    # evaluations
    "cpu": preset(
        "cpu", memory_saving=True, looks=8, angle_batches=4, test_images=100, reconstructed=200,
        spectra=4,
    ),
    "paper": preset("paper", looks=40),  # figure 18, for a GPU
}  # fmt: skip


def run(config: Config) -> pd.DataFrame:
    return collect(
        config, {text: Run.parse(text) for text in config.runs}, cifar10_classifiers.measure
    )


if __name__ == "__main__":
    main(__name__)

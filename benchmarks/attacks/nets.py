"""The nets under attack: classifiers of digits with inaccurate inverses, and small Glows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common.image_files import read_cifar10
from benchmarks.exploding_inverses.digits_nets import NETS, Classifier
from inn_guard.audits.dequantization_attack import Quantization
from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from inn_guard.layers.contraction import contractive_conv_net
from inn_guard.layers.residual import Residual
from inn_guard.models.glow import GlowConfig, glow_flow

__all__ = ["SUBJECTS", "Subject", "glow", "trained_glow"]

HELD_OUT = 450


@dataclass(frozen=True)
class Subject:
    """A net with data it was not trained on, and how integers became that data."""

    net: Invertible
    x: Tensor
    quantization: Quantization


def digits() -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8), grey values 0..16 as v / 8 - 1, and labels (n,)."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(pixels / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return x, torch.as_tensor(labels)


def digits_subject(
    kind: str, *, blocks: int, learning_rate: float, steps: int
) -> Callable[[Path, int], Subject]:
    """A digits classifier; the high learning rate makes its inverse less accurate."""

    def make(_: Path, seed: int) -> Subject:
        x, y = digits()
        torch.manual_seed(seed)
        classifier = Classifier(NETS[kind](blocks, 64))

        def loss(part: Tensor, rows: Tensor) -> Tensor:
            return functional.cross_entropy(classifier(part), y[rows])

        images = x[:-HELD_OUT]
        train(classifier, images, loss, steps=steps, learning_rate=learning_rate, seed=seed)
        return Subject(classifier.inn.eval(), x[-HELD_OUT:], Quantization(5, -1.0, 3.0))

    return make


def iresnet_subject(_: Path, seed: int) -> Subject:
    """Six untrained residual layers (coefficient 0.9) on digits: a fixed-point inverse."""
    x, _ = digits()
    torch.manual_seed(seed)
    net = Chain(*(Residual(contractive_conv_net(1, 16, coefficient=0.9)) for _ in range(6)))
    return Subject(net.eval(), x[-HELD_OUT:], Quantization(5, -1.0, 3.0))


def glow(levels: int = 2, blocks: int = 8, hidden: int = 32) -> Invertible:
    """An affine Glow over 3 x 32 x 32, Glow's sigmoid scale."""
    return glow_flow((3, 32, 32), config=GlowConfig(levels, blocks, hidden))


def trained_glow(
    root: Path, seed: int, *, steps: int = 150, learning_rate: float = 3e-3
) -> Subject:
    """The Glow after a short training on the images below ``root``, in [-0.5, 0.5]."""
    train_pixels = torch.as_tensor(read_cifar10(root, train=True).pixels[:2000]).float()
    test_pixels = torch.as_tensor(read_cifar10(root, train=False).pixels[:2000]).float()
    torch.manual_seed(seed)
    net = glow()

    def loss(x: Tensor, _: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(x.sum().item()) % 2**31)
        noise = torch.rand(x.shape, generator=generator)
        return -net.log_prob((x + noise) / 256 - 0.5).mean() / x[0].numel()

    train(net, train_pixels, loss, steps=steps, learning_rate=learning_rate, seed=seed, batch=16)
    return Subject(net.eval(), test_pixels / 256 - 0.5, Quantization(8, -0.5, 0.5))


def train(
    model: nn.Module,
    x: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    batch: int = 64,
) -> None:
    """Adam on random batches."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        loss(x[rows], rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 50.0)
        optimizer.step()


SUBJECTS: dict[str, Callable[[Path, int], Subject]] = {
    "digits ours": digits_subject("plain", blocks=24, learning_rate=7e-3, steps=250),
    "digits ours overheated": digits_subject("plain", blocks=24, learning_rate=1.2e-2, steps=250),
    "digits FrEIA": digits_subject("FrEIA", blocks=24, learning_rate=1e-3, steps=250),
    "digits nflows": digits_subject("nflows", blocks=24, learning_rate=5e-3, steps=250),
    "digits i-ResNet": iresnet_subject,
    "CIFAR-10 (JPEG copies) Glow": trained_glow,
}

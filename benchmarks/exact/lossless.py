"""Images through trained nets and back without one wrong bit, also where the inverse has exploded.

    inn-guard bench exact.lossless --preset cpu --data-root FOLDER

Flows (Glow, a masked autoregressive flow, FrEIA's AllInOneBlocks) are trained by likelihood on
dequantized images, classifiers (affine couplings with shuffles or 1x1 convolutions, without a
regularizer) by cross-entropy, as in ``cifar10_classifiers``. Held-out images of 8 bits (digits: 17
grey values) are encoded and decoded by ``exact`` and by the float inverse. Gradients of one batch,
with float and with exact memory saving, are compared with stored activations in float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import FrEIA.framework
import FrEIA.modules
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common.quantized_images import QuantizedImages, quantized_images
from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses.image_classifiers import Classifier, Run
from benchmarks.performance.measurement import processor_seconds
from inn_guard.adapters import wrap
from inn_guard.core.invertible import Invertible
from inn_guard.exact import exact
from inn_guard.layers.autoregressive import maf
from inn_guard.layers.chain import Chain
from inn_guard.layers.reshape import Flatten
from inn_guard.memory_saving import memory_saving
from inn_guard.models.glow import GlowConfig, glow_flow

__all__ = ["PRESETS", "Config", "run"]

Loss = Callable[[Invertible, Tensor, Tensor], Tensor]  #: (net, x, labels) -> scalar


@dataclass(frozen=True)
class Config:
    """Which nets, how they are trained, and how many images are coded."""

    cases: tuple[str, ...] = (
        "digits glow",
        "digits maf",
        "digits freia",
        "mnist glow",
        "mnist freia",
        "digits affine shuffle none",
        "digits affine conv none",
        "cifar10 affine conv none",
    )
    data_root: str = "data"  # folder of the official files
    data_name: str = "digits, MNIST test images, CIFAR-10"  # name of the data in the results
    images: int = 256  # held-out images that are coded
    steps: int = 100  # of training
    batch_size: int = 64  # of training and of coding
    gradient_batch: int = 16  # images whose gradient is computed
    learning_rate: float = 1e-3  # of Adam
    clip: float = 10.0  # largest norm of the gradient
    levels: int = 2  # of the nets on digits and MNIST; one more on CIFAR-10
    blocks: int = 4  # per level
    hidden: int = 32  # channels, or units, of the networks
    seed: int = 0  # of weights, batches and noise


PRESETS = {
    "smoke": {
        "cases": ("digits glow", "digits maf", "digits freia"),
        "images": 32,
        "steps": 3,
        "batch_size": 16,
        "blocks": 1,
        "hidden": 8,
        "gradient_batch": 4,
    },
    "cpu": {"data_name": "digits, MNIST test images, CIFAR-10 (JPEG copies)"},  # minutes
}


def freia(shape: tuple[int, int, int], *, blocks: int, hidden: int) -> Invertible:
    """FrEIA's AllInOneBlocks on squeezed images."""
    net = FrEIA.framework.SequenceINN(*shape)
    net.append(FrEIA.modules.IRevNetDownsampling)

    def network(inputs: int, outputs: int) -> nn.Module:
        first = nn.Conv2d(inputs, hidden, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(hidden, outputs, 3, padding=1))

    for _ in range(blocks):
        net.append(FrEIA.modules.AllInOneBlock, subnet_constructor=network, permute_soft=True)
    return wrap(net)


def net_of(config: Config, kind: str, data: QuantizedImages) -> tuple[Invertible, nn.Module, Loss]:
    """(net, module with all parameters that are trained, loss)."""
    torch.manual_seed(config.seed)
    levels = config.levels + (data.shape[1] == 32)
    if kind == "glow":
        sizes = GlowConfig(levels, config.blocks, config.hidden)
        net: Invertible = glow_flow(data.shape, config=sizes)
    elif kind == "maf":
        net = Chain(Flatten(data.shape), *maf(data.dims, layers=3, hidden=4 * config.hidden).steps)
    elif kind == "freia":
        net = freia(data.shape, blocks=levels * config.blocks, hidden=config.hidden)
    else:
        classifier = Classifier(
            Run.parse(kind),
            data.shape,
            levels=levels,
            blocks=config.blocks,
            hidden=config.hidden,
            seed=config.seed,
        )
        return classifier.inn, classifier, _cross_entropy(classifier.head)
    return net, net, _bits_per_dimension


def _bits_per_dimension(net: Invertible, x: Tensor, labels: Tensor) -> Tensor:
    return -net.log_prob(x).mean() / (x[0].numel() * math.log(2))


def _cross_entropy(head: nn.Module) -> Loss:
    def loss(net: Invertible, x: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(head.to(x.dtype)(net(x)), labels)

    return loss


def on_grid(data: QuantizedImages, pixels: Tensor) -> Tensor:
    """Pixels as multiples of a power of two in [-1/2, 1/2]: float32 holds them exactly."""
    return pixels.float() * _step(data) - 0.5


def _step(data: QuantizedImages) -> float:
    """The distance of two grey values: 1/256, or 1/16 for digits."""
    return 2.0 ** -math.ceil(math.log2(data.levels - 1))


def train(
    config: Config, data: QuantizedImages, module: nn.Module, loss: Loss, net: Invertible
) -> float:
    """The last loss."""
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=config.learning_rate)
    value = torch.tensor(math.nan)
    module.train()
    for _ in range(config.steps):
        rows = torch.randint(len(data.train), (config.batch_size,), generator=generator)
        x = on_grid(data, data.train[rows])
        if module is net:
            x = x + torch.rand(x.shape, generator=generator) * _step(data)
        optimizer.zero_grad()
        value = loss(net, x, data.train_labels[rows].long())
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), config.clip)
        optimizer.step()
    module.eval()
    return float(value.detach())


def measure(config: Config, case: str) -> list[Row]:
    """One row."""
    torch.set_num_threads(1)
    name, _, kind = case.partition(" ")
    data = quantized_images(name, Path(config.data_root))
    net, module, loss = net_of(config, kind, data)
    final = train(config, data, module, loss, net)
    x = on_grid(data, data.test[: config.images])
    checksum = hashlib.sha256(data.test[: config.images].numpy().tobytes()).hexdigest()
    row: Row = {"data": data.name, "images": len(x), "values": x.numel(), "training_loss": final}
    return [
        {
            **row,
            **_coded(net, x, config.batch_size),
            **_by_float(net, x, config.batch_size, half=_step(data) / 2),
            **_angles(config, data, net, module, loss),
            "test_accuracy": _accuracy(data, net, module),
            "checksum": checksum[:12],
        }
    ]


def _coded(net: Invertible, x: Tensor, batch_size: int) -> Row:
    """Wrong values and bits of exact mode, and the bits that it keeps."""
    coder = exact(net)
    wrong = wrong_bits = 0
    bits = log_det = seconds = back = 0.0
    for part in x.split(batch_size):
        coder.encode(part)  # the first batch of a shape is checked, which is not timed
        once, (z, kept) = processor_seconds(partial(coder.encode, part))
        again, decoded = processor_seconds(partial(coder.decode, z, kept))
        difference = decoded.view(torch.int32) ^ part.contiguous().view(torch.int32)
        wrong += int((difference != 0).sum())
        for place in range(32):
            wrong_bits += int(((difference >> place) & 1).sum())
        bits += kept.bits_per_dimension * part.numel() / x.numel()
        with torch.no_grad():
            log_det += float(net.forward_and_log_det(part)[1].double().sum())
        seconds, back = seconds + once, back + again
    stored = sum(layer.rule == "stored input" for layer in kept.layers)
    return {
        "wrong_values": wrong,
        "wrong_bits": wrong_bits,
        "kept_bits_per_dimension": bits,
        "contraction_bits_per_dimension": -log_det / math.log(2) / x.numel(),
        "layers": len(kept.layers),
        "stored_layers": stored,
        "encode_seconds": seconds,
        "decode_seconds": back,
    }


def _by_float(net: Invertible, x: Tensor, batch_size: int, *, half: float) -> Row:
    """Errors of the model's own inverse; an image is lost where a grey value would be another."""
    errors = []
    for part in x.split(batch_size):
        with torch.no_grad():
            back = net.inverse(net(part))
        errors.append((back - part).flatten(1).abs().amax(1).nan_to_num(math.inf))
    worst = torch.cat(errors)
    return {
        "float_worst_error": float(worst.max()),
        "float_median_error": float(worst.median()),
        "float_lost_images": int((worst >= half).sum()),
    }


def _angles(
    config: Config, data: QuantizedImages, net: Invertible, module: nn.Module, loss: Loss
) -> Row:
    """Degrees between parameter gradients and those of float64 with stored activations."""
    x = on_grid(data, data.train[: config.gradient_batch])
    labels = data.train_labels[: config.gradient_batch].long()
    found = {}
    for mode, lean in (
        ("stored", net),
        ("float_saving", memory_saving(net)),
        ("exact_saving", memory_saving(net, exact=True)),
    ):
        found[mode] = _gradient(loss, lean, net, x, labels)
    double = net.to_dtype(torch.float64)
    true = _gradient(loss, double, double, x.double(), labels)
    module.float()  # the head of a classifier was used in float64
    return {f"{mode}_degrees": _degrees(vector, true) for mode, vector in found.items()}


@torch.no_grad()
def _accuracy(data: QuantizedImages, net: Invertible, module: nn.Module) -> float:
    """Share of right labels of up to 2000 test images; NaN of a flow."""
    if not isinstance(module, Classifier):
        return math.nan
    x, labels = on_grid(data, data.test[:2000]), data.test_labels[:2000]
    found = torch.cat([module.head(net(part)).argmax(1) for part in x.split(128)])
    return float((found == labels).float().mean())


def _gradient(loss: Loss, net: Invertible, of: Invertible, x: Tensor, labels: Tensor) -> Tensor:
    parameters = [p for p in of.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss(net, x, labels), parameters, allow_unused=True)
    return torch.cat([g.flatten().double() for g in found if g is not None])


def _degrees(a: Tensor, b: Tensor) -> float:
    if not bool(a.isfinite().all()):
        return math.nan
    a, b = a / a.norm(), b / b.norm()
    # accurate for small angles, where the cosine is not
    return math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))


def run(config: Config) -> pd.DataFrame:
    return collect(config, config.cases, measure)


if __name__ == "__main__":
    main(__name__)

"""Cases of MemCNN 1.5: couplings, wrapped, nested, in chains; what cannot keep the contract."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import memcnn
import torch
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.core.invertible import Invertible
from tests.cases.case import Case, randomize, seeded

BATCH, FEATURES = 4, 6
HALF = FEATURES // 2


def vectors() -> Tensor:
    return torch.randn(BATCH, FEATURES, dtype=torch.float64)


def images() -> Tensor:
    return torch.randn(BATCH, 4, 3, 3, dtype=torch.float64)


def mlp(outputs: int = HALF) -> nn.Module:
    return nn.Sequential(nn.Linear(HALF, 8), nn.Tanh(), nn.Linear(8, outputs))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ELU(), nn.Conv2d(4, 2, 1))


def additive(**settings) -> nn.Module:
    return memcnn.AdditiveCoupling(mlp(), mlp(), **settings)


def affine(adapter: type[nn.Module] = memcnn.AffineAdapterNaive, **settings) -> nn.Module:
    outputs = FEATURES if adapter is memcnn.AffineAdapterSigmoid else HALF
    return memcnn.AffineCoupling(mlp(outputs), mlp(outputs), adapter=adapter, **settings)


def wrapped(module: nn.Module, **settings) -> nn.Module:
    return memcnn.InvertibleModuleWrapper(module, **settings)


class Nested(nn.Module):
    """A user's module with wrappers inside, and a log-determinant of its own: that of the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.coupling = wrapped(additive())
        self.scale = nn.Parameter(torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.coupling(x * self.scale.exp()), self.scale.sum()

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.coupling.inverse(z) * (-self.scale).exp(), -self.scale.sum()


def reversible_block() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return memcnn.ReversibleBlock(mlp(), mlp(), implementation_fwd=1, implementation_bwd=1)


def case(
    name: str, module: Callable[[], nn.Module], data: Callable[[], Tensor] = vectors, **abilities
) -> Case:
    def make() -> tuple[Invertible, Tensor]:
        with seeded(dtype=torch.float32):
            built = module()
            randomize(built)
            built = built.double().eval()
            return (wrap(layers=built) if isinstance(built, nn.Sequential) else wrap(built)), data()

    return Case(
        f"memcnn-{name}", make, **{"has_log_det": False, "has_inverse_log_det": False, **abilities}
    )


CASES = [
    case("AdditiveCoupling", additive),
    case(
        "AdditiveCoupling-image",
        lambda: memcnn.AdditiveCoupling(convolutions(), convolutions()),
        images,
    ),
    case("AffineCoupling-AffineAdapterNaive", affine),
    case("AffineCoupling-AffineAdapterSigmoid", lambda: affine(memcnn.AffineAdapterSigmoid)),
    case("InvertibleModuleWrapper", lambda: wrapped(affine())),
    case(
        "InvertibleModuleWrapper-kept",
        lambda: wrapped(additive(), keep_input=True, keep_input_inverse=True),
    ),
    case("InvertibleModuleWrapper-nested", lambda: wrapped(wrapped(additive()))),
    case("ReversibleBlock", reversible_block),
    case("module-with-wrappers", Nested, has_log_det=True, has_inverse_log_det=True),
    case("chain", lambda: nn.Sequential(*[wrapped(affine()) for _ in range(3)]), has_layers=True),
]

#: what of MemCNN 1.5 cannot keep the contract -> why; every entry is shown to fail in
#: tests/adapters/test_memcnn.py
EXCEPTIONS = {
    "InvertibleModuleWrapper as it is": "a call frees its input's storage, in eval mode too; what "
    "is inside is called",
    "InvertibleModuleWrapper under torch.autograd.grad": "it differentiates by .backward() alone, "
    "and once",
    "couplings' log-determinants": "the library computes none",
    "modules of several tensors": "wrap(encode=..., decode=...) with one tensor each",
}

"""Certificates: what proves a bound, in a file that needs no optimiser, no model code and no pickle to be checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inn_guard.files import atomic_write
from inn_guard.lipschitz.chains import Chain, Layer
from inn_guard.lipschitz.conditioners import Proof
from inn_guard.lipschitz.networks import Factor, product
from inn_guard.lipschitz.recursion import certify
from inn_guard.lipschitz.rounding import up
from inn_guard.lipschitz.spectral import spectral_norm

__all__ = ["Certificate", "weights_hash"]

FORMAT = "inn_guard Lipschitz certificate 2"


@dataclass(frozen=True)
class Certificate:
    """Factors whose products bound the forward map and the inverse map, chains with the multipliers that prove them.

    Factors without a chain are closed forms of single layers, or leaves of a branch and bound: those are recomputed
    from the model, not from the file.

    Attributes:
        forward: factors of the bound of ||J||.
        inverse: factors of the bound of ||J^-1||.
        leaves: the least bounds by branch and bound, by direction; empty if there was none.
        weights: hash of the model's weights.
    """

    forward: tuple[Factor, ...]
    inverse: tuple[Factor, ...]
    leaves: Mapping[str, float] = field(default_factory=dict)
    weights: str = ""

    @property
    def bounds(self) -> tuple[float, float]:
        """What is proved, forward and inverse."""
        return product([f.bound for f in self.forward]), product([f.bound for f in self.inverse])

    def check(self) -> bool:
        """Whether every chain's bound follows from its multipliers: the recursion alone, without the optimiser."""
        return all(_proves(f.proof, f.bound) for f in (*self.forward, *self.inverse) if f.proof is not None)

    def save(self, path: str | Path) -> None:
        """Write the certificate, atomically, as arrays (.npz) with a JSON header."""
        arrays: dict[str, np.ndarray] = {}
        header: dict[str, Any] = {"format": FORMAT, "weights": self.weights, "leaves": dict(self.leaves)}
        for side, factors in (("forward", self.forward), ("inverse", self.inverse)):
            header[side] = [_describe(f, f"{side}.{k}", arrays) for k, f in enumerate(factors)]
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        with atomic_write(path) as partial, open(partial, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a certificate; nothing in the file is executed.

        Raises:
            ValueError: if the file is none.
        """
        with np.load(path, allow_pickle=False) as file:
            if "header" not in file:
                raise ValueError(f"expected a Lipschitz certificate, got {path}")
            header = json.loads(file["header"].tobytes())
            if header.get("format") != FORMAT:
                raise ValueError(f"expected a file of format {FORMAT!r}, got {header.get('format')!r}")
            sides = {
                side: tuple(_restored(entry, f"{side}.{k}", file) for k, entry in enumerate(header[side]))
                for side in ("forward", "inverse")
            }
        return cls(sides["forward"], sides["inverse"], header["leaves"], header["weights"])


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and bytes of a state dict, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(array.shape)} {array.dtype}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _proves(proof: Proof, bound: float) -> bool:
    chain = proof.chain
    own = certify(chain, proof.multipliers) if chain.layers else spectral_norm(chain.output, chain.error)
    return own <= up(bound * (1 + 1e-12))


def _describe(factor: Factor, name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "layers": [factor.first, factor.last],
        "bound": factor.bound.hex(),
        "chain": factor.proof is not None,
    }
    if factor.proof is None:
        return entry
    chain = factor.proof.chain
    entry |= {"size": chain.size, "error": chain.error.hex(), "errors": [layer.error.hex() for layer in chain.layers]}
    arrays[f"{name}.output"] = chain.output.numpy()
    for k, (layer, D) in enumerate(zip(chain.layers, factor.proof.multipliers, strict=True)):
        parts = {
            "keep": layer.keep,
            "weight": layer.weight,
            "lower": layer.lower,
            "upper": layer.upper,
            "multipliers": D,
        }
        arrays |= {f"{name}.{k}.{key}": part.numpy() for key, part in parts.items()}
    return entry


def _restored(entry: Mapping[str, Any], name: str, file: Mapping[str, np.ndarray]) -> Factor:
    bound, (first, last) = float.fromhex(entry["bound"]), entry["layers"]
    if not entry["chain"]:
        return Factor(first, last, bound)
    layers, multipliers = [], []
    for k, error in enumerate(entry["errors"]):
        keep, weight, lower, upper, D = (
            torch.from_numpy(file[f"{name}.{k}.{key}"]) for key in ("keep", "weight", "lower", "upper", "multipliers")
        )
        layers.append(Layer(keep, weight, lower, upper, float.fromhex(error)))
        multipliers.append(D)
    output = torch.from_numpy(file[f"{name}.output"])
    chain = Chain(entry["size"], tuple(layers), output, float.fromhex(entry["error"]))
    return Factor(first, last, bound, Proof(bound, chain, tuple(multipliers)))

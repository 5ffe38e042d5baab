"""Certificates: the proof of a bound in a file that is checked without optimiser and model code."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inn_guard.adapters import wrap
from inn_guard.execution.files import atomic_write
from inn_guard.lipschitz.computation import Conditions, compute
from inn_guard.lipschitz.fingerprint import fingerprint, weights_hash
from inn_guard.lipschitz.lipsdp.chain import Chain, Layer
from inn_guard.lipschitz.lipsdp.recursion import certify
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.networks.conditioner import Proof, SearchBudget
from inn_guard.lipschitz.whole_network import Factor, product
from inn_guard.numerics.intervals import Box
from inn_guard.numerics.rounding import Upper, is_finite
from inn_guard.numerics.spectral_norm import spectral_norm

__all__ = ["Certificate"]

FORMAT = "inn_guard Lipschitz certificate 3"
LARGEST = 2**33  #: bytes that a file may unpack to
WIDEST = 2**15  #: entries of a chain's state, of which the recursion makes square matrices
LONGEST = 1e5  #: seconds of work that a check may take
AGREEMENT = 1e-12  #: relative difference allowed when a proof is checked elsewhere
AGAIN = 1e-9  #: and when all of a model's bounds are computed again
PARTS = ("keep", "weight", "lower", "upper", "multipliers")  #: arrays of a layer in the file
#: what reading a damaged or forged file may raise
DAMAGED = (
    ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError,
    MemoryError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Certificate:
    """Factors whose products bound the forward and the inverse map, with their proofs.

    Factors without a chain are closed forms of single layers, or leaves of a branch and bound: the
    file only claims them. ``check(model)`` computes all bounds again, from the model.

    Attributes:
        forward: factors of the bound of ||J||.
        inverse: factors of the bound of ||J^-1||.
        leaves: the least bounds by branch and bound, by direction; empty if there was none.
        weights: hash of the model's weights.
        map: hash of everything else that decides the map: see ``fingerprint``.
        conditions: what the bounds were computed for; None where that is not known.
    """

    forward: tuple[Factor, ...]
    inverse: tuple[Factor, ...]
    leaves: Mapping[str, float] = field(default_factory=dict)
    weights: str = ""
    map: str = ""
    conditions: Conditions | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """The bounds of the forward map and of the inverse map."""
        return product([f.bound for f in self.forward]), product([f.bound for f in self.inverse])

    @property
    def unproved(self) -> tuple[Factor, ...]:
        """Factors without a chain: the file only claims them."""
        return tuple(f for f in (*self.forward, *self.inverse) if f.proof is None)

    def check(self, model: Any = None) -> bool:
        """Whether the bounds are proved.

        Without a model: whether every chain's bound follows from its multipliers, by the recursion.
        That says nothing about which model the chains belong to, or about factors without one.

        Args:
            model: the model of the certificate, or one that ``wrap`` accepts. Its weights, its
                attributes and the code of its functions must be those of the certificate; and its
                bounds, computed again from it within the same box and the same budget of work, no
                larger than the certificate's.
        """
        for factor in (*self.forward, *self.inverse):
            if factor.proof is not None and not _proves(factor.proof, factor.bound):
                return False
        return model is None or self._holds_for(wrap(model))

    def _holds_for(self, model: Any) -> bool:
        count = len(model.layers() or (model,))
        if self.conditions is None or self.forward[-1].last != count:
            return False
        if weights_hash(model.state_dict()) != self.weights or fingerprint(model) != self.map:
            return False
        claimed = self._least()
        found = compute(model, self.conditions, goal=Pair(*claimed)).upper
        pairs = zip(found, claimed, strict=True)
        return all(own <= claim * (1 + AGAIN) for own, claim in pairs)

    def _least(self) -> tuple[float, float]:
        """The least that is claimed, forward and inverse."""
        forward, inverse = self.bounds
        return (
            min(forward, self.leaves.get("forward", math.inf)),
            min(inverse, self.leaves.get("inverse", math.inf)),
        )

    def save(self, path: str | Path) -> None:
        """Write the certificate, atomically, as arrays (.npz) with a JSON header."""
        arrays: dict[str, np.ndarray] = {}
        header: dict[str, Any] = {
            "format": FORMAT,
            "weights": self.weights,
            "map": self.map,
            "leaves": dict(self.leaves),
            "budget": None,
        }
        if self.conditions is not None:
            header["budget"] = _described_budget(self.conditions)
            arrays["box.lo"] = self.conditions.box.lo.numpy()
            arrays["box.hi"] = self.conditions.box.hi.numpy()
        for side, factors in (("forward", self.forward), ("inverse", self.inverse)):
            header[side] = []
            for k, factor in enumerate(factors):
                header[side].append(_describe(factor, f"{side}.{k}", arrays))
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        with atomic_write(path) as partial, open(partial, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a certificate; nothing in the file is executed, and forged proofs are refused.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is no certificate, or damaged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"expected a Lipschitz certificate at {path}; there is no such file"
            )
        try:
            return _read(path)
        except DAMAGED as error:
            said = f"{type(error).__name__}: {error}"[:300]
            raise ValueError(
                f"expected a whole Lipschitz certificate, got {path} ({said})"
            ) from error


def _read(path: str | Path) -> Certificate:
    with zipfile.ZipFile(path) as packed:
        size = sum(member.file_size for member in packed.infolist())
    if size > LARGEST:
        raise ValueError(f"it unpacks to {size} bytes, more than {LARGEST}")
    with np.load(path, allow_pickle=False) as archive:
        file = dict(archive)
        # numpy hands out the raw bytes of an entry that is no array
        if not all(isinstance(array, np.ndarray) for array in file.values()):
            raise ValueError("expected arrays only")
        header = json.loads(file["header"].tobytes())
        if header["format"] != FORMAT or not isinstance(header["weights"], str):
            raise ValueError(f"expected the format {FORMAT!r}, got {header['format']!r}")
        if not all(isinstance(bound, float) for bound in header["leaves"].values()):
            raise ValueError("expected bounds of leaves as numbers")
        forward = _factors(header, "forward", file)
        inverse = _factors(header, "inverse", file)
        conditions = _restored_conditions(header["budget"], file)
    last = _checked_end(forward)
    if _checked_end(inverse) != last or last == 0:
        raise ValueError(
            "expected factors over the same layers in both directions, "
            f"got {last} and {_checked_end(inverse)}"
        )
    return Certificate(
        forward,
        inverse,
        header["leaves"],
        header["weights"],
        str(header["map"]),
        conditions,
    )


def _described_budget(conditions: Conditions) -> dict[str, Any]:
    entry: dict[str, Any] = {"seconds": conditions.seconds, "effort": None}
    effort = conditions.effort
    if effort is not None:
        entry["effort"] = [effort.steps, effort.seconds, effort.width]
    return entry


def _restored_conditions(
    entry: Mapping[str, Any] | None, file: Mapping[str, np.ndarray]
) -> Conditions | None:
    if entry is None:
        return None
    effort = None
    if entry["effort"] is not None:
        steps, seconds, width = entry["effort"]
        effort = SearchBudget(int(steps), float(seconds), int(width))
    box = Box(torch.from_numpy(file["box.lo"]), torch.from_numpy(file["box.hi"]))
    conditions = Conditions(box, float(entry["seconds"]), effort)
    if not 0 <= conditions.seconds <= LONGEST:
        raise ValueError(f"expected a budget of at most {LONGEST:.0f} seconds of work")
    return conditions


def _factors(
    header: Mapping[str, Any], side: str, file: Mapping[str, np.ndarray]
) -> tuple[Factor, ...]:
    return tuple(_restored(entry, f"{side}.{k}", file) for k, entry in enumerate(header[side]))


def _checked_end(factors: tuple[Factor, ...]) -> int:
    """The index after the last layer of factors that follow each other from layer 0 on."""
    at = 0
    for factor in factors:
        if factor.first != at or not factor.last > at:
            raise ValueError(
                f"expected a factor from layer {at} on, "
                f"got one from {factor.first} to {factor.last}"
            )
        if not factor.bound >= 0:
            raise ValueError(f"expected a bound of at least 0, got {factor.bound}")
        at = factor.last
    return at


def _check_chain(chain: Chain, multipliers: tuple[Tensor, ...]) -> None:
    """Refuse chains that would make a false proof pass: shapes, errors, slopes, multipliers."""
    width, frequencies = chain.size, chain.frequencies
    for error in (chain.error, *[layer.error for layer in chain.layers]):
        if not 0 <= error < math.inf:
            raise ValueError("expected finite errors of at least 0")
    for layer, D in zip(chain.layers, multipliers, strict=True):
        _check_matrix(layer.keep, width, frequencies)
        _check_matrix(layer.weight, width, frequencies)
        n = layer.weight.shape[1]
        for values in (layer.lower, layer.upper, D):
            if values.shape != (n,) or values.dtype != torch.float64 or not is_finite(values):
                shape = tuple(values.shape)
                raise ValueError(f"expected {n} finite numbers, got {shape} of {values.dtype}")
        if not bool((D > 0).all() and (layer.lower <= layer.upper).all()):
            raise ValueError("expected positive multipliers, and slopes from lower to upper")
        width = layer.keep.shape[1] + n
    _check_matrix(chain.output, width, frequencies)


def _check_matrix(matrix: Tensor, width: int, frequencies: int) -> None:
    fits = matrix.dim() == 3 and matrix.shape[2] == width <= WIDEST
    is_double = matrix.dtype in (torch.float64, torch.complex128)
    if not fits or len(matrix) not in (1, frequencies) or not is_double or not is_finite(matrix):
        raise ValueError(
            f"expected finite matrices on {width} entries, got {tuple(matrix.shape)} {matrix.dtype}"
        )


def _proves(proof: Proof, bound: float) -> bool:
    chain = proof.chain
    if chain.layers:
        own = certify(chain, proof.multipliers)
    else:
        own = spectral_norm(chain.output, chain.error)
    return own <= bound * (1 + AGREEMENT)


def _describe(factor: Factor, name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "layers": [factor.first, factor.last],
        "bound": float(factor.bound).hex(),
        "chain": factor.proof is not None,
    }
    if factor.proof is None:
        return entry
    chain = factor.proof.chain
    entry |= {
        "size": chain.size,
        "error": float(chain.error).hex(),
        "errors": [float(layer.error).hex() for layer in chain.layers],
    }
    arrays[f"{name}.output"] = chain.output.numpy()
    for k, (layer, D) in enumerate(zip(chain.layers, factor.proof.multipliers, strict=True)):
        parts = (layer.keep, layer.weight, layer.lower, layer.upper, D)
        for key, part in zip(PARTS, parts, strict=True):
            arrays[f"{name}.{k}.{key}"] = part.numpy()
    return entry


def _restored(entry: Mapping[str, Any], name: str, file: Mapping[str, np.ndarray]) -> Factor:
    bound = float.fromhex(entry["bound"])
    first, last = map(int, entry["layers"])
    if not entry["chain"]:
        return Factor(first, last, bound)
    layers, multipliers = [], []
    for k, error in enumerate(entry["errors"]):
        parts = [torch.from_numpy(file[f"{name}.{k}.{key}"]) for key in PARTS]
        keep, weight, lower, upper, D = parts
        layers.append(Layer(keep, weight, lower, upper, float.fromhex(error)))
        multipliers.append(D)
    output = torch.from_numpy(file[f"{name}.output"])
    chain = Chain(int(entry["size"]), tuple(layers), output, float.fromhex(entry["error"]))
    _check_chain(chain, tuple(multipliers))
    return Factor(first, last, bound, Proof(Upper(bound), chain, tuple(multipliers)))

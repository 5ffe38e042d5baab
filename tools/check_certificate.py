"""Check a Lipschitz certificate.

    python tools/check_certificate.py certificate.npz [weights.safetensors]

Every chain is evaluated again with the multipliers in the file, by numpy alone, with bounds of all
rounding errors; neither the optimiser nor the package is needed. With the weights, their hash is
compared. The file is not trusted: what is damaged, huge or could make a false proof pass is
refused.

Exit code: 0 everything is proved; 1 something is wrong; 2 the file is no certificate, or damaged;
3 factors with a chain are proved, factors without one are only claimed.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "inn_guard Lipschitz certificate 3"
LARGEST = 2**33  # bytes that a file may unpack to
WIDEST = 2**15  # entries of a chain's state
U = 2.0**-53  # unit roundoff
ROUNDED = 1 + 1e-9  # more than the roundings of a norm or of a sum of a few bounds
TINY = 1e-300  # keeps the first shift of a zero matrix off zero
AGREEMENT = 1e-6  # relative difference allowed between the claimed bound and this one

Array = np.ndarray


def expect(true: Any, description: str) -> None:
    """Refuse the file unless a condition holds."""
    if not true:
        raise ValueError(f"expected {description}")


def read(path: str) -> tuple[Any, dict[str, Any]]:
    """The arrays and the header of a file, after a check of its size and format."""
    size = sum(member.file_size for member in zipfile.ZipFile(path).infolist())
    expect(size < LARGEST, "less than 8 GiB")
    with np.load(path, allow_pickle=False) as archive:
        file = dict(archive)
    # numpy hands out the raw bytes of an entry that is no array
    expect(all(isinstance(array, np.ndarray) for array in file.values()), "arrays only")
    header = json.loads(file["header"].tobytes())
    expect(header["format"] == FORMAT, f"the format {FORMAT!r}")
    expect(isinstance(header["weights"], str), "a hash of the weights")
    if header["budget"] is not None:
        for corner in ("box.lo", "box.hi"):
            expect(corner in file, "the box in which the bounds hold")
    for bound in header["leaves"].values():
        expect(isinstance(bound, float), "bounds of leaves as numbers")
    ends = []
    for side in ("forward", "inverse"):
        layers = [entry["layers"] for entry in header[side]]
        ends.append(sum(last - first for first, last in layers))
    expect(ends[0] == ends[1] != 0, "the same layers in both directions")
    return file, header


def weights_hash(path: str) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, as the package computes it."""
    from safetensors.numpy import load_file

    total = hashlib.sha256()
    for name, array in sorted(load_file(path).items()):
        total.update(f"{name} {array.shape} torch.{array.dtype}".encode() + array.tobytes())
    return total.hexdigest()


def factors(header: dict[str, Any], side: str) -> Iterator[tuple[dict[str, Any], float]]:
    """The factors of one direction and their claims; they must follow each other from layer 0."""
    at = 0
    for entry in header[side]:
        (first, last), claimed = entry["layers"], float.fromhex(entry["bound"])
        expect(first == at < last, f"a factor from layer {at} on")
        expect(claimed >= 0, "a bound of at least 0")
        at = last
        yield entry, claimed


def chain_of(
    file: Any, name: str, entry: dict[str, Any]
) -> tuple[list[list[Array]], Array, list[float]]:
    """A chain's layers, output and errors, refused if they could make a false proof pass."""
    errors = [float.fromhex(error) for error in (*entry["errors"], entry["error"])]
    for error in errors:
        expect(0 <= error < math.inf, "finite errors of at least 0")
    width, layers = int(entry["size"]), []
    for k in range(len(errors) - 1):
        keys = ("keep", "weight", "lower", "upper", "multipliers")
        parts = [file[f"{name}.{k}.{key}"] for key in keys]
        keep, weight, lower, upper, D = parts
        for matrix in (keep, weight):
            expect_matrix(matrix, width)
        for values in (lower, upper, D):
            expect(values.shape == weight.shape[1:2], "a slope and a multiplier for every neuron")
            expect_double(values)
        expect((D > 0).all(), "positive multipliers")
        expect((lower <= upper).all(), "slopes from lower to upper")
        width = keep.shape[1] + weight.shape[1]
        layers.append(parts)
    output = file[f"{name}.output"]
    expect_matrix(output, width)
    return layers, output, errors


def expect_matrix(A: Array, width: int) -> None:
    """Refuse what is no matrix, or one per frequency, on ``width`` entries."""
    expect(A.ndim == 3 and A.shape[2] == width <= WIDEST, f"matrices on {width} entries")
    expect_double(A)


def expect_double(A: Array) -> None:
    """Refuse other dtypes than double precision, NaN and infinity."""
    is_double = A.dtype in (np.float64, np.complex128)
    expect(is_double and np.isfinite(A).all(), "finite numbers of double precision")


def gamma(k: int) -> float:
    """The relative error of k operations; 16: complex arithmetic, a product and its sums."""
    return 1.0000001 * 16 * k * U


def adjoint(A: Array) -> Array:
    """The conjugate transpose of every matrix."""
    return A.conj().swapaxes(1, 2)


def hermitian(A: Array) -> Array:
    """The Hermitian part of every matrix."""
    return (A + adjoint(A)) / 2


def norm(A: Array) -> float:
    """An upper bound of the largest Frobenius norm."""
    return float(np.sqrt((abs(A) ** 2).sum((1, 2)).max(initial=0.0))) * ROUNDED


def largest_eigenvalue(H: Array) -> float:
    """s + c with a Cholesky factorisation of s I - H that exists: an upper bound (Rump 2006)."""
    n, slack = H.shape[1], 8 * H.shape[1] * U * max(norm(H), TINY)
    s = float(np.linalg.eigvalsh(H).max())
    while math.isfinite(s + slack):
        try:
            np.linalg.cholesky((s + slack) * np.eye(n) - H)
        except np.linalg.LinAlgError:
            slack *= 4
        else:
            return s + slack + gamma(n + 2) * (n * (abs(s) + slack) + norm(H) * n)
    return math.inf


def congruence(A: Array, error: float, Q: Array) -> tuple[Array, float]:
    """A Q A^* and a bound of its error, A being known up to ``error``."""
    relative = gamma(2 * A.shape[2] + 4) * norm(A) ** 2 + (2 * norm(A) + error) * error
    return hermitian(A @ Q @ adjoint(A)), relative * norm(Q)


def step(Q: Array, layer: list[Array], error: float) -> Array:
    """Q' of [keep state; sigma(W state)], enlarged by all rounding errors.

    Q' = [[P, 0], [0, R^2 D - M^2 D]] + V^* (D - S)^-1 V with V = [C, D M].
    """
    keep, W, lower, upper, D = layer
    k, n, M, R = keep.shape[1], W.shape[1], (lower + upper) / 2, (upper - lower) / 2
    count = max(len(keep), len(W))
    keep, W = (
        np.broadcast_to(keep, (count, k, keep.shape[2])),
        np.broadcast_to(W, (count, *W.shape[1:])),
    )
    T, e = congruence(np.concatenate([keep, W], 1), error, Q)
    e += 8 * U * (abs(T).max(initial=0) + D.max(initial=0))
    if not n:
        return T + 2 * e * np.eye(k)
    N = np.diag(D) - T[:, k:, k:] - 2 * e * np.eye(n)
    least = -largest_eigenvalue(-N)
    if not least > 0:
        raise ArithmeticError("the multipliers prove nothing")
    V = np.concatenate([T[:, k:, :k], np.broadcast_to(np.diag(D * M), (len(T), n, n))], 2)
    X = np.linalg.solve(N, V)
    E = V - N @ X
    new = adjoint(V) @ X + adjoint(X) @ E
    new[:, :k, :k] += T[:, :k, :k] + 2 * e * np.eye(k)
    new[:, range(k, k + n), range(k, k + n)] += (R * R - M * M) * D
    unseen = gamma(n + 4) * (norm(N) * norm(X) + norm(V))  # rounding error of E
    slack = gamma(n + 4) * norm(X) * (norm(V) + norm(E))
    slack += unseen * (norm(X) + 2 * (norm(E) + unseen) / least) + norm(E) ** 2 / least
    largest = float((D * (M * M + R * R)).max(initial=0))
    slack += 16 * U * (norm(T) + largest + norm(new))
    return hermitian(new) + slack * ROUNDED * np.eye(k + n)


def proved(file: Any, name: str, entry: dict[str, Any]) -> float:
    """The bound of a chain that its multipliers prove; inf if they prove nothing."""
    layers, output, errors = chain_of(file, name, entry)
    Q = np.eye(entry["size"])[None]
    try:
        for layer, error in zip(layers, errors, strict=False):
            Q = step(Q, layer, error)
        Q, e = congruence(output, errors[-1], Q)
        return math.sqrt(max(largest_eigenvalue(Q) + e, 0.0)) * (1 + 4 * U)
    except (ArithmeticError, np.linalg.LinAlgError):
        return math.inf


def check(path: str, weights: str | None) -> tuple[bool, int]:
    """Whether every proof and the weights agree, and how many factors are only claimed."""
    file, header = read(path)
    good, claims = True, 0
    if weights is not None:
        good = weights_hash(weights) == header["weights"]
        print("weights:", "those" if good else "NOT those", "of the certificate")
    for side in ("forward", "inverse"):
        for k, (entry, claimed) in enumerate(factors(header, side)):
            bound: float | str = "nothing"
            if entry["chain"]:
                bound = proved(file, f"{side}.{k}", entry)
                good = good and bound <= claimed * (1 + AGREEMENT)
            else:
                claims += 1
            print(f"{side}, layers {entry['layers']}: claimed {claimed:.10g}, proved {bound}")
    return good, claims


@np.errstate(all="ignore")
def main(path: str | Path, weights: str | Path | None = None) -> int:
    """Print what is proved; the exit code."""
    try:
        good, claims = check(str(path), None if weights is None else str(weights))
    except Exception as error:
        print(f"NO CERTIFICATE: {type(error).__name__}: {error}"[:500])
        return 2
    if not good:
        print("INVALID")
        return 1
    if claims:
        print(f"PROVED IN PART: {claims} factors are only claimed")
        return 3
    print("VALID")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

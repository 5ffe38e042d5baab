"""Check a Lipschitz certificate: python tools/check_certificate.py certificate.npz [weights.safetensors].

Every chain is evaluated anew with the multipliers in the file, by numpy alone, roundings added; neither the optimiser
nor the package is needed. With the weights, their hash is compared. Factors without a chain are named, not proved.
"""
# ruff: noqa: ANN001, ANN201, D103, PLR0913

import hashlib
import json
import math
import sys

import numpy as np

U = 2.0**-53


def gamma(k):
    return 1.0000001 * 16 * k * U  # 16: complex arithmetic, and both a product and its sums


def norm(A):
    return float(np.sqrt((abs(A) ** 2).sum((1, 2)).max(initial=0.0))) * (1 + 1e-9)


def largest_eigenvalue(H):
    """s + c with a Cholesky factorisation of s I - H that exists: an upper bound (Rump 2006)."""
    n, slack = H.shape[1], 8 * H.shape[1] * U * max(norm(H), 1e-300)
    s = float(np.linalg.eigvalsh(H).max())
    while True:
        try:
            np.linalg.cholesky((s + slack) * np.eye(n) - H)
            return s + slack + gamma(n + 2) * (n * (abs(s) + slack) + norm(H) * n)
        except np.linalg.LinAlgError:
            slack *= 4


def congruence(A, error, Q):
    """A Q A^* and a bound of its error, A being known up to ``error``."""
    S = A @ Q @ A.conj().swapaxes(1, 2)
    relative = gamma(2 * A.shape[2] + 4)
    return (S + S.conj().swapaxes(1, 2)) / 2, (relative * norm(A) ** 2 + (2 * norm(A) + error) * error) * norm(Q)


def step(Q, keep, W, lower, upper, D, error):
    """[keep state; sigma(W state)]: Q' = [[P, 0], [0, R^2 D - M^2 D]] + V^* (D - S)^-1 V, V = [C, D M], enlarged."""
    k, n, M, R = keep.shape[1], W.shape[1], (lower + upper) / 2, (upper - lower) / 2
    A = np.concatenate([np.broadcast_to(part, (max(len(keep), len(W)), *part.shape[1:])) for part in (keep, W)], 1)
    T, e = congruence(A, error, Q)
    e += 8 * U * (abs(T).max(initial=0) + D.max(initial=0))
    if not n:
        return T + 2 * e * np.eye(k)
    N = np.diag(D) - T[:, k:, k:] - 2 * e * np.eye(n)
    least = -largest_eigenvalue(-N)
    if not least > 0:
        raise ValueError("the multipliers prove nothing")
    V = np.concatenate([T[:, k:, :k], np.broadcast_to(np.diag(D * M), (len(T), n, n))], 2)
    X = np.linalg.solve(N, V)
    new = V.conj().swapaxes(1, 2) @ X + X.conj().swapaxes(1, 2) @ (E := V - N @ X)
    new[:, :k, :k] += T[:, :k, :k] + 2 * e * np.eye(k)
    new[:, range(k, k + n), range(k, k + n)] += (R * R - M * M) * D
    unseen = gamma(n + 4) * (norm(N) * norm(X) + norm(V))
    slack = gamma(n + 4) * norm(X) * (norm(V) + norm(E)) + unseen * (norm(X) + 2 * (norm(E) + unseen) / least)
    slack += norm(E) ** 2 / least + 16 * U * (norm(T) + float((D * (M * M + R * R)).max(initial=0)) + norm(new))
    return (new + new.conj().swapaxes(1, 2)) / 2 + slack * (1 + 1e-9) * np.eye(k + n)


def chain_bound(file, name, entry):
    Q = np.eye(entry["size"])[None]
    for k, error in enumerate(entry["errors"]):
        parts = [file[f"{name}.{k}.{key}"] for key in ("keep", "weight", "lower", "upper", "multipliers")]
        Q = step(Q, *parts, float.fromhex(error))
    S, e = congruence(file[f"{name}.output"], float.fromhex(entry["error"]), Q)
    return math.sqrt(max(largest_eigenvalue(S) + e, 0.0)) * (1 + 4 * U)


def main(path, weights=None):
    file = np.load(path, allow_pickle=False)
    header, good = json.loads(file["header"].tobytes()), True
    for side in ("forward", "inverse"):
        for k, entry in enumerate(header[side]):
            claimed = float.fromhex(entry["bound"])
            proved = chain_bound(file, f"{side}.{k}", entry) if entry["chain"] else "closed form, not proved here"
            good &= not entry["chain"] or proved <= claimed * (1 + 1e-6)
            print(f"{side}, layers {entry['layers']}: claimed {claimed:.10g}, proved {proved}")
    if weights is not None:
        from safetensors.numpy import load_file

        total = hashlib.sha256()
        for name, array in sorted(load_file(weights).items()):
            total.update(f"{name} {array.shape} torch.{array.dtype}".encode() + array.tobytes())
        good &= total.hexdigest() == header["weights"]
        print("weights:", "those" if total.hexdigest() == header["weights"] else "NOT those", "of the certificate")
    print("VALID" if good else "INVALID")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

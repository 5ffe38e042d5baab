"""Check a Lipschitz certificate: python tools/check_certificate.py certificate.npz [weights.safetensors]

Every chain is evaluated anew with the multipliers in the file, by numpy alone, roundings added; the optimiser, torch and
the package are not needed. With the weights, their hash is compared, and the chains' matrices are looked for in them.
"""

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


def adjoint(A):
    return np.conj(np.swapaxes(A, 1, 2))


def eye(n, value):
    return value * np.eye(n)[None]


def largest_eigenvalue(H):
    """s + c with a Cholesky factorisation of s I - H that exists: an upper bound (Rump 2006)."""
    n, slack = H.shape[1], 8 * H.shape[1] * U * max(norm(H), 1e-300)
    s = float(np.linalg.eigvalsh(H).max())
    while True:
        try:
            np.linalg.cholesky(eye(n, s + slack) - H)
            return s + slack + gamma(n + 2) * (n * (abs(s) + slack) + norm(H) * n)
        except np.linalg.LinAlgError:
            slack *= 4


def congruence(A, error, Q):
    """A Q A^* and a bound of its error, A being known up to ``error``."""
    return A @ Q @ adjoint(A), (gamma(2 * A.shape[2] + 4) * norm(A) ** 2 + (2 * norm(A) + error) * error) * norm(Q)


def step(Q, keep, W, lower, upper, D, error):
    """[kept; sigma(W state)]: Q' = [[P, 0], [0, R^2 D - M^2 D]] + V^* (D - S)^-1 V, V = [C, D M], everything enlarged."""
    k, n, M, R = len(keep), W.shape[1], (lower + upper) / 2, (upper - lower) / 2
    A = np.concatenate([np.broadcast_to(np.eye(Q.shape[1])[keep], (len(W), k, Q.shape[1])), W], 1)
    T, e = congruence(A, error, Q)
    T, e = (T + adjoint(T)) / 2, e + 8 * U * (abs(T).max(initial=0) + D.max(initial=0))
    N = np.diag(D) - T[:, k:, k:] - eye(n, 2 * e)
    least = -largest_eigenvalue(-N)
    if not least > 0:
        raise ValueError("the multipliers prove nothing")
    V = np.concatenate([T[:, k:, :k], np.broadcast_to(np.diag(D * M), (len(T), n, n))], 2)
    X = np.linalg.solve(N, V)
    E = V - N @ X
    new = adjoint(V) @ X + adjoint(X) @ E
    new[:, :k, :k] += T[:, :k, :k] + eye(k, 2 * e)
    new[:, range(k, k + n), range(k, k + n)] += (R * R - M * M) * D
    unseen = gamma(n + 4) * (norm(N) * norm(X) + norm(V))
    slack = gamma(n + 4) * norm(X) * (norm(V) + norm(E)) + unseen * (norm(X) + 2 * (norm(E) + unseen) / least)
    slack += norm(E) ** 2 / least + 16 * U * (norm(T) + float((D * (M * M + R * R)).max(initial=0)) + norm(new))
    return (new + adjoint(new)) / 2 + eye(k + n, slack * (1 + 1e-9))


def chain_bound(file, name, entry):
    Q = eye(entry["size"], 1.0)
    for k, error in enumerate(entry["errors"]):
        parts = [file[f"{name}.{k}.{key}"] for key in ("keep", "weight", "lower", "upper", "multipliers")]
        Q = step(Q, *parts, float.fromhex(error))
    S, e = congruence(file[f"{name}.output"], float.fromhex(entry["error"]), Q)
    return math.sqrt(max(largest_eigenvalue((S + adjoint(S)) / 2) + e, 0.0)) * (1 + 4 * U)


def digest(weights):
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(f"{name} {weights[name].shape} torch.{weights[name].dtype}".encode() + weights[name].tobytes())
    return total.hexdigest()


def main(path, weights=None):
    file = np.load(path, allow_pickle=False)
    header, good = json.loads(file["header"].tobytes()), True
    for side in ("forward", "inverse"):
        total, trusted = 1.0, 0
        for k, entry in enumerate(header[side]):
            bound = float.fromhex(entry["bound"])
            if entry["chain"]:
                own = chain_bound(file, f"{side}.{k}", entry)
                good &= own <= bound * (1 + 1e-6)
                print(f"{side} layers {entry['layers']}: claimed {bound:.10g}, proved {own:.10g}")
            trusted += not entry["chain"]
            total *= own if entry["chain"] else bound
        print(f"{side}: product {total:.6g}; {trusted} factor(s) are closed forms of single layers, not proved here")
    if weights is not None:
        from safetensors.numpy import load_file

        same = digest(load_file(weights)) == header["weights"]
        print("weights:", "those of the certificate" if same else "NOT those of the certificate")
        good &= same
    print("VALID" if good else "INVALID")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

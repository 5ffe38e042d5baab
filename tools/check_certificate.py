"""Check a Lipschitz certificate: python tools/check_certificate.py certificate.npz [weights.safetensors].

Every chain is evaluated anew with the multipliers in the file, by numpy alone, roundings added; neither the optimiser
nor the package is needed. With the weights, their hash is compared. Exit code: 0 all of it is proved; 1 something is
wrong; 2 the file is no certificate, or damaged; 3 what has a chain is proved, but factors without one are only claimed.
"""
# ruff: noqa: ANN001, ANN201, D103, PLR0913

import math
import sys

import numpy as np
from certificate_file import factors, numbers, read

U = 2.0**-53


def gamma(k):
    return 1.0000001 * 16 * k * U  # 16: complex arithmetic, and both a product and its sums


def norm(A):
    return float(np.sqrt((abs(A) ** 2).sum((1, 2)).max(initial=0.0))) * (1 + 1e-9)


def largest_eigenvalue(H):
    """s + c with a Cholesky factorisation of s I - H that exists: an upper bound (Rump 2006)."""
    n, slack = H.shape[1], 8 * H.shape[1] * U * max(norm(H), 1e-300)
    s = float(np.linalg.eigvalsh(H).max())
    while math.isfinite(s + slack):
        try:
            np.linalg.cholesky((s + slack) * np.eye(n) - H)
            return s + slack + gamma(n + 2) * (n * (abs(s) + slack) + norm(H) * n)
        except np.linalg.LinAlgError:
            slack *= 4
    return math.inf


def congruence(A, error, Q):
    """A Q A^* and a bound of its error, A being known up to ``error``."""
    S = A @ Q @ A.conj().swapaxes(1, 2)
    relative = gamma(2 * A.shape[2] + 4)
    return (S + S.conj().swapaxes(1, 2)) / 2, (
        relative * norm(A) ** 2 + (2 * norm(A) + error) * error
    ) * norm(Q)


def step(Q, keep, W, lower, upper, D, error):
    """[keep state; sigma(W state)]: Q' = [[P, 0], [0, R^2 D - M^2 D]] + V^* (D - S)^-1 V, V = [C, D M], enlarged."""
    k, n, M, R = keep.shape[1], W.shape[1], (lower + upper) / 2, (upper - lower) / 2
    A = np.concatenate(
        [np.broadcast_to(part, (max(len(keep), len(W)), *part.shape[1:])) for part in (keep, W)], 1
    )
    T, e = congruence(A, error, Q)
    e += 8 * U * (abs(T).max(initial=0) + D.max(initial=0))
    if not n:
        return T + 2 * e * np.eye(k)
    N = np.diag(D) - T[:, k:, k:] - 2 * e * np.eye(n)
    least = -largest_eigenvalue(-N)
    if not least > 0:
        raise ArithmeticError("the multipliers prove nothing")
    V = np.concatenate([T[:, k:, :k], np.broadcast_to(np.diag(D * M), (len(T), n, n))], 2)
    X = np.linalg.solve(N, V)
    new = V.conj().swapaxes(1, 2) @ X + X.conj().swapaxes(1, 2) @ (E := V - N @ X)
    new[:, :k, :k] += T[:, :k, :k] + 2 * e * np.eye(k)
    new[:, range(k, k + n), range(k, k + n)] += (R * R - M * M) * D
    unseen = gamma(n + 4) * (norm(N) * norm(X) + norm(V))
    slack = gamma(n + 4) * norm(X) * (norm(V) + norm(E)) + unseen * (
        norm(X) + 2 * (norm(E) + unseen) / least
    )
    slack += norm(E) ** 2 / least + 16 * U * (
        norm(T) + float((D * (M * M + R * R)).max(initial=0)) + norm(new)
    )
    return (new + new.conj().swapaxes(1, 2)) / 2 + slack * (1 + 1e-9) * np.eye(k + n)


def proved(file, name, entry):
    steps, output, errors = numbers(file, name, entry)
    Q = np.eye(entry["size"])[None]
    try:
        for parts, error in zip(steps, errors, strict=False):
            Q = step(Q, *parts, error)
        Q, e = congruence(output, errors[-1], Q)
        return math.sqrt(max(largest_eigenvalue(Q) + e, 0.0)) * (1 + 4 * U)
    except (ArithmeticError, np.linalg.LinAlgError):
        return math.inf


@np.errstate(all="ignore")
def main(path, weights=None):
    unproved = 0
    try:
        file, header, good = read(path, weights)
        for side in ("forward", "inverse"):
            for k, (entry, claimed) in enumerate(factors(header, side)):
                bound = (
                    proved(file, f"{side}.{k}", entry) if (chain := entry["chain"]) else "nothing"
                )
                good, unproved = (
                    good and (not chain or bound <= claimed * (1 + 1e-6)),
                    unproved + (not chain),
                )
                print(f"{side}, layers {entry['layers']}: claimed {claimed:.10g}, proved {bound}")
    except Exception as error:
        print(f"NO CERTIFICATE: {type(error).__name__}: {error}"[:500])
        return 2
    print(
        "INVALID"
        if not good
        else f"PROVED IN PART: {unproved} factors are only claimed"
        if unproved
        else "VALID"
    )
    return 1 if not good else 3 if unproved else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

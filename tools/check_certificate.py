"""Check a Lipschitz certificate: python tools/check_certificate.py certificate.npz [weights.safetensors].

Every chain is evaluated anew with the multipliers in the file, by numpy alone, roundings added; neither the optimiser
nor the package is needed. With the weights, their hash is compared. Exit code: 0 all of it is proved; 1 something is
wrong; 2 the file is no certificate, or damaged; 3 what has a chain is proved, but factors without one are only claimed.
"""
# ruff: noqa: ANN001, ANN201, D103, PLR0913

import hashlib
import json
import math
import sys
import zipfile

import numpy as np

U = 2.0**-53
FORMAT = "inn_guard Lipschitz certificate 2"


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
        raise ArithmeticError("the multipliers prove nothing")
    V = np.concatenate([T[:, k:, :k], np.broadcast_to(np.diag(D * M), (len(T), n, n))], 2)
    X = np.linalg.solve(N, V)
    new = V.conj().swapaxes(1, 2) @ X + X.conj().swapaxes(1, 2) @ (E := V - N @ X)
    new[:, :k, :k] += T[:, :k, :k] + 2 * e * np.eye(k)
    new[:, range(k, k + n), range(k, k + n)] += (R * R - M * M) * D
    unseen = gamma(n + 4) * (norm(N) * norm(X) + norm(V))
    slack = gamma(n + 4) * norm(X) * (norm(V) + norm(E)) + unseen * (norm(X) + 2 * (norm(E) + unseen) / least)
    slack += norm(E) ** 2 / least + 16 * U * (norm(T) + float((D * (M * M + R * R)).max(initial=0)) + norm(new))
    return (new + new.conj().swapaxes(1, 2)) / 2 + slack * (1 + 1e-9) * np.eye(k + n)


def expect(true, what):
    if not true:
        raise ValueError(f"expected {what}")


def double(A):
    return A.dtype in (np.float64, np.complex128) and np.isfinite(A).all()


def numbers(file, name, entry):
    """A chain's arrays and errors, refused where they do not fit or could make a false proof pass."""
    errors = [float.fromhex(error) for error in (*entry["errors"], entry["error"])]
    expect(all(0 <= error < math.inf for error in errors), "finite errors of at least 0")
    width, steps = int(entry["size"]), []
    for k in range(len(errors) - 1):
        parts = [file[f"{name}.{k}.{key}"] for key in ("keep", "weight", "lower", "upper", "multipliers")]
        keep, W, lower, upper, D = parts
        expect(all(A.ndim == 3 and A.shape[2] == width <= 2**15 for A in (keep, W)), f"matrices on {width} entries")
        expect(all(v.shape == W.shape[1:2] for v in parts[2:]), "a slope and a multiplier for every neuron")
        expect(all(double(A) for A in parts), "finite numbers of double precision")
        expect((D > 0).all() and (lower <= upper).all(), "positive multipliers, slopes from lower to upper")
        width = keep.shape[1] + W.shape[1]
        steps.append(parts)
    output = file[f"{name}.output"]
    expect(output.ndim == 3 and output.shape[2] == width <= 2**15, f"an output of {width} entries")
    expect(double(output), "a finite output of double precision")
    return steps, output, errors


def chain_bound(file, name, entry):
    steps, output, errors = numbers(file, name, entry)
    Q = np.eye(entry["size"])[None]
    for parts, error in zip(steps, errors, strict=False):
        Q = step(Q, *parts, error)
    S, e = congruence(output, errors[-1], Q)
    return math.sqrt(max(largest_eigenvalue(S) + e, 0.0)) * (1 + 4 * U)


def proved_bound(file, name, entry):
    try:
        return chain_bound(file, name, entry)
    except (ArithmeticError, np.linalg.LinAlgError):
        return math.inf


def checked(file, header, side):
    """(whether all chains hold, factors without a chain, layers covered) of one direction."""
    good, open_, at = True, 0, 0
    for k, entry in enumerate(header[side]):
        first, last = entry["layers"]
        claimed = float.fromhex(entry["bound"])
        expect(first == at < last and claimed >= 0, f"a factor from layer {at} on, of a bound of at least 0")
        at, open_ = last, open_ + (not entry["chain"])
        proved = proved_bound(file, f"{side}.{k}", entry) if entry["chain"] else "closed form, not proved here"
        good &= not entry["chain"] or proved <= claimed * (1 + 1e-6)
        print(f"{side}, layers {entry['layers']}: claimed {claimed:.10g}, proved {proved}")
    return good, open_, at


@np.errstate(all="ignore")
def main(path, weights=None):
    try:
        expect(sum(member.file_size for member in zipfile.ZipFile(path).infolist()) < 2**33, "less than 8 GiB")
        file = np.load(path, allow_pickle=False)
        header = json.loads(file["header"].tobytes())
        expect(header["format"] == FORMAT and isinstance(header["weights"], str), f"the format {FORMAT!r}")
        expect(all(isinstance(bound, float) for bound in header["leaves"].values()), "bounds of leaves as numbers")
        sides = [checked(file, header, side) for side in ("forward", "inverse")]
        expect(sides[0][2] == sides[1][2] > 0, "the same layers in both directions")
    except Exception as error:
        print(f"NO CERTIFICATE: {type(error).__name__}: {error}"[:500])
        return 2
    good, unproved = sides[0][0] and sides[1][0], sides[0][1] + sides[1][1]
    if weights is not None:
        from safetensors.numpy import load_file

        total = hashlib.sha256()
        for name, array in sorted(load_file(weights).items()):
            total.update(f"{name} {array.shape} torch.{array.dtype}".encode() + array.tobytes())
        good &= total.hexdigest() == header["weights"]
        print("weights:", "those" if total.hexdigest() == header["weights"] else "NOT those", "of the certificate")
    if good and unproved:
        print(f"PROVED IN PART: {unproved} factors are only claimed")
        return 3
    print("VALID" if good else "INVALID")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Certificate files read with distrust: what is damaged, huge or could make a false proof pass is refused."""
# ruff: noqa: ANN001, ANN201, D103

import hashlib
import json
import math
import zipfile

import numpy as np

FORMAT = "inn_guard Lipschitz certificate 2"


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
        parts = [
            file[f"{name}.{k}.{key}"] for key in ("keep", "weight", "lower", "upper", "multipliers")
        ]
        keep, W, lower, upper, D = parts
        expect(
            all(A.ndim == 3 and A.shape[2] == width <= 2**15 for A in (keep, W)),
            f"matrices on {width} entries",
        )
        expect(
            all(v.shape == W.shape[1:2] for v in parts[2:]),
            "a slope and a multiplier for every neuron",
        )
        expect(all(double(A) for A in parts), "finite numbers of double precision")
        expect(
            (D > 0).all() and (lower <= upper).all(),
            "positive multipliers, slopes from lower to upper",
        )
        width = keep.shape[1] + W.shape[1]
        steps.append(parts)
    output = file[f"{name}.output"]
    expect(output.ndim == 3 and output.shape[2] == width <= 2**15, f"an output of {width} entries")
    expect(double(output), "a finite output of double precision")
    return steps, output, errors


def factors(header, side):
    """The factors of one direction and their claims; they must follow each other from the first layer on."""
    at = 0
    for entry in header[side]:
        (first, last), claimed = entry["layers"], float.fromhex(entry["bound"])
        expect(
            first == at < last and claimed >= 0,
            f"a factor from layer {at} on, of a bound of at least 0",
        )
        at = last
        yield entry, claimed


def read(path, weights):
    """The arrays, the header with what it says of itself checked, and whether the weights, if given, are its own."""
    expect(
        sum(member.file_size for member in zipfile.ZipFile(path).infolist()) < 2**33,
        "less than 8 GiB",
    )
    file = np.load(path, allow_pickle=False)
    header = json.loads(file["header"].tobytes())
    expect(
        header["format"] == FORMAT and isinstance(header["weights"], str), f"the format {FORMAT!r}"
    )
    expect(
        all(isinstance(bound, float) for bound in header["leaves"].values()),
        "bounds of leaves as numbers",
    )
    layers = {
        sum(entry["layers"][1] - entry["layers"][0] for entry in header[side])
        for side in ("forward", "inverse")
    }
    expect(len(layers) == 1 and 0 not in layers, "the same layers in both directions")
    if weights is None:
        return file, header, True
    same = weights_hash(weights) == header["weights"]
    print("weights:", "those" if same else "NOT those", "of the certificate")
    return file, header, same


def weights_hash(path):
    from safetensors.numpy import load_file

    total = hashlib.sha256()
    for name, array in sorted(load_file(path).items()):
        total.update(f"{name} {array.shape} torch.{array.dtype}".encode() + array.tobytes())
    return total.hexdigest()

"""What every experiment shares: presets, rows that survive a kill, and results with all that repeating them takes.

An experiment is a module with

* ``Config``: a frozen dataclass with the class methods ``smoke()`` (seconds), ``cpu()`` (minutes on two cores) and,
  where it makes sense, ``paper()`` (the paper's setting, for a GPU);
* ``run(config) -> DataFrame``, most simply ``return collect(config, cases(config), measure)``;
* optionally ``draw(frame) -> Figure``;
* optionally ``beside_paper(frame) -> DataFrame``: the paper's numbers and ours in one table;

and ends with ``if __name__ == "__main__": main(Config, run, draw)``. Its row in ``experiments.py`` makes it known to
``inn-guard bench``. Where the configuration has a folder of data, the checksums of its files are part of the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import hashlib
import importlib.metadata
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.common.experiments import EXPERIMENTS
from benchmarks.common.image_files import MissingData, file_checksums
from inn_guard.execution.files import atomic_write

__all__ = ["PRESETS", "RESULTS", "Row", "collect", "main", "write_results"]

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results"
UNFINISHED = Path("runs")
PRESETS = ("smoke", "cpu", "paper")
PACKAGES = ("torch", "numpy", "nflows", "FrEIA", "normflows", "zuko", "memcnn", "scikit-learn")


def collect(
    config: Any, cases: Mapping[str, Any], measure: Callable[[Any, Any], Iterable[Row]]
) -> pd.DataFrame:
    """Rows of every case, one case after the other; a case that was finished before a kill is not run again.

    Args:
        config: the experiment's frozen dataclass; it names the file of finished cases.
        cases: key -> case. Keys must tell the cases apart from one run to the next.
        measure: (config, case) -> its rows.

    Returns:
        one line per row, in the order of the cases, with the key in the column ``case``.
    """
    path = UNFINISHED / f"{_name(config)}-{_digest(config)}.jsonl"
    finished = _read_finished(path)
    with tqdm(cases.items(), desc=_name(config), unit="case", disable=None) as bar:
        for key, case in bar:
            bar.set_postfix_str(key)
            if key not in finished:
                finished[key] = [dict(row) for row in measure(config, case)]
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    # the empty line ends whatever a kill cut short before
                    file.write(
                        "\n"
                        + json.dumps({"case": key, "rows": finished[key]}, default=_plain)
                        + "\n"
                    )
    frame = pd.DataFrame([{"case": key, **row} for key in cases for row in finished[key]])
    path.unlink(missing_ok=True)
    return frame


def write_results(name: str, frame: pd.DataFrame, config: Any, *, folder: Path = RESULTS) -> Path:
    """``name``.csv, and beside it ``name``.json with the configuration, versions and machine that gave it."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"{name}.csv"
    with atomic_write(table) as partial:
        frame.to_csv(partial, index=False, float_format="%.6g")
    with atomic_write(folder / f"{name}.json") as partial:
        said = {"config": _fields(config), "data": data_checksums(config), **environment()}
        partial.write_text(json.dumps(said, indent=1, default=_plain) + "\n")
    return table


def data_checksums(config: Any) -> dict[str, str]:
    """File name -> sha256 of the official files that a configuration with a folder (and a data set's name) reads."""
    root = getattr(config, "data_root", "") or getattr(config, "root", "")
    name = getattr(config, "data", "") or getattr(config, "dataset", "")
    return file_checksums(Path(root), name) if root else {}


def environment() -> dict[str, Any]:
    """Versions, processor count and accelerator of this run."""
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in PACKAGES if name in installed},
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def main(
    config_class: Any,
    run: Callable[[Any], pd.DataFrame],
    draw: Callable[[pd.DataFrame], Figure] | None = None,
    argv: list[str] | None = None,
) -> None:
    """The command line of one experiment: --preset smoke | cpu | paper, --out FOLDER, and one flag per field.

    Ends with exit code 2 and the command that fetches it where a data set is missing.
    """
    parser = _parser(config_class, sys.modules[run.__module__])
    arguments = vars(parser.parse_args(argv))
    preset, out = arguments.pop("preset"), arguments.pop("out")
    config = _configured(parser, getattr(config_class, preset)(), arguments)
    folder = out or (UNFINISHED if preset == "smoke" else RESULTS)
    _check_writable(parser, folder)
    try:
        frame = run(config)
    except MissingData as error:
        parser.exit(2, f"error: {error}\n")
    name = _name(config) if preset == "cpu" else f"{_name(config)}_{preset}"
    table = write_results(name, frame, config, folder=folder)
    print(frame.to_string(index=False))
    print(beside_paper(frame, run))
    for file, digest in data_checksums(config).items():
        print(f"data: {file}, sha256 {digest}")
    print(f"written: {table}")
    if draw is not None:
        with atomic_write(table.with_suffix(".png")) as partial:
            draw(frame).savefig(partial, dpi=110, bbox_inches="tight", format="png")
        print(f"drawn: {table.with_suffix('.png')}")


def beside_paper(frame: pd.DataFrame, run: Callable[[Any], pd.DataFrame]) -> str:
    """Theirs and ours by the script's own ``beside_paper``, else the paper's table as it is; "" without one."""
    module = sys.modules[run.__module__]
    if hasattr(module, "beside_paper"):
        return f"\nThe paper's numbers and ours:\n{module.beside_paper(frame).to_string(index=False)}\n"
    known = [one for one in EXPERIMENTS if one.reference and one.stem == _stem(run.__module__)]
    return "".join(
        f"\nThe paper's numbers ({one.paper}; reference/{one.reference}):\n{one.published().to_string(index=False)}\n"
        for one in known
    )


def _parser(config_class: Any, module: Any) -> argparse.ArgumentParser:
    presets = [preset for preset in PRESETS if hasattr(config_class, preset)]
    first_line = (module.__doc__ or "").strip().splitlines()
    parser = argparse.ArgumentParser(
        description=" ".join(first_line[:1]), prog=_stem(module.__name__)
    )
    parser.add_argument(
        "--preset", choices=presets, default="cpu" if "cpu" in presets else presets[-1]
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder for the CSV, its JSON and the figure; {RESULTS} if not given",
    )
    for field in dataclasses.fields(config_class):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=f"{field.type}"
        )
    return parser


def _configured(parser: argparse.ArgumentParser, preset: Any, flags: Mapping[str, str]) -> Any:
    """The preset with what was typed in place of its values; ends with exit code 2 where that is none of their type."""
    values = {}
    for key, text in flags.items():
        try:
            values[key] = _parsed(preset, key, text)
        except (ValueError, KeyError):
            flag, like = key.replace("_", "-"), getattr(preset, key)
            parser.error(f"argument --{flag}: expected something like {like!r}; got {text!r}")
    try:
        return dataclasses.replace(preset, **values)
    except ValueError as error:
        parser.error(str(error))


def _check_writable(parser: argparse.ArgumentParser, folder: Path) -> None:
    """End with exit code 2 before hours of work, rather than after them, where their results could not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        parser.error(
            f"argument --out: expected a folder that can be written to; got {folder}: {error.strerror}"
        )


def _name(config: Any) -> str:
    """The experiment's folder and file, joined: injflow_table1."""
    return _stem(type(config).__module__)


def _stem(module: str) -> str:
    if module != "__main__":
        return module.removeprefix(f"{__package__}.").replace(".", "_")
    return "_".join(
        Path(sys.argv[0]).resolve().relative_to(Path(__file__).parents[1]).with_suffix("").parts
    )


def _digest(config: Any) -> str:
    return hashlib.sha256(
        json.dumps(_fields(config), sort_keys=True, default=_plain).encode()
    ).hexdigest()[:12]


def _fields(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    return value.item() if hasattr(value, "item") else str(value)


def _parsed(config: Any, key: str, text: str) -> Any:
    """``text`` as the type of the preset's value: numbers as numbers, tuples comma by comma."""
    current = getattr(config, key)
    if isinstance(current, bool):
        return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[
            text.lower()
        ]
    if isinstance(current, tuple):
        kind = type(current[0]) if current else str
        return tuple(kind(part) for part in text.split(",") if part)
    return type(current)(text) if current is not None else text


def _read_finished(path: Path) -> dict[str, list[Row]]:
    """Cases that were written whole; a line that a kill cut short, or that is none of ours, is ignored."""
    finished: dict[str, list[Row]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            finished[str(entry["case"])] = [dict(row) for row in entry["rows"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return finished

"""What all experiments share: presets, rows that survive a kill, reproducible results.

An experiment is a module with

* ``Config``: a frozen dataclass of everything that can be chosen;
* ``PRESETS``: preset -> the fields in which it differs from the defaults. ``smoke`` takes seconds,
  ``cpu`` minutes on two cores; ``paper``, where there is one, is the paper's setting, for a GPU;
* ``run(config) -> DataFrame``, most simply ``return collect(config, cases(config), measure)``;
* optionally ``draw(frame) -> Figure``;
* optionally ``compare_with_paper(frame) -> DataFrame``: the paper's numbers and ours in one table;

and ends with ``if __name__ == "__main__": main(__name__)``. Its row in ``experiments.py`` makes it
known to ``inn-guard bench``. The results of a configuration that names a folder of data include the
checksums of the files.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.common.experiments import EXPERIMENTS
from benchmarks.common.figures import save_figure
from benchmarks.common.image_files import MissingData, file_checksums
from inn_guard.execution.files import atomic_write

__all__ = [
    "RESULTS",
    "Row",
    "collect",
    "command",
    "configured",
    "keyed",
    "main",
    "preset",
    "stem",
    "write_results",
]

Row = dict[str, Any]
BENCHMARKS = Path(__file__).parents[1]
RESULTS = BENCHMARKS / "results"
UNFINISHED = Path("runs")  #: of the current folder: finished cases of runs, and smoke results
DEFAULT_FOLDERS = {"smoke": UNFINISHED}  #: preset -> where its results go, if not to RESULTS
BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
PACKAGES = ("torch", "numpy", "nflows", "FrEIA", "normflows", "zuko", "memcnn", "scikit-learn")


def preset(script: ModuleType, name: str) -> Any:
    """The ``Config`` of one of a script's presets."""
    return script.Config(**script.PRESETS[name])


def collect(
    config: Any,
    cases: Mapping[str, Any] | Iterable[str],
    measure: Callable[[Any, Any], Iterable[Row]],
) -> pd.DataFrame:
    """Rows of every case, one case after the other.

    A finished case is written to a file, so that a run that is started again after a kill skips it.

    Args:
        config: the experiment's frozen dataclass; it determines the name of that file.
        cases: key -> case, or cases that are their own keys. The keys must be the same in every
            run.
        measure: (config, case) -> its rows.

    Returns:
        one line per row, in the order of the cases, with the key in the column ``case``.
    """
    if not isinstance(cases, Mapping):
        cases = {key: key for key in cases}
    name = stem(type(config).__module__)
    path = UNFINISHED / f"{name}-{_digest(config)}.jsonl"
    finished = _read_finished(path)
    with tqdm(cases.items(), desc=name, unit="case", disable=None) as bar:
        for key, case in bar:
            bar.set_postfix_str(key)
            if key not in finished:
                finished[key] = [dict(row) for row in measure(config, case)]
                _append_case(path, key, finished[key])
    rows = []
    for key in cases:
        rows += [{"case": key, **row} for row in finished[key]]
    path.unlink(missing_ok=True)
    return pd.DataFrame(rows)


def keyed(form: str, cases: Iterable[Any]) -> dict[str, Any]:
    """Cases with keys of one form.

    >>> keyed("{} blocks", (1, 2))
    {'1 blocks': 1, '2 blocks': 2}
    """
    return {form.format(case): case for case in cases}


def command(script: ModuleType, preset_name: str, config: Any) -> str:
    """The shortest command line that runs this configuration."""
    usual = preset(script, preset_name)
    words = ["inn-guard", "bench", _name(script.__name__), "--preset", preset_name]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != getattr(usual, field.name):
            words += [_flag(field.name), _text(value)]
    return shlex.join(words)


def configured(script: ModuleType, words: Sequence[str]) -> Any:
    """The ``Config`` that the words of a command line behind the experiment's name choose."""
    parser = _parser(script)
    flags = vars(parser.parse_args(words))
    chosen, _ = flags.pop("preset"), flags.pop("out")
    return _configured(parser, preset(script, chosen), flags)


def write_results(
    name: str, frame: pd.DataFrame, config: Any, *, command: str, folder: Path = RESULTS
) -> Path:
    """Write ``name``.csv and ``name``.json.

    The latter has the command, the configuration with its seeds, checksums of the data, and the
    versions and machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"{name}.csv"
    with atomic_write(table) as partial:
        frame.to_csv(partial, index=False, float_format="%.6g")
    origin = {
        "command": command,
        "config": dataclasses.asdict(config),
        "data": data_checksums(config),
        **environment(),
    }
    with atomic_write(folder / f"{name}.json") as partial:
        partial.write_text(json.dumps(origin, indent=1, default=_plain) + "\n")
    return table


def data_checksums(config: Any) -> dict[str, str]:
    """File name -> sha256 of the files of the data set that a configuration names."""
    root = getattr(config, "data_root", "") or getattr(config, "root", "")
    name = getattr(config, "data", "") or getattr(config, "dataset", "")
    if not root:
        return {}
    return file_checksums(Path(root), name)


def environment() -> dict[str, Any]:
    """Versions, number of threads and accelerator of this run."""
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    accelerator = "none"
    if torch.cuda.is_available():
        accelerator = torch.cuda.get_device_name()
    return {
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in PACKAGES if name in installed},
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
    }


def main(script_name: str, argv: list[str] | None = None) -> None:
    """The command line of one experiment: --preset, --out, and one flag per field of ``Config``.

    Ends with exit code 2 if a flag is wrong or a data set is missing; the message then has the
    command that fetches it.

    Args:
        script_name: of the script's imported module.
        argv: the arguments; default: those of the process.
    """
    script = sys.modules[script_name]
    parser = _parser(script)
    arguments = vars(parser.parse_args(argv))
    chosen, out = arguments.pop("preset"), arguments.pop("out")
    config = _configured(parser, preset(script, chosen), arguments)
    folder = out or DEFAULT_FOLDERS.get(chosen, RESULTS)
    _check_writable(parser, folder)
    try:
        frame = script.run(config)
    except MissingData as error:
        parser.exit(2, f"error: {error}\n")
    name = stem(script_name)
    if chosen != "cpu":
        name += f"_{chosen}"
    line = command(script, chosen, config)
    table = write_results(name, frame, config, command=line, folder=folder)
    print(frame.to_string(index=False))
    print(paper_comparison(script, frame))
    for file, digest in data_checksums(config).items():
        print(f"data: {file}, sha256 {digest}")
    print(f"written: {table}")
    if hasattr(script, "draw"):
        save_figure(script.draw(frame), table.with_suffix(".png"), dpi=110)
        print(f"drawn: {table.with_suffix('.png')}")


def paper_comparison(script: ModuleType, frame: pd.DataFrame) -> str:
    """The script's ``compare_with_paper``; without one the paper's table; "" without either."""
    if hasattr(script, "compare_with_paper"):
        table = script.compare_with_paper(frame)
        return f"\nThe paper's numbers and ours:\n{table.to_string(index=False)}\n"
    for one in EXPERIMENTS:
        if one.reference and one.stem == stem(script.__name__):
            title = f"The paper's numbers ({one.paper}; reference/{one.reference})"
            return f"\n{title}:\n{one.published().to_string(index=False)}\n"
    return ""


def _parser(script: ModuleType) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(script.__doc__ or "").strip().partition("\n")[0], prog=stem(script.__name__)
    )
    parser.add_argument("--preset", choices=list(script.PRESETS), default="cpu")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the CSV, its JSON and the figure; "
        f"default: {RESULTS}, or {UNFINISHED} for the preset smoke",
    )
    for field in dataclasses.fields(script.Config):
        parser.add_argument(_flag(field.name), default=argparse.SUPPRESS, help=str(field.type))
    return parser


def _configured(parser: argparse.ArgumentParser, config: Any, flags: Mapping[str, str]) -> Any:
    """The preset with the values of the flags; exit code 2 if one has the wrong type."""
    values = {}
    for key, text in flags.items():
        current = getattr(config, key)
        try:
            values[key] = _parsed(current, text)
        except (ValueError, KeyError):
            parser.error(
                f"argument {_flag(key)}: expected something like {current!r}; got {text!r}"
            )
    try:
        return dataclasses.replace(config, **values)
    except ValueError as error:
        parser.error(str(error))


def _check_writable(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Exit code 2 before hours of work if their results could not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        parser.error(
            "argument --out: expected a folder that can be written to; "
            f"got {folder}: {error.strerror}"
        )


def _name(module: str) -> str:
    """The experiment's folder and file: injflow.table1."""
    if module == "__main__":
        path = Path(sys.argv[0]).resolve().relative_to(BENCHMARKS)
        return ".".join(path.with_suffix("").parts)
    return module.removeprefix("benchmarks.")


def stem(module: str) -> str:
    """What the experiment's results are called: injflow_table1."""
    return _name(module).replace(".", "_")


def _digest(config: Any) -> str:
    text = json.dumps(dataclasses.asdict(config), sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    """What JSON can hold in place of an enum, a number of numpy or torch, or anything else."""
    if isinstance(value, enum.Enum):
        return value.name
    if hasattr(value, "item"):
        return value.item()
    return str(value)


def _parsed(current: Any, text: str) -> Any:
    """``text`` as the type of the preset's value; a tuple's items are separated by commas."""
    if current is None:
        return text
    if isinstance(current, bool):
        return BOOLEANS[text.lower()]
    if isinstance(current, tuple):
        kind = type(next(iter(current), ""))
        return tuple(kind(part) for part in text.split(",") if part)
    return type(current)(text)


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _text(value: Any) -> str:
    """What `_parsed` takes for the value."""
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value)


def _append_case(path: Path, key: str, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"case": key, "rows": rows}, default=_plain)
    with path.open("a") as file:
        # the line break before it ends a line that a kill cut short
        file.write(f"\n{line}\n")


def _read_finished(path: Path) -> dict[str, list[Row]]:
    """Completely written cases; a line that a kill cut short, or of other origin, is ignored."""
    finished: dict[str, list[Row]] = {}
    if not path.exists():
        return finished
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            finished[str(entry["case"])] = [dict(row) for row in entry["rows"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return finished

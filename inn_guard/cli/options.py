"""What several commands take: their options, and what the words given for them mean."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

from inn_guard.cli.usage import WrongUsage
from inn_guard.report.uses import USES

__all__ = [
    "LISTED_USES",
    "Arguments",
    "DataOption",
    "Details",
    "Device",
    "Html",
    "LimitsFile",
    "ModelOption",
    "Precision",
    "Prior",
    "Weights",
    "Words",
    "bytes_of",
    "device_named",
    "model_and_data",
    "names",
]

LISTED_USES = ", ".join(USES)

Words = Annotated[list[str] | None, typer.Argument(metavar="MODEL DATA", show_default=False)]
ModelOption = Annotated[str | None, typer.Option(help="MODEL, as an option.")]
DataOption = Annotated[Path | None, typer.Option(help="DATA, as an option.")]
Arguments = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="An argument of the factory; repeatable."),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="A safetensors file, a torch file of tensors, or a Lightning checkpoint."),
]
Prior = Annotated[
    str | None,
    typer.Option(metavar="MODULE:NAME", help="The distribution of z, if the model declares none."),
]
LimitsFile = Annotated[
    Path | None, typer.Option(help="A TOML file with limits, as density = 0.01.")
]
Html = Annotated[Path | None, typer.Option(help="Write the report as one web page.")]
Details = Annotated[
    bool, typer.Option("--details", help="Print every check with its figures, not only the uses.")
]
Device = Annotated[str, typer.Option(help="The device to compute on: cpu, cuda, cuda:1.")]


class Precision(str, enum.Enum):
    """The dtypes that a model can be audited in."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def dtype(self) -> torch.dtype:
        """The torch.dtype of this name."""
        return getattr(torch, self.value)


def model_and_data(
    words: Iterable[str] | None, model: str | None, data: Path | None
) -> tuple[str, Path | None]:
    """Both from the arguments, or from the options of the same names.

    Raises:
        WrongUsage: if no model is named, or there are more words than two.
    """
    left = list(words or [])
    if model is None and left:
        model = left.pop(0)
    if data is None and left:
        data = Path(left.pop(0))
    if model is None:
        raise WrongUsage("expected MODEL and DATA: inn-guard audit package.module:factory x.npy")
    if left:
        raise WrongUsage(f"expected MODEL and DATA, got more: {' '.join(left)}")
    return model, data


def names(text: str, option: str, known: Iterable[str]) -> list[str] | None:
    """The names between the commas; None if there are none.

    Raises:
        WrongUsage: if one of them is unknown.
    """
    given = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise WrongUsage(f"expected {option} out of {', '.join(known)}; got {', '.join(unknown)}")
    return given or None


def device_named(name: str) -> torch.device:
    """The device of that name, on which a tensor could be made.

    Raises:
        WrongUsage: if this machine has none.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise WrongUsage(f"expected a --device of this machine, got {name!r}: {first}") from error
    return device


def bytes_of(gibibytes: float | None) -> float | None:
    """``--memory`` in bytes.

    Raises:
        WrongUsage: if it is not positive and finite.
    """
    if gibibytes is None:
        return None
    if not 0 < gibibytes < float("inf"):
        raise WrongUsage(f"expected --memory as a positive number of GiB, got {gibibytes:g}")
    return gibibytes * 2**30

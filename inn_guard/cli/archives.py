"""Files of ``torch.save`` of unknown origin: how much memory they take, before they are read."""

from __future__ import annotations

import zipfile
from pathlib import Path

from inn_guard.cli.usage import WrongUsage

__all__ = ["check_archive"]

#: torch.save does not compress: what unpacks to more than this many times the file is a trap.
MOST_UNPACKED = 10
FREE = 2**24  #: bytes that any archive may unpack to


def check_archive(path: Path) -> None:
    """See to it that a zipped file unpacks to about its own size.

    Raises:
        WrongUsage: if it claims more, or its table of contents cannot be read.
    """
    if not zipfile.is_zipfile(path):
        return  # the older format of torch.save, whose tensors are read as they are
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise WrongUsage(f"{path} cannot be read as a file of torch.save: {error}") from error
    size = path.stat().st_size
    if unpacked > max(FREE, MOST_UNPACKED * size):
        raise WrongUsage(
            f"{path} has {size:,} bytes and unpacks to {unpacked:,}: expected a file as torch.save "
            "writes it, without compression; save it again"
        )

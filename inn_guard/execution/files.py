"""Writing files so that a crash leaves the old content or the new one, never a part of each."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_write"]


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file in the folder of ``path``, which replaces ``path`` when the block succeeds.

    After an error the temporary file is removed and ``path`` is unchanged. The content is flushed
    to the disk before the file is renamed. Where ``path`` is a symbolic link, the file that it
    points to is replaced. A device or a pipe (/dev/stdout) is written to directly.

    Args:
        path: the file to be written; its folder must exist.

    Yields:
        The path to write to, with the suffix of ``path``.

    Raises:
        FileNotFoundError: if the folder of ``path`` does not exist.
        IsADirectoryError: if ``path`` is a folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(Path(folder) / "a.txt") as partial:
    ...         _ = partial.write_text("whole")
    ...     [(file.name, file.read_text()) for file in Path(folder).iterdir()]
    [('a.txt', 'whole')]
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"expected the path of a file; got {path!r:.60}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"expected the path of a file, got the folder {path}")
    if Path(path).exists() and not Path(path).is_file():
        yield Path(path)
        return
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist; create it first")
    partial = target.with_name(f".{target.stem[:80]}.{secrets.token_hex(6)}{target.suffix}")
    try:
        yield partial
        _flush_to_disk(partial)
        _keep_mode(target, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _keep_mode(old: Path, new: Path) -> None:
    if old.exists():
        new.chmod(old.stat().st_mode & 0o7777)

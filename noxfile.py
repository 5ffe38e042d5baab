"""Tests in clean environments: every supported Python, the oldest and the newest supported torch.

nox                      # those of the Pythons that are found on this machine
nox -s "oldest-3.10"     # one of them
"""

from __future__ import annotations

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
OLDEST = {"torch": "2.6.0", "numpy": "1.26.4"}
OLDEST_PYTHONS = ["3.10", "3.11", "3.12"]  # numpy 1.26 has no wheels for 3.13

nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "uv|virtualenv"


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """What pip finds today."""
    session.install("-e", ".[all,dev]")
    _test(session)


@nox.session(python=OLDEST_PYTHONS)
def oldest(session: nox.Session) -> None:
    """The lower bounds of pyproject.toml; what else is installed is as new as they allow."""
    session.install(*(f"{name}=={version}" for name, version in OLDEST.items()), "-e", ".[all,dev]")
    _test(session)


def _test(session: nox.Session) -> None:
    session.install("--no-deps", "memcnn")
    session.run("python", "-m", "pytest", *session.posargs, env={"OMP_NUM_THREADS": "1"})

"""``python -m inn_guard`` is ``inn-guard``."""

from inn_guard.cli import main

if __name__ == "__main__":
    main()

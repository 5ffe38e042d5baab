"""What is known of layers, by their classes; a library's rules are loaded where the library is."""

import importlib
import sys

__all__ = ["load"]

LIBRARIES = {
    "nflows": "nflows",
    "FrEIA": "freia",
    "normflows": "normflows",
    "zuko": "zuko",
    "memcnn": "memcnn",
    "torchdiffeq": "ode",
}


def load() -> None:
    """Register the rules of our own layers and of every library that has been imported."""
    for name in (
        "layers",
        "models",
        "autoencoders",
        *(rules for library, rules in LIBRARIES.items() if library in sys.modules),
    ):
        importlib.import_module(f"inn_guard.lipschitz.rules.{name}")

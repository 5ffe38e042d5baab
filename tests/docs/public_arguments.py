"""Random arguments for every public function: what is wrong must be said in a way that helps.

    python -m tests.docs.public_arguments FIRST COUNT

prints the errors that do not say what was expected, and ends with exit code 1 if there are any. A
process of its own, because the types of arguments are checked in those of the tests.
"""

from __future__ import annotations

import math
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import inn_guard as ig
from inn_guard.core.missing import MissingContextError
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain

__all__ = ["CALLS", "Unclear", "unclear_errors"]

FEATURES = 3


def model() -> Chain:
    torch.manual_seed(0)
    return Chain(Diagonal(FEATURES)).float()


def data() -> torch.Tensor:
    return torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


class Odd:
    """An object of no use."""


#: what callers pass by mistake
JUNK: tuple[Callable[[], Any], ...] = (
    *(lambda value=value: value for value in (None, True, False, 0, 1, -1, 3, 10**12, 10**400)),
    *(lambda value=value: value for value in (0.5, -0.5, 2.0, 1e-9, 1e300, math.nan, math.inf)),
    *(lambda value=value: value for value in ("", "x", "quick", "density", "2e9", "a/b", "data")),
    *(lambda value=value: value for value in ((), (1,), (1, 2), b"bytes", range(3), int, print)),
    *(list, dict, set, Odd, object, model, data),
    *(lambda: [1, 2], lambda: ["density"], lambda: ["x", "y"], lambda: {"a": 1}, lambda: [None]),
    *(lambda: {"loss": 0.0}, lambda: lambda: None, lambda: lambda *given: None),
    *(lambda: lambda *given: 1 / 0, lambda: lambda *given: given[0], lambda: iter([1, 2])),
    *(lambda: nn.Linear(FEATURES, FEATURES), lambda: nn.Linear(2, 5), lambda: nn.Identity()),
    *(lambda: torch.randn(4), lambda: torch.randn(()), lambda: torch.randn(0, FEATURES)),
    *(lambda: torch.randn(4, 7), lambda: torch.randn(4, FEATURES).double()),
    *(lambda: torch.randn(4, 2, 2), lambda: torch.ones(4, FEATURES, dtype=torch.long)),
    *(lambda: torch.full((4, FEATURES), math.nan), lambda: torch.randn(4, FEATURES).numpy()),
    *(lambda: torch.zeros(4, FEATURES, dtype=torch.complex64), lambda: np.float32(0.5)),
    *(lambda: torch.device("cpu"), lambda: torch.float64, lambda: torch.Generator()),
    *(lambda: Path("nowhere/file.json"), lambda: Path("."), lambda: ValueError("x")),
    *(lambda: ig.Limits(), lambda: ig.FiniteDifferences(0.1), lambda: ig.Verdict.STABLE),
    *(
        lambda: torch.distributions.Normal(0.0, 1.0),
        lambda: torch.distributions.constraints.simplex,
    ),
    *(lambda: random.Random(0), lambda: np.array(["a"]), lambda: np.zeros((4, FEATURES))),
)


@dataclass(frozen=True)
class Call:
    """A function with arguments that work; some of them are exchanged for junk.

    Attributes:
        function: what is called.
        arguments: name -> maker of a value that works.
        positional: names that are passed by position.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Callable[[], Any]]
    positional: tuple[str, ...] = ()

    def __call__(self, arguments: dict[str, Any]) -> Any:
        given = dict(arguments)
        first = [given.pop(name) for name in self.positional]
        return self.function(*first, **given)


def _const(value: Any) -> Callable[[], Any]:
    return lambda: value


def _report() -> Any:
    return ig.audit(model(), data(), checks=["density"])


REPORT = _report()


def _hooked(**given: Any) -> Any:
    hook = ig.RegularizerHook(given["model"], given["regularizers"], every=given["every"])
    return hook(given["x"], z=given["z"], context=given["context"], step=given["step"])


def _stepped(**given: Any) -> Any:
    parameter = nn.Parameter(torch.ones(()))
    hook = ig.RegularizerHook(model(), [])
    optimizer = given["optimizer"]
    if optimizer is None:
        optimizer = torch.optim.SGD([parameter], 0.1)
    loss = parameter.square() if given["loss"] is None else given["loss"]
    return hook.step(loss, optimizer, clip=given["clip"])


def _audit_hook(**given: Any) -> Any:
    x, context, step = (given.pop(name) for name in ("x", "context", "step"))
    return ig.AuditHook(given.pop("model"), **given)(x, context, step=step)


def _penalty(**given: Any) -> Any:
    place = {name: given.pop(name) for name in ("at_model", "x", "z")}
    penalty = ig.FiniteDifferences(given.pop("coefficient"), **given)
    return penalty(place["at_model"], place["x"], place["z"])


def _likelihood(**given: Any) -> Any:
    return ig.NormalizingFlowLoss(given["coefficient"])(given["model"], given["x"], given["z"])


def _memory(**given: Any) -> Any:
    return ig.memory_saving(given.pop("model"), **given)(data())


def _coded(**given: Any) -> Any:
    coder = ig.exact(given["model"])
    return coder.decode(*coder.encode(given["x"]))


def _bounds(**given: Any) -> Any:
    return ig.lipschitz_bounds(given.pop("model"), given.pop("domain"), **given)


def _box(**given: Any) -> Any:
    return ig.Box(given["lower"], given["upper"])


CALLS: dict[str, Call] = {
    "audit": Call(
        ig.audit,
        {
            "model": model,
            "x": data,
            "uses": _const(None),
            "level": _const("quick"),
            "checks": _const(["density"]),
            "context": _const(None),
            "prior": _const(None),
            "domain": _const(None),
            "limits": _const(None),
            "loss": _const(None),
            "name": _const(None),
            "seed": _const(0),
            "memory": _const(None),
            "group": _const(None),
            "dry_run": _const(False),
            "progress": _const(False),
        },
        ("model", "x"),
    ),
    "wrap": Call(
        ig.wrap,
        {"model": model, "context": _const(None)},
        ("model",),
    ),
    "wrap callables": Call(
        ig.wrap,
        {"encode": _const(lambda x: x), "decode": _const(lambda z: z)},
    ),
    "wrap layers": Call(ig.wrap, {"layers": lambda: [model()]}),
    "Limits": Call(
        ig.Limits,
        {"density": _const(0.1), "sampling": _const(1e-3), "confidence": _const(0.95)},
    ),
    "hook": Call(
        _hooked,
        {
            "model": model,
            "regularizers": lambda: [ig.FiniteDifferences(0.1)],
            "every": _const(1),
            "x": data,
            "z": _const(None),
            "context": _const(None),
            "step": _const(None),
        },
    ),
    "hook.step": Call(
        _stepped,
        {"loss": _const(None), "optimizer": _const(None), "clip": _const(None)},
    ),
    "FiniteDifferences": Call(
        _penalty,
        {
            "coefficient": _const(0.1),
            "direction": _const("inverse"),
            "at": _const("data"),
            "form": _const("square"),
            "eps": _const(0.1),
            "fraction": _const(None),
            "seed": _const(0),
            "at_model": model,
            "x": data,
            "z": _const(None),
        },
    ),
    "NormalizingFlowLoss": Call(
        _likelihood, {"coefficient": _const(0.1), "model": model, "x": data, "z": _const(None)}
    ),
    "AuditHook": Call(
        _audit_hook,
        {
            "model": model,
            "x": data,
            "every": _const(1),
            "checks": _const(["density"]),
            "record": _const(None),
            "actions": _const(()),
            "samples": _const(8),
            "context": _const(None),
            "step": _const(0),
        },
    ),
    "memory_saving": Call(_memory, {"model": model, "guard": _const(None), "exact": _const(False)}),
    "exact": Call(_coded, {"model": model, "x": data}),
    "lipschitz_bounds": Call(
        _bounds,
        {
            "model": model,
            "domain": lambda: ig.Box(-torch.ones(3), torch.ones(3)),
            "seconds": _const(1.0),
        },
    ),
    "Box": Call(_box, {"lower": lambda: -torch.ones(3), "upper": lambda: torch.ones(3)}),
    "compare": Call(ig.compare, {"reports": lambda: {"a": REPORT, "b": REPORT}}, ("reports",)),
    "assert_stable": Call(
        ig.assert_stable,
        {"model": model, "x": data, "uses": _const(["density"]), "checks": _const(["density"])},
        ("model", "x"),
    ),
    "load": Call(ig.load, {"path": _const("nowhere.json")}, ("path",)),
    "every": Call(ig.every, {"period": _const(3)}, ("period",)),
    "to_html": Call(
        REPORT.to_html, {"path": lambda: Path(tempfile.mkdtemp()) / "r.html"}, ("path",)
    ),
    "report[]": Call(REPORT.__getitem__, {"name": _const("density")}, ("name",)),
}


@dataclass(frozen=True)
class Unclear:
    """An error that does not say what was expected.

    Attributes:
        call: which function.
        changed: argument -> what was passed, as text.
        error: its class and first line.
        place: where in the package it came from.
    """

    call: str
    changed: dict[str, str]
    error: str
    place: str


def unclear_errors(seeds: range) -> Iterator[Unclear]:
    """Of one call for each seed, with one argument exchanged, or sometimes two."""
    names = list(CALLS)
    for seed in seeds:
        rng = random.Random(seed)
        name = names[seed % len(names)]
        call = CALLS[name]
        arguments = {key: make() for key, make in call.arguments.items()}
        chosen = rng.sample(list(arguments), min(len(arguments), rng.choice([1, 1, 1, 2])))
        for key in chosen:
            arguments[key] = rng.choice(JUNK)()
        changed = {key: f"{arguments[key]!r:.60}" for key in chosen}
        try:
            call(arguments)
        except Exception as error:
            if not _is_clear(error):
                first = (str(error).splitlines() or [""])[0]
                yield Unclear(name, changed, f"{type(error).__name__}: {first:.120}", _place(error))


def _is_clear(error: Exception) -> bool:
    """Whether an error says what was expected, or what to do."""
    if isinstance(error, (OSError, AssertionError, MissingContextError, ig.NotApplicable)):
        return True
    if isinstance(error, ZeroDivisionError) or _place(error).startswith("layers/"):
        return True  # of the junk itself: a caller's function raises in the caller's name
    if isinstance(error, TypeError) and "argument" in str(error) and "()" in str(error):
        return True  # Python's own words about a call: print() got an unexpected keyword argument
    text = str(error)
    return any(word in text for word in ("expected", "pass ", "call ", "it has "))


def _place(error: Exception) -> str:
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/inn_guard/" in frame.filename
    ]
    if not own:
        return "?"
    return f"{own[-1].filename.rpartition('/inn_guard/')[2]}:{own[-1].lineno}"


def main(first: int, count: int) -> int:
    """The number of unclear errors."""
    warnings.simplefilter("ignore")
    os.chdir(tempfile.mkdtemp())  # some junk is a file's name that works
    for name, call in CALLS.items():
        if name != "load":  # there is no such file
            call({key: make() for key, make in call.arguments.items()})
    report = os.fdopen(os.dup(1), "w")
    found = list(unclear_errors(range(first, first + count)))
    for one in found:
        print(one, file=report)
    try:
        os.fstat(1)
    except OSError:
        print("a number was taken for an open file, which was closed", file=report)
        return len(found) + 1
    return len(found)


if __name__ == "__main__":
    sys.exit(min(1, main(int(sys.argv[1]), int(sys.argv[2]))))

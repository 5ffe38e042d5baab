"""Whether a setting of an inexact inverse makes it more exact: turned on a copy, and measured."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.audits.audited_model import AuditedModel, ModelError
from inn_guard.audits.fault_tolerant import Guarded, patience
from inn_guard.audits.operation_count import TooManyOperations, count_operations
from inn_guard.audits.round_trip import RoundTrip
from inn_guard.audits.thresholds import worst
from inn_guard.core.missing import NotApplicable
from inn_guard.execution.state import preserve_state
from inn_guard.report.formatting import brief

__all__ = ["HELPS", "SAMPLES", "Turned", "find_helpful_setting"]

SAMPLES = 8
HELPS = 2.0  #: by which factor the error must fall
DEPTH = 3  #: objects within objects of a module that are looked into
MOST = 6  #: settings that are tried
TURNS = 2  #: of a setting; more only as long as the error is above the limit
MOST_TURNS = 4
#: How far the forward may move, in units of the error of the round trip: a setting of the map
#: itself, such as the number of its steps, moves it further.
MOVED = 10.0

#: Tolerances stay above this many roundings: below, adaptive solvers take ever smaller steps.
LEAST_ROUNDINGS = 10.0
#: A trial may have this many times the operations of the round trip: as many more steps as are
#: tried, and some.
PATIENCE = 300.0

#: words in the name of a number -> by what it is multiplied. Which of them matters is measured.
FACTORS = (
    (re.compile(r"(^|_)(max_?)?(n_?|num_?)?(iters?|iterations?|steps?)(_|$)"), 4.0),
    (re.compile(r"(^|_)(step_size|dt|h)$"), 0.25),
    (re.compile(r"(^|_)[arxf]?(tol|tols|tolerance|eps|epsilon|precision)$"), 0.01),
)


@dataclass(frozen=True)
class Turned:
    """A setting that helps.

    Attributes:
        name: of it, as the module has it; of several that have to be turned together, with "and".
        before: its value, in words.
        after: the value that was tried, in words.
        error_before: of the round trip, by feature, the worst of the samples.
        error_after: with the value that was tried.
        suffices: whether that is within the limit.
    """

    name: str
    before: str
    after: str
    error_before: float
    error_after: float
    suffices: bool

    def sentence(self) -> str:
        """What was measured."""
        error = brief(self.error_after)
        return f"with {self.name} {self.after} in place of {self.before} it is {error}"

    def advice(self) -> str:
        """What to do."""
        text = (
            f"Set {self.name} to {self.after} in place of {self.before}: the error of the inverse "
            f"was measured to fall from {brief(self.error_before)} to {brief(self.error_after)}."
        )
        if not self.suffices:
            text += " Nothing finer was tried: a map that is less steep needs less."
        return text


@dataclass(frozen=True)
class _Place:
    """One number that decides how exactly an inverse is computed, and how to write it."""

    name: str
    value: float | int
    factor: float
    write: Callable[[Any], None]

    def turned(self, times: int, dtype: torch.dtype) -> float | int:
        """The value turned so many times; the value itself where it can go no further."""
        value = self.value * self.factor**times
        if isinstance(self.value, int):
            return round(value)
        if self.factor < 1:
            least = LEAST_ROUNDINGS * torch.finfo(dtype).eps
            value = min(self.value, max(value, least))
        return value


def find_helpful_setting(model: AuditedModel, x: Tensor, limit: float) -> Turned | None:
    """The setting that lowers the error of x -> z -> x most; None if there is none.

    It is turned until the error is within the limit, or falls no further. Iterations, steps and
    tolerances are found by their names in modules, in plain objects within them, and among
    arguments that are bound to functions. All of one name are turned together, and at last all
    tolerances. The model itself stays as it is.

    Args:
        model: in evaluation mode.
        x: samples that come back worst, (B, *data).
        limit: of the error by feature.
    """
    try:
        with preserve_state(model):
            copy = model.to_dtype(x.dtype)
            return _best(copy, x, limit)
    except (ModelError, NotApplicable):
        return None


def _best(copy: AuditedModel, x: Tensor, limit: float) -> Turned | None:
    places = list(_places(copy))
    if not places:
        return None
    guarded = Guarded(copy, x, seconds=patience(copy, x))
    trip, operations = count_operations(lambda: _trip(guarded, x))
    if not trip.end.nan_to_num().equal(_trip(guarded, x).end.nan_to_num()):
        return None  # a random map, whose mean over more steps is smaller
    trial = _Trial(guarded, trip, PATIENCE * operations)
    found = None
    for group in _groups(places):
        for times in range(1, MOST_TURNS + 1):
            if times > TURNS and found is not None and found.suffices:
                break
            after = trial.error_with(group, times)
            best = trial.error if found is None else found.error_after
            if not after * HELPS <= best:
                break
            words = _words(group, times, x.dtype)
            found = Turned(*words, trial.error, after, suffices=after <= limit)
    return found


def _groups(places: list[_Place]) -> list[list[_Place]]:
    """Places that are turned together: of the same name, then all tolerances."""
    by_name: dict[str, list[_Place]] = {}
    for place in places:
        by_name.setdefault(place.name, []).append(place)
    groups = list(by_name.values())[:MOST]
    tolerances = [place for place in places if place.factor < FACTORS[1][1]]
    if len({place.name for place in tolerances}) > 1:
        groups.append(tolerances)
    return groups


@dataclass(frozen=True)
class _Trial:
    """Round trips with other settings, beside the one with those that the model has.

    Attributes:
        guarded: the copy whose settings are turned.
        trip: with the settings that it has.
        operations: how many another one may need.
    """

    guarded: Guarded
    trip: RoundTrip
    operations: float

    @property
    def error(self) -> float:
        """With the settings that the model has."""
        return worst(self.trip.by_feature)

    def error_with(self, group: list[_Place], times: int) -> float:
        """With these settings turned so often; inf if they are settings of the map."""
        trip = self.trip
        dtype = trip.start.dtype
        if all(place.turned(times, dtype) == place.turned(times - 1, dtype) for place in group):
            return torch.inf
        try:
            for place in group:
                place.write(place.turned(times, dtype))
            other, _ = count_operations(
                lambda: _trip(self.guarded, trip.start), at_most=self.operations
            )
        except (TooManyOperations, TypeError, ValueError, AttributeError, KeyError):
            return torch.inf
        finally:
            for place in group:
                place.write(place.value)
        moved = RoundTrip(trip.middle, trip.middle, other.middle).by_feature
        if not bool((moved <= MOVED * self.error).all()):
            return torch.inf
        return worst(other.by_feature)


def _trip(guarded: Guarded, x: Tensor) -> RoundTrip:
    z = guarded.forward(x)
    return RoundTrip(x, z, guarded.inverse(z))


def _words(group: list[_Place], times: int, dtype: torch.dtype) -> tuple[str, str, str]:
    """The names, values before and values after."""
    named = {place.name: place for place in group}
    before = " and ".join(f"{place.value:g}" for place in named.values())
    after = " and ".join(f"{place.turned(times, dtype):g}" for place in named.values())
    return " and ".join(named), before, after


def _places(model: nn.Module) -> Iterator[_Place]:
    """Every number with such a name in the modules of a model."""
    seen: set[int] = set()
    for module in model.modules():
        yield from _in_object(module, 0, seen)


def _in_object(owner: Any, depth: int, seen: set[int]) -> Iterator[_Place]:
    if id(owner) in seen or depth > DEPTH:
        return
    seen.add(id(owner))
    if isinstance(owner, functools.partial):
        owner = owner.keywords
    if isinstance(owner, dict):
        items, write = dict(owner), owner.__setitem__
    elif isinstance(getattr(owner, "__dict__", None), dict) and not isinstance(owner, type):
        items = _numbers_of_class(type(owner)) | vars(owner)
        # also of frozen dataclasses: the object belongs to a copy
        write = functools.partial(object.__setattr__, owner)
    else:
        return
    for name, value in items.items():
        if not isinstance(name, str):
            continue
        factor = _factor(name, value)
        if factor is not None:
            yield _Place(name.lstrip("_"), value, factor, functools.partial(write, name))
        elif isinstance(value, functools.partial) or not (
            callable(value) or isinstance(value, (Tensor, str))
        ):
            yield from _in_object(value, depth + 1, seen)


def _numbers_of_class(kind: type) -> dict[str, Any]:
    """Numbers that a class defines for all of its instances."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("torch.nn"):
            continue
        for name, value in vars(base).items():
            if isinstance(value, (int, float)):
                found[name] = value
    return found


def _factor(name: str, value: Any) -> float | None:
    """By what a number of this name is multiplied; None if it is no setting of a solver."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        return None
    for words, factor in FACTORS:
        if words.search(name.lower()):
            return None if isinstance(value, int) and factor < 1 else factor
    return None

"""recognise(): which convention a model obeys, by trying those its names suggest on a batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.adapters.captured_modules import Closure
from inn_guard.adapters.conventions.calls import (
    Call,
    Pair,
    Shapes,
    Zeros,
    pairs,
    takes_several,
    with_log_det_argument,
    with_switches,
)
from inn_guard.adapters.conventions.readings import (
    State,
    leaves,
    log_det_paths,
    pick,
    states,
    written,
)
from inn_guard.adapters.conventions.recognised import (
    Alone,
    Decode,
    Encode,
    LogDet,
    Recognised,
    RecognisedOfSeveral,
)
from inn_guard.core.context import map_tensors, select_rows
from inn_guard.core.invertible import Context, as_log_det, standard_normal_log_prob
from inn_guard.core.tensors import concatenate_flat, finite_rows, same_tensor
from inn_guard.execution.state import StateSnapshot, preserve_state, without_autocast

__all__ = ["Unrecognised", "recognise"]

ROWS = 4  #: samples that are tried
COMES_BACK = 1e-2  #: relative error of a round trip up to which two directions belong together
SAME_LOG_DET = 0.05  #: nats; beyond a thousandth of the log-determinant itself
JACOBIAN_UP_TO = 256  #: dimensions up to which a log-determinant is held against autograd's
OPTIONS = 16  #: readings of one result that are tried
SUBTRACTS = "the model subtracts log_det from the log-density that it is given"
#: methods that return a log-determinant alone, of x or of (x, z)
LOG_DETS = (
    *("log_abs_det_jacobian", "log_det_jacobian", "forward_log_det_jacobian", "log_det"),
    *("logdet", "log_abs_det", "log_det_J"),
)


class Unrecognised(TypeError):
    """No convention, or more than one, was measured to hold; the message says what to pass."""


@dataclass(frozen=True)
class _Trial:
    """One pair of directions with one reading of their results, and how far it comes back.

    Attributes:
        pair: the two calls.
        state: which part of the result is the latent.
        back: which part of the way back is x, or which parts.
        result: of the first call.
        z: the latent as one tensor, (B, ...).
        error: median over the samples of |x' - x| / |x|; NaN if it is not finite.
    """

    pair: Pair
    state: State
    back: State
    result: Any
    z: Tensor
    error: float

    @property
    def comes_back(self) -> bool:
        return self.error <= COMES_BACK

    @property
    def encode(self) -> str:
        return self.state.written(self.pair.encode.written("x"), self.result)

    @property
    def decode(self) -> str:
        if self.state.shapes is None:
            call = self.pair.decode.written("z")
        else:
            split = _split(self.state.shapes)
            call = self.pair.decode.written(split)
        if self.back.shapes is not None:
            return f"{call}[:{len(self.back.shapes)}]"
        return call + "".join(f"[{key!r}]" for key in self.back.paths[0])


@dataclass(frozen=True)
class _Option:
    """A part of a result, or a method of its own, that can be the log-determinant."""

    call: Call
    state: State | None
    reading: LogDet
    values: Tensor
    by_row: bool
    text: str


def recognise(
    model: Any,
    x: Tensor | Sequence[Tensor],
    context: Context = None,
    *,
    given: Pair | None = None,
) -> Recognised:
    """The model as an Invertible, by the convention that a batch shows it to obey.

    Names of methods and arguments say only what is tried: pairs of methods, or one method with a
    flag. What comes back to x is taken; of several parts of a result the one that is log|det| by
    autograd is the log-determinant. Every trial runs in eval mode and is undone.

    Args:
        model: any object with methods, or a function with a flag.
        x: data, (B, *data); or several tensors, which the model takes as that many arguments or as
            one tuple. The recognised model takes them joined in one, (B, D).
        context: passed to every call.
        given: the two directions, if they are known. Default: those the names suggest.

    Raises:
        Unrecognised: if nothing fits, or several conventions fit and differ.
    """
    candidates = pairs(model, context) if given is None else [given]
    shapes: Shapes | None = None
    if not isinstance(x, Tensor):
        shapes = tuple(tuple(part.shape[1:]) for part in x)
        x = concatenate_flat(x)
        candidates = [pair for known in candidates for pair in known.of_several(shapes)]
    holder = _Holder(model, candidates)
    rows = _rows(x)
    sample = _like_weights(x[rows], holder)
    part = None if context is None else select_rows(context, rows)
    with preserve_state(holder), torch.no_grad(), without_autocast():
        holder.eval()
        attempt = _Attempt(model, sample, part, StateSnapshot(holder).restore_written, shapes)
        return attempt.described(attempt.best(candidates), context)


class _Holder(nn.Module):
    """Registers all modules of a model that need not be one, to preserve their state."""

    def __init__(self, model: Any, candidates: list[Pair]) -> None:
        super().__init__()
        found: dict[int, nn.Module] = {}
        for pair in candidates:
            for call in (pair.encode, pair.decode):
                for module in call.target.modules():
                    found[id(module)] = module
        if isinstance(model, nn.Module):
            found[id(model)] = model
        self.found = nn.ModuleList(found.values())
        self.held = [model]  # in a list, which registers nothing


class _Attempt:
    """Trials of one model on one batch."""

    def __init__(
        self,
        model: Any,
        x: Tensor,
        context: Context,
        restore: Any,
        shapes: Shapes | None = None,
    ) -> None:
        self.model, self.x, self.restore = model, x, restore
        self.shapes = shapes  #: of the tensors that are joined in x
        self.given = () if context is None else (context,)
        self.failures: dict[str, str] = {}

    # which directions

    def best(self, candidates: list[Pair]) -> _Trial:
        """The trial to go by."""
        ran = self.trials(candidates)
        good = self._without_echoes([trial for trial in ran if trial.comes_back])
        if not good:
            turned = [switch for pair in candidates for switch in with_switches(pair)]
            good = [trial for trial in self.trials(turned) if trial.comes_back]
        if not good and ran and self.x.dtype != torch.float64:
            good = self._in_double(candidates, ran)
        if good:
            first = good[0]
            others = [t for t in good if self._is_another_map(t, first)]
            if others and not _is_documented(first.pair):
                raise Unrecognised(self._ambiguous([first, *others]))
            return self._by_density(first)
        if not ran:
            raise Unrecognised(self._nothing_ran(candidates))
        distinct = {(trial.pair.encode.text, trial.pair.decode.written("z")) for trial in ran}
        alone = len(distinct) == 1 and ran[0].z[0].numel() == self.x[0].numel()
        if len(ran) == 1 and alone:
            return ran[0]
        raise Unrecognised(self._none_comes_back(ran))

    def _without_echoes(self, good: list[_Trial]) -> list[_Trial]:
        """Without latents that are x itself or have more numbers than x, where there are others."""
        others = [trial for trial in good if not same_tensor(trial.z, self.x)] or good
        size = self.x.numel()
        return [trial for trial in others if trial.z.numel() <= size] or others

    def trials(self, candidates: list[Pair]) -> list[_Trial]:
        """Everything that runs and ends in the shape of x."""
        ran: list[_Trial] = []
        for pair in candidates:
            ran += self.readings(pair)
        return ran

    def readings(self, pair: Pair) -> list[_Trial]:
        """The readings of one pair's results that run."""
        name = f"{pair.encode.written('x')}, {pair.decode.written('z')}"
        try:
            result = pair.encode(self.x.clone(), *self.given)
        except Exception as error:  # whatever a foreign model raises says that this is not the way
            self.failures.setdefault(pair.encode.written("x"), _first_line(error))
            return []
        finally:
            self.restore()
        options = self._likeliest(states(result, len(self.x)), result)
        if not options:
            self.failures[pair.encode.written("x")] = f"returns {_shape(result)}"
        ran = []
        for state in options:
            for call in _ways_to_pass(pair.decode, state):
                ran += self._way_back(Pair(pair.encode, call), state, result, name)
        return ran

    def _likeliest(self, options: list[State], result: Any) -> list[State]:
        """Those first that have as many numbers as x; at most OPTIONS."""
        size = self.x.numel()
        ordered = sorted(options, key=lambda state: state.joined(result).numel() != size)
        return ordered[:OPTIONS]

    def _way_back(self, pair: Pair, state: State, result: Any, name: str) -> list[_Trial]:
        z = state.joined(result)
        try:
            back = pair.decode(state.split(z.clone()), *self.given)
        except Exception as error:  # as above
            self.failures[name] = _first_line(error)
            return []
        finally:
            self.restore()
        found = []
        for part in self._data_within(back):
            error = _error(part.joined(back), self.x)
            found.append(_Trial(pair, state, part, result, z, error))
        if not found:
            wanted = tuple(self.x.shape)
            self.failures[name] = f"the way back returns {_shape(back)} for x of shape {wanted}"
        return sorted(found, key=lambda trial: (not trial.comes_back, math.isnan(trial.error)))[:1]

    def _data_within(self, back: Any) -> list[State]:
        """The parts of the way back that have the shape of x, or its shapes."""
        if self.shapes is not None:
            return [part for part in states(back, len(self.x)) if part.shapes == self.shapes]
        found = []
        for path, leaf in leaves(back):
            if isinstance(leaf, Tensor) and leaf.shape == self.x.shape:
                found.append(State((path,)))
        return found

    def _in_double(self, candidates: list[Pair], ran: list[_Trial]) -> list[_Trial]:
        """The trials that come back in a float64 copy, where rounding cannot hide it."""
        if not isinstance(self.model, nn.Module):
            return []
        try:
            fine = copy.deepcopy(self.model).double()
        except Exception:  # a model that cannot be copied is judged as it is
            return []
        context = map_tensors(self.given, lambda t: t.double() if t.is_floating_point() else t)
        attempt = _Attempt(fine, self.x.double(), None, lambda: None, self.shapes)
        attempt.given = tuple(context)
        alike = pairs(fine, context[0] if context else None)
        if self.shapes is not None:
            alike = [pair for known in alike for pair in known.of_several(self.shapes)]
        again = attempt.trials(alike)
        good = {_key(trial) for trial in again if trial.comes_back}
        return [trial for trial in ran if _key(trial) in good]

    def _is_another_map(self, trial: _Trial, first: _Trial) -> bool:
        if trial.pair.encode.written("x") == first.pair.decode.written("x"):
            return False  # the same two directions exchanged
        if trial.z.numel() != first.z.numel():
            return True
        same = torch.isclose(trial.z.flatten(), first.z.flatten(), rtol=1e-3, atol=1e-4)
        return not bool(same.all())

    def _by_density(self, trial: _Trial) -> _Trial:
        """The directions exchanged, if the model's own log_prob shows that they must be."""
        if self._own_density(trial) is not None:
            return trial
        for other in self.readings(trial.pair.swapped()):
            if other.comes_back and self._own_density(other) is not None:
                return other
        return trial

    # which log-determinant

    def described(self, trial: _Trial, context: Context) -> Recognised:
        """The recognised model, with the words that say how it is called."""
        options = self.options(trial)
        reference = None
        if options and trial.z[0].numel() == self.x[0].numel() <= JACOBIAN_UP_TO:
            reference = self._by_autograd(trial)
        density = self._own_density(trial, options)
        option, note = self.choose(options, reference, density)
        inverse = self._inverse_log_det(trial, option)
        returned = option is not None and option.state is not None and not option.by_row
        encode = Encode(trial.pair.encode, trial.state)
        separate: Alone | None = None
        if option is not None and returned:
            encode = Encode(option.call, option.state or trial.state, option.reading)
        elif option is not None:
            of = encode if option.call.spread else None
            separate = Alone(option.call, option.reading, by_row=option.by_row, encode=of)
        own = self._density_call() if density is not None else None
        kind = Recognised if self.shapes is None else RecognisedOfSeveral
        recognised = kind(
            self.model,
            encode=encode,
            decode=Decode(trial.pair.decode, trial.state, trial.back, inverse),
            log_det=separate,
            context=context,
            latent_shape=trial.z.shape[1:],
            convention=self._words(trial, option, note),
            log_prob=own,
        )
        if isinstance(recognised, RecognisedOfSeveral):
            recognised.inputs = self.shapes or ()
        return recognised

    def options(self, trial: _Trial) -> list[_Option]:
        """Everything that can be the log-determinant of x -> z, the likeliest first."""
        found = self._parts(trial.pair.encode, trial.result, trial.state)
        for call in with_log_det_argument(trial.pair.encode):
            result = self._tried(call, self.x.clone())
            for state in states(result, len(self.x)):
                if self._same_latent(state.joined(result), trial):
                    found += self._parts(call, result, state)
        for name in LOG_DETS:
            method = getattr(self.model, name, None)
            if callable(method) and not isinstance(method, nn.Module):
                call = Call(Closure(method), f"model.{name}")
                found += self._parts(call, self._tried(call, self.x.clone()), None)
                both = replace(call, spread=True)
                given = [self.x.clone(), trial.z.clone()]
                found += self._parts(both, self._tried(both, given), None)
        return found

    def _same_latent(self, z: Tensor, trial: _Trial) -> bool:
        """Whether a call with other arguments returns this latent.

        A solver takes other steps when it integrates a log-determinant, too: its latents agree only
        as far as its round trips do.
        """
        if z.shape != trial.z.shape:
            return False
        return same_tensor(z, trial.z) or _error(z, trial.z) <= 10 * trial.error <= COMES_BACK

    def _parts(self, call: Call, result: Any, state: State | None) -> list[_Option]:
        found = []
        for path in log_det_paths(result, state or State(()), len(self.x)):
            part = pick(result, path)
            of_both = call.spread and state is None
            text = written(path, f"{call.text}(x, z)" if of_both else call.written("x"), result)
            of_layers = isinstance(part, (list, tuple))
            if of_layers:
                text = f"sum(part.flatten(1).sum(1) for part in {text})"
            by_row = not of_layers and (not isinstance(part, Tensor) or part.numel() == 1)
            if by_row and of_both:
                continue
            reading = LogDet(path)
            if by_row:
                values = self._row_by_row(call, reading)
                if values is None:
                    continue
                batch = as_log_det(part, self.x)
                by_row = not bool(torch.isclose(values, batch, rtol=1e-4, atol=1e-5).all())
            else:
                values = reading.of(result, self.x)
            found.append(_Option(call, state, reading, values.detach(), by_row, text))
        return found

    def choose(
        self, options: list[_Option], reference: Tensor | None, density: int | None
    ) -> tuple[_Option | None, str]:
        """The log-determinant to go by, and a remark."""
        running = [_minus(option) for option in options if _is_running_density(option)]
        if reference is not None:
            fitting = _best_fit([*options, *running], reference)
            if fitting is not None:
                remark = f"log_det agrees with autograd to {_gap(fitting, reference):.0e} nats"
                return fitting, f"{SUBTRACTS}; {remark}" if fitting in running else remark
            # a random estimate fits nowhere exactly
            known = [option for option in options if _is_running_density(option)] + running
            nearest = min(known, key=lambda option: _distance(option, reference), default=None)
            running = [option for option in running if option is nearest]
        if running:
            return running[0], SUBTRACTS
        if density == -1 and options:
            return _minus(options[0]), "the model's own log_prob subtracts what it returns"
        plain = [option for option in options if option.state is not None]
        plain = [option for option in plain if _is_per_sample(option)] or plain
        if not plain:
            return None, ""
        if self._differs_by_call(plain[0]):
            return plain[0], "log_det differs from call to call, as an estimated trace does"
        if reference is None:
            return plain[0], "log_det was not compared with autograd"
        return plain[0], _relation(plain[0], reference)

    def _differs_by_call(self, option: _Option) -> bool:
        """Whether a second call gives another log-determinant."""
        again = self._tried(option.call, self.x.clone())
        try:
            values = option.reading.of(again, self.x)
        except Exception:  # a result of another form
            return True
        return not torch.allclose(values, option.values, rtol=1e-3, atol=1e-4, equal_nan=True)

    def _inverse_log_det(self, trial: _Trial, option: _Option | None) -> LogDet | None:
        """Where the way back holds its log-determinant; None if nowhere, or for the whole batch."""
        if option is None:
            return None
        calls = [trial.pair.decode]
        z = trial.state.split(trial.z.clone())
        try:
            back = calls[0](z, *self.given)
        except Exception:  # ran before, and is random
            return None
        finally:
            self.restore()
        plain = []
        for path in log_det_paths(back, trial.back, len(self.x)):
            part = pick(back, path)
            if not isinstance(part, Tensor) or len(part.reshape(-1)) != len(self.x):
                continue
            if part.numel() == 1 and option.by_row:
                continue
            plain.append(LogDet(path, option.reading.sign))
        for reading in plain:
            if _same_numbers(reading.of(back, self.x), -option.values):
                return reading
        for reading in plain:
            as_it_is = replace(reading, sign=1)
            if _same_numbers(as_it_is.of(back, self.x), -option.values):
                return as_it_is
        return replace(plain[0], sign=1) if plain else None

    def _by_autograd(self, trial: _Trial) -> Tensor | None:
        """log|det dz/dx| of every sample, (B,), from the whole Jacobian; None if it has none."""
        x = self.x.clone().requires_grad_()
        try:
            with torch.enable_grad():
                result = trial.pair.encode(x, *self.given)
                z = trial.state.joined(result).flatten(1)
                rows = []
                for k in range(z.shape[1]):
                    (row,) = torch.autograd.grad(z[:, k].sum(), x, retain_graph=True)
                    rows.append(row.flatten(1))
        except Exception:  # a forward without derivatives, or one that writes into its input
            return None
        finally:
            self.restore()
        log_det = torch.linalg.slogdet(torch.stack(rows, 1).double()).logabsdet
        return log_det if bool(log_det.isfinite().all()) else None

    def _row_by_row(self, call: Call, reading: LogDet) -> Tensor | None:
        given = self.given
        try:
            return Alone(call, reading, by_row=True)(self.x.clone(), *given).detach()
        except Exception:  # a result without this part for a single row
            return None
        finally:
            self.restore()

    def _tried(self, call: Call, given: Any) -> Any:
        try:
            return call(given, *self.given)
        except Exception:  # an argument or a method of another meaning
            return None
        finally:
            self.restore()

    # the model's own density

    def _density_call(self) -> Call | None:
        method = getattr(self.model, "log_prob", None)
        if not callable(method):
            return None
        several = self.shapes is not None
        return Call(Closure(method), "model.log_prob", spread=several, shapes=self.shapes)

    def _own_density(self, trial: _Trial, options: list[_Option] | None = None) -> int | None:
        """The sign with which the model's log_prob adds the log-determinant to that of N(0, I).

        None if it has no log_prob, or another base.
        """
        call = self._density_call()
        if call is None:
            return None
        value = self._tried(call, self.x.clone())
        if not isinstance(value, Tensor) or value.numel() != len(self.x):
            return None
        normal = standard_normal_log_prob(trial.z)
        for option in self.options(trial) if options is None else options:
            for sign in (1, -1):
                if _same_numbers(value.reshape(-1), normal + sign * option.values):
                    return sign
        return None

    # words

    def _words(self, trial: _Trial, option: _Option | None, note: str) -> str:
        text = f"encode = {trial.encode}, decode = {trial.decode}"
        if option is not None:
            minus = "-" if option.reading.sign < 0 else ""
            each = " for each row alone" if option.by_row else ""
            text += f", log_det = {minus}{option.text}{each}"
        text += f": {len(self.x)} samples come back to {trial.error:.0e}"
        if not trial.comes_back:
            text += ", which is no inverse"
        if note:
            text += f"; {note}"
        return text

    def _ambiguous(self, good: list[_Trial]) -> str:
        ways = " or ".join(dict.fromkeys(_wrap_call(trial) for trial in good))
        return (
            f"expected one invertible map in {_class(self.model)}; several of its directions come "
            f"back to x and differ in z: pass {ways}"
        )

    def _none_comes_back(self, ran: list[_Trial]) -> str:
        best = min(ran, key=lambda t: math.inf if math.isnan(t.error) else t.error)
        size, whole = best.z[0].numel(), self.x[0].numel()
        text = (
            f"expected two directions of {_class(self.model)} that come back to x; the best, "
            f"{_wrap_call(best)}, is off by {best.error:.1g} of x"
        )
        if size < whole:
            text += (
                f", and its z has {size} of {whole} numbers: let encode return every latent, also "
                "those that a multi-scale model splits off"
            )
        return f"{text}. Pass wrap(encode=f, decode=g) with the two directions"

    def _nothing_ran(self, candidates: list[Pair]) -> str:
        tried = "; ".join(f"{call}: {why}" for call, why in list(self.failures.items())[:4])
        conditional = ""
        if not self.given and "required positional argument" in tried:
            conditional = " If the model is conditional, pass context=c."
        if self.shapes is None and any(takes_several(pair.encode) for pair in candidates):
            conditional += " If it maps several tensors, pass them as a tuple: x=(first, second)."
        return (
            f"expected two directions of {_class(self.model)} that run on x of shape "
            f"{tuple(self.x.shape)}; tried {tried or 'nothing'}.{conditional} Pass "
            "wrap(encode=f, decode=g), two functions x -> z and z -> x of one tensor each"
        )


def _split(shapes: tuple[tuple[int, ...], ...]) -> str:
    """The code that splits a flat z into tensors of these shapes of one sample."""
    split = f"z.split({[math.prod(shape) for shape in shapes]}, 1)"
    if all(len(shape) == 1 for shape in shapes):
        return split
    return f"[part.reshape(-1, *shape) for part, shape in zip({split}, {list(shapes)})]"


def _ways_to_pass(call: Call, state: State) -> Iterator[Call]:
    """How an inverse can take the latent: a list as one argument, or as several."""
    yield call
    if state.shapes is not None:
        yield replace(call, spread=True)


def _rows(x: Tensor) -> Tensor:
    """Indices of a few finite samples; at least three, so that a batch is told from a number."""
    rows = finite_rows(x).nonzero()[:ROWS, 0]
    if not len(rows):
        rows = torch.arange(min(len(x), ROWS), device=x.device)
    return rows if len(rows) > 2 else rows.repeat(3)[:3]


def _like_weights(x: Tensor, holder: nn.Module) -> Tensor:
    """x in the dtype and on the device of the weights; a mismatch is refused later, with advice."""
    for parameter in holder.parameters():
        if parameter.is_floating_point():
            return x.detach().to(parameter)
    return x.detach()


def _error(back: Tensor, x: Tensor) -> float:
    """Median over samples of the largest error of a feature, relative to that feature's size."""
    size = x.flatten(1).abs().amax(0)
    size = size.clamp(min=1e-6 * max(size.max().item(), 1e-30))
    errors = ((back - x).flatten(1).abs() / size).amax(1)
    return errors.nan_to_num(nan=math.inf).sort().values[len(errors) // 2].item()


def _same_numbers(values: Tensor, reference: Tensor) -> bool:
    gap = (values.double().reshape(-1) - reference.double().reshape(-1)).abs()
    return bool((gap <= SAME_LOG_DET + 1e-3 * reference.double().abs()).all())


def _minus(option: _Option) -> _Option:
    """The same log-determinant, read with the other sign."""
    reading = replace(option.reading, sign=-option.reading.sign)
    return replace(option, reading=reading, values=-option.values)


def _gap(option: _Option, reference: Tensor) -> float:
    """Largest difference from the log-determinant by autograd."""
    return (option.values.double() - reference.double()).abs().max().item()


def _distance(option: _Option, reference: Tensor) -> float:
    """Sum of the differences from the log-determinant by autograd; inf where one is NaN."""
    total = (option.values.double() - reference.double()).abs().sum().item()
    return math.inf if math.isnan(total) else total


def _best_fit(options: list[_Option], reference: Tensor) -> _Option | None:
    """The log-determinant that autograd confirms; of several the first that is as near as any.

    Small log-determinants agree with their negatives, too, within what is allowed to a solver.
    """
    fits = [option for option in options if _same_numbers(option.values, reference)]
    nearest = min((_gap(option, reference) for option in fits), default=math.inf)
    for option in fits:
        if _gap(option, reference) <= 2 * nearest + 1e-5:
            return option
    return None


def _relation(option: _Option, reference: Tensor) -> str:
    """What a log-determinant that is not log|det| is instead, and what to pass if that is meant."""
    if _same_numbers(-option.values, reference):
        return (
            "log_det is minus that of autograd; if that is meant, pass "
            f"wrap(encode=..., decode=..., log_det=lambda x: -{option.text})"
        )
    ratio = (reference / option.values.double()).median().item()
    if math.isfinite(ratio) and _same_numbers(ratio * option.values, reference):
        return (
            f"log_det is {1 / ratio:.3g} times that of autograd; if that is meant, pass "
            f"wrap(encode=..., decode=..., log_det=lambda x: {ratio:.6g} * {option.text})"
        )
    return "log_det is not that of autograd"


def _is_running_density(option: _Option) -> bool:
    """Whether the model subtracts its log-determinant from a log-density that it is handed."""
    for name, value in option.call.keywords.items():
        lowered = name.lower().replace("_", "")
        if isinstance(value, Zeros) and (lowered.startswith("logp") or lowered == "objective"):
            return True
    return False


def _is_per_sample(option: _Option) -> bool:
    return not option.by_row


def _is_documented(pair: Pair) -> bool:
    """Whether these are forward and inverse, which `wrap` promises to take."""
    return pair.encode.written("x") == "model(x)" and pair.decode.written("z") == "model.inverse(z)"


def _key(trial: _Trial) -> tuple[Any, ...]:
    pair = trial.pair
    return pair.encode.written("x"), pair.decode.written("z"), trial.state.paths, trial.back.paths


def _wrap_call(trial: _Trial) -> str:
    return f"wrap(encode=lambda x: {trial.encode}, decode=lambda z: {trial.decode})"


def _class(model: Any) -> str:
    return getattr(model, "__name__", type(model).__name__)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.120}" if lines else type(error).__name__


def _shape(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"a tensor of shape {tuple(result.shape)}"
    if isinstance(result, (tuple, list)):
        return f"a {type(result).__name__} of {len(result)}"
    return f"a {type(result).__name__}"

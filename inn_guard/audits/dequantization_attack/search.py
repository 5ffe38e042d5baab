"""Search: what a strategy may ask of a model, what it has cost, and the worst points found."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from inn_guard.audits.audited_model import ModelError
from inn_guard.audits.dequantization_attack.quantization import Cubes
from inn_guard.audits.fault_tolerant import Guarded
from inn_guard.audits.operation_count import count_operations
from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.core.tensors import finite_rows
from inn_guard.execution.parallel import SERIAL, WorkSharing
from inn_guard.execution.time_limit import TimedOut, time_limit
from inn_guard.jacobian.chain import Linearization

__all__ = ["Attack", "AttackResult", "ErrorGradient", "Search", "run_attack"]

Answer = TypeVar("Answer")

#: forward-equivalents assumed before a call of that kind has been counted
EXPECTED = {"forward": 1.0, "error": 2.0, "gradient": 4.0, "implicit gradient": 8.0}


@runtime_checkable
class Attack(Protocol):
    """How the cubes are searched."""

    @property
    def budget(self) -> float | int:
        """Forward-equivalents per sample that may be spent."""
        ...

    def run(self, search: Search) -> None:
        """Ask for errors and gradients until the budget is spent or every sample is broken."""
        ...


@dataclass(frozen=True)
class ErrorGradient:
    """One backward pass through F and F^-1.

    Attributes:
        error: |F^-1(F(x) + nudge) - x| per sample, (B,) float64; inf where it is not finite.
        to_x: its gradient with respect to x, (B, *data); zero where there is none.
        to_latent: its gradient with respect to the nudge, (B, *latent); zero where there is none.
    """

    error: Tensor
    to_x: Tensor
    to_latent: Tensor


@dataclass(frozen=True)
class AttackResult:
    """What a search has found, on the CPU, for other processes: see the attributes of `Search`."""

    points: Tensor
    error: Tensor
    spent: float
    curve: tuple[tuple[float, Tensor], ...]
    price: Mapping[str, float]
    failures: Counter[str]


class Search:
    """The state of one attack on a batch.

    Every point whose true error is measured is remembered if it is the worst of its sample. A
    sample for which something that is not finite came back is broken: it is done, and later calls
    leave it out.

    Attributes:
        model: the map.
        cubes: where points must lie; only points of a cube may be asked about.
        generator: of all random numbers, on the CPU.
        parallel: processes that may share independent searches.
        points: the worst point of every sample, (B, *data).
        error: its error |F^-1(F(x)) - x|, (B,) float64; inf where broken.
        spent: forward-equivalents per sample: operations of all calls over those of one forward
            pass.
        at_once: points of a sample that may be looked at together.
        curve: (spent, error) after every call that improved some sample.
        price: forward-equivalents of a call of each kind, counted once.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: Invertible,
        cubes: Cubes,
        *,
        budget: float | int,
        generator: torch.Generator,
        seconds: float | int,
        parallel: WorkSharing = SERIAL,
        at_once: int = 1,
    ) -> None:
        self.model = model
        self.at_once = at_once
        self.cubes = cubes
        self.budget = budget
        self.generator = generator
        self.parallel = parallel
        self.spent = 0.0
        self.price: dict[str, float] = {}
        self._begun = 0.0
        self.guarded = Guarded(model, cubes.centre, seconds=seconds)
        self.points = cubes.centre.clone()
        self.error = torch.full((len(self.points),), -1.0, dtype=torch.float64)
        self.curve: list[tuple[float, Tensor]] = []
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with torch.no_grad():
            self.latent, self._unit = count_operations(lambda: model(cubes.centre))

    def fork(self, *, budget: float | int, generator: torch.Generator) -> Search:
        """An independent search of the same cubes; `merge` takes back what it finds."""
        branch = copy.copy(self)
        branch.budget = budget
        branch.generator = generator
        branch.curve = []
        branch._begun = self.spent
        branch.price = dict(self.price)
        branch.guarded = self.guarded.fresh_copy()
        branch.points = self.points.clone()
        branch.error = self.error.clone()
        return branch

    @property
    def found(self) -> AttackResult:
        """What was found so far, and what it has cost since `fork`."""
        curve = tuple((spent - self._begun, error) for spent, error in self.curve)
        failures = self.guarded.failures.counts
        return AttackResult(
            self.points.cpu(), self.error, self.spent - self._begun, curve, self.price, failures
        )

    def merge(self, found: AttackResult) -> None:
        """Keep what another search found where it is worse, and count what that has cost."""
        for spent, error in found.curve:
            if bool((error > self.error).any()):
                self.curve.append((self.spent + spent, torch.maximum(error, self.error)))
        worse = found.error > self.error
        self.points[worse.to(self.points.device)] = found.points[worse].to(self.points.device)
        self.error = torch.maximum(found.error, self.error)
        self.spent += found.spent
        self.price |= found.price
        self.guarded.failures.counts.update(found.failures)

    @property
    def active(self) -> Tensor:
        """Indices of the samples that are not broken yet."""
        return self.error.isfinite().nonzero()[:, 0].to(self.points.device)

    def can_afford(self, kind: str) -> bool:
        """Whether a call of that kind fits into the budget, and a sample is left to attack."""
        price = self.price.get(kind, EXPECTED[kind])
        return self.spent + price <= self.budget and bool(self.error.isfinite().any())

    def errors(self, x: Tensor) -> Tensor:
        """|F^-1(F(x)) - x| of every sample, (B,) float64; inf where broken, now or before."""
        rows = self.active
        guarded = self.guarded.select(rows)
        back = self._paid("error", lambda: guarded.inverse(guarded.forward(x[rows])))
        return self._remember(x, rows, _lengths(back, x[rows]))

    def errors_of_draws(
        self, draw: Callable[[], Tensor], *, budget: float | int = math.inf
    ) -> list[Tensor]:
        """`errors` of draw(), draw(), ..., until the budget is spent, or the search's own.

        Several draws are sent through the model in one batch.

        Args:
            draw: gives points of the cubes, (B, *data), whatever was found before.
            budget: forward-equivalents per sample.
        """
        begin, every = self.spent, []
        while self.spent - begin < budget and self.can_afford("error"):
            price = self.price.get("error", EXPECTED["error"])
            affordable = int((self.budget - self.spent) / price)
            wanted = math.ceil(min((budget - self.spent + begin) / price, affordable))
            points = [draw() for _ in range(max(1, min(self.at_once, wanted)))]
            every += self._errors_together(points)
        return every

    def _errors_together(self, points: Sequence[Tensor]) -> list[Tensor]:
        if len(points) == 1 or "error" not in self.price:
            return [self.errors(point) for point in points]
        rows = self.active
        batch = torch.cat([point[rows] for point in points])
        guarded = self.guarded.select(rows.repeat(len(points)))
        back = guarded.inverse(guarded.forward(batch))
        found = []
        for point, error in zip(points, _lengths(back, batch).split(len(rows)), strict=True):
            self.spent += self.price["error"]
            whole = torch.full_like(self.error, math.inf)
            whole[rows.cpu()] = error
            # a sample may have been broken by a point before this one
            left = self.active
            found.append(self._remember(point, left, whole[left.cpu()]))
        return found

    def gradient(self, x: Tensor, nudge: Tensor | None = None) -> ErrorGradient:
        """Error and gradients by autograd through F and F^-1.

        The error is remembered if there is no nudge.

        Args:
            x: points of the cubes, (B, *data).
            nudge: added to the latents, (B, *latent).
        """
        shift = torch.zeros_like(self.latent) if nudge is None else nudge
        pulled = self._pulled(
            "gradient", x, lambda rows: self._by_autograd(rows, x[rows], shift[rows])
        )
        if nudge is None:
            self._remember(x, self.active, pulled.error[self.active.cpu()])
        return pulled

    def implicit_gradient(self, x: Tensor) -> ErrorGradient:
        """The same without differentiating the inverse.

            (r - J(x)^T J(y)^-T r) / |r|,   r = y - x,   y = F^-1(F(x))

        J(y)^-T is taken from the linearization at y: by the implicit function theorem the
        derivative of the inverse, whatever iteration found y.
        """
        pulled = self._pulled(
            "implicit gradient", x, lambda rows: self._by_implicit_function(rows, x[rows])
        )
        self._remember(x, self.active, pulled.error[self.active.cpu()])
        return pulled

    def _pulled(
        self, kind: str, x: Tensor, pull: Callable[[Tensor], ErrorGradient]
    ) -> ErrorGradient:
        """What ``pull`` says of the active rows; if it raises or hangs, the errors alone."""
        rows = self.active
        error = torch.full((len(x),), math.inf, dtype=torch.float64)
        to_x, to_latent = torch.zeros_like(x), torch.zeros_like(self.latent)
        try:
            with time_limit(self.guarded.seconds):
                part = self._paid(kind, lambda: pull(rows))
            error[rows.cpu()], to_x[rows], to_latent[rows] = part.error, part.to_x, part.to_latent
        except (ModelError, TimedOut):
            error = self.errors(x)
        return ErrorGradient(error, to_x.nan_to_num(0, 0, 0), to_latent.nan_to_num(0, 0, 0))

    def _by_autograd(self, rows: Tensor, x: Tensor, nudge: Tensor) -> ErrorGradient:
        leaf, push = x.detach().clone().requires_grad_(), nudge.detach().clone().requires_grad_()
        model = self.model.select(rows)
        with torch.enable_grad(), self._frozen():
            z = model(leaf) + push
            kept = finite_rows(z).nonzero()[:, 0]
            if not len(kept):
                return ErrorGradient(
                    torch.full((len(x),), math.inf).double(),
                    torch.zeros_like(x),
                    torch.zeros_like(nudge),
                )
            back = model.inverse(z) if len(kept) == len(z) else model.select(kept).inverse(z[kept])
            # in float64: the square of a float32 error above 1e19 is infinite
            lengths = (back.double() - leaf[kept].double()).flatten(1).norm(dim=1)
            if not lengths.requires_grad:
                raise NotApplicable("the round trip has no derivative")
            to_x, to_latent = torch.autograd.grad(
                lengths.sum(), (leaf, push), materialize_grads=True
            )
        error = torch.full((len(x),), math.inf, dtype=torch.float64)
        error[kept.cpu()] = _lengths(back, x[kept])
        return ErrorGradient(error, to_x, to_latent)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """No graph for the parameters inside the block: layers may use inverses that they keep."""
        for parameter in self._trained:
            parameter.requires_grad_(False)  # noqa: FBT003
        try:
            yield
        finally:
            for parameter in self._trained:
                parameter.requires_grad_()

    def _by_implicit_function(self, rows: Tensor, x: Tensor) -> ErrorGradient:
        model = self.model.select(rows)
        there = Linearization(model, x)
        guarded = self.guarded.select(rows)
        back = guarded.inverse(there.output)
        error, to_x = _lengths(back, x), torch.zeros_like(x)
        kept = finite_rows(back).nonzero()[:, 0]
        if len(kept) == len(x):  # else the broken samples leave first
            residual = back - x
            pulled = there.vjp(Linearization(model, back).inverse_vjp(residual)).value().to(x)
            length = error.clamp(min=torch.finfo(torch.float64).tiny).to(x.device)
            to_x = (
                ((pulled - residual).flatten(1).double() / length.unsqueeze(1))
                .to(x.dtype)
                .reshape(x.shape)
            )
        return ErrorGradient(error, to_x, torch.zeros_like(there.output))

    def _paid(self, kind: str, call: Callable[[], Answer]) -> Answer:
        """``call()``, its price counted the first time and added to what is spent every time."""
        if kind in self.price:
            answer = call()
        else:
            answer, operations = count_operations(call)
            share = len(self.active) / len(self.points)
            self.price[kind] = operations / max(self._unit * share, 1.0)
        self.spent += self.price[kind]
        return answer

    def _remember(self, x: Tensor, rows: Tensor, error: Tensor) -> Tensor:
        """Keep the points that are the worst so far; all errors, broken samples at inf."""
        whole = torch.full((len(x),), math.inf, dtype=torch.float64)
        whole[rows.cpu()] = error
        worse = whole > self.error
        if bool(worse.any()):
            there = worse.to(x.device)
            self.points[there] = x[there].detach()
            self.error = torch.where(worse, whole, self.error)
            self.curve.append((self.spent, self.error.clone()))
        return whole


def run_attack(  # noqa: PLR0913
    model: Invertible,
    cubes: Cubes,
    strategy: Attack,
    *,
    generator: torch.Generator,
    seconds: float | int,
    parallel: WorkSharing = SERIAL,
    at_once: int = 1,
) -> Search:
    """Search the cubes: first their centres, then as the strategy says.

    Args:
        model: the map, as `AuditedModel`.
        cubes: where to search.
        strategy: how.
        generator: of its random numbers, on the CPU.
        seconds: limit of one call of the model.
        parallel: processes that may share independent searches.
        at_once: points of a sample that may be looked at together.
    """
    search = Search(
        model,
        cubes,
        budget=strategy.budget,
        generator=generator,
        seconds=seconds,
        parallel=parallel,
        at_once=at_once,
    )
    search.errors(cubes.centre)
    strategy.run(search)
    return search


def _lengths(back: Tensor, x: Tensor) -> Tensor:
    """|back - x| per sample, (B,) float64 on the CPU; inf where ``back`` is not finite."""
    length = (back.detach().double() - x.double()).flatten(1).norm(dim=1)
    return torch.where(finite_rows(back), length, torch.full_like(length, math.inf)).cpu()

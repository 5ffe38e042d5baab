"""What a model is fit for, by plain formulas on its library's own functions and float64 copies.

No audit and no routine of ``inn_guard`` for Jacobians, log-determinants, draws or gradients takes
part; of our own flows the layers' two directions are called, because they are the model. A figure
within a factor of two of its limit is near it and speaks for neither side.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import nflows.flows
import normflows
import torch
import zuko
from FrEIA.framework import SequenceINN
from scipy.stats import beta
from torch import Tensor, nn

from inn_guard.core.invertible import Invertible
from inn_guard.models.nif.model import NIF
from inn_guard.repair.mixed_precision import MixedPrecision

__all__ = ["REFUSALS", "Direction", "Step", "Truth", "base_of", "steps_of", "truths"]

FIT, NEAR, UNFIT, UNKNOWN = "fit", "near", "unfit", "unknown"
NATS, FEATURE, RATE, DRAW, DEGREES, LENGTH = 0.1, 0.01, 1e-3, 0.01, 1.0, 0.01
MARGIN = 2.0  #: between a figure and its limit
FORMULA_ROWS = 8  #: at which log-determinants are compared with dense Jacobians
GRADIENT_ROWS = 64
MOST_DRAWS, DRAWN_VALUES = 8192, 2**17
CONFIDENCE = 0.99
REFUSALS = (AssertionError, RuntimeError, ValueError)  #: what libraries raise on bad numbers

Direction = Callable[[Tensor], tuple[Tensor, Tensor]]  #: state -> next state, log|det J| (B,)


@dataclass(frozen=True)
class Step:
    """One layer: x -> (z, log|det J|), and z -> x."""

    forward: Direction
    inverse: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Truth:
    """Whether a model is fit for a use: fit, near its limit, unfit, or unknown; and the figure."""

    answer: str
    figure: float


def steps_of(flow: nn.Module) -> list[Step]:
    """The layers of a flow from the data on, as its library computes them.

    Raises:
        TypeError: for a flow of no library of the census.
    """
    if isinstance(flow, nflows.flows.Flow):
        layers = flow._transform._transforms
        return [Step(layer, lambda z, layer=layer: layer.inverse(z)[0]) for layer in layers]
    if isinstance(flow, SequenceINN):
        return [_freia_step(block) for block in flow.module_list]
    if isinstance(flow, normflows.NormalizingFlow):
        return [
            Step(_spread(layer.inverse), lambda z, layer=layer: layer(z)[0])
            for layer in reversed(flow.flows)
        ]
    if isinstance(flow, zuko.flows.Flow):
        parts = flow().transform.transforms
        return [Step(_spread(part.call_and_ladj), part.inv) for part in parts]
    if isinstance(flow, Invertible):
        return [Step(layer.forward_and_log_det, layer.inverse) for layer in flow.layers()]
    raise TypeError(f"expected a flow of the census, got {type(flow).__name__}")


def base_of(flow: nn.Module) -> tuple[Tensor, Tensor]:
    """Location and deviation of the base, which broadcast against flat latents."""
    if isinstance(flow, MixedPrecision):
        flow = flow.model
    parameter = next(flow.parameters())
    if isinstance(flow, normflows.NormalizingFlow):
        base = flow.q0
        return base.loc.detach().flatten(), base.log_scale.detach().exp().flatten()
    return parameter.new_zeros(()), parameter.new_ones(())


def _freia_step(block: nn.Module) -> Step:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        (z,), log_det = block([x])
        return z, log_det

    return Step(_spread(forward), lambda z: block([z], rev=True)[0][0])


def _spread(function: Callable[[Tensor], tuple[Tensor, Tensor | float]]) -> Direction:
    """A log-determinant that is one number holds for every sample."""

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = function(x)
        return z, torch.as_tensor(log_det, dtype=x.dtype).expand(len(x))

    return call


def encode(steps: list[Step], x: Tensor) -> tuple[Tensor, Tensor]:
    """z and the sum of the layers' log-determinants."""
    total = x.new_zeros(len(x))
    for step in steps:
        x, log_det = step.forward(x)
        total = total + log_det
    return x, total


def decode(steps: list[Step], z: Tensor) -> Tensor:
    """x, layer by layer."""
    for step in reversed(steps):
        z = step.inverse(z)
    return z


def truths(flow: nn.Module, x: Tensor) -> dict[str, Truth]:
    """Use -> what is true of it.

    Args:
        flow: in eval mode, in the dtype that is asked about.
        x: the rows that were audited, in that dtype.
    """
    found = {}
    for use, measure in _MEASURES.items():
        try:
            found[use] = measure(flow, x)
        except NotImplementedError:  # the library has no such operation in this dtype
            found[use] = Truth(UNKNOWN, math.nan)
        except REFUSALS:
            found[use] = Truth(UNFIT, math.inf)
    return found


def judged(figure: float, limit: float) -> str:
    """Fit up to half of the limit, unfit from twice the limit on.

    >>> judged(0.04, 0.1), judged(0.06, 0.1), judged(0.3, 0.1), judged(math.nan, 0.1)
    ('fit', 'near', 'unfit', 'unfit')
    """
    if figure <= limit / MARGIN:
        return FIT
    if figure <= limit * MARGIN:
        return NEAR
    return UNFIT


def largest(values: Tensor) -> float:
    """The largest value, infinite if one is not a number."""
    return values.detach().double().nan_to_num(nan=math.inf, posinf=math.inf).max().item()


# -- density: log N(z) + sum_k log|det J_k|, every J_k dense, in float64


def density(flow: nn.Module, x: Tensor) -> Truth:
    """The model's log p(x) against dense Jacobians of the layers of a float64 copy.

    At all rows against the copy's own formula, and that at 8 rows against the Jacobians.
    """
    if isinstance(flow, NIF):
        own = _nif_log_prob(flow, x).double()
        precise = _nif_by_covariance(copy.deepcopy(flow).double(), x.double())
        return _density_truth(own, precise, formula=0.0, dtype=x.dtype)
    wide = copy.deepcopy(flow).double()
    with torch.no_grad():
        own = _log_prob(flow, x).double()
        precise = _log_prob(wide, x.double())
    state, formula = x[:FORMULA_ROWS].double(), x.new_zeros((), dtype=torch.float64)
    for step in steps_of(wide):
        jacobian = dense_jacobian(lambda t, step=step: step.forward(t)[0], state)
        with torch.no_grad():
            state, log_det = step.forward(state)
        formula = formula + (torch.linalg.slogdet(jacobian).logabsdet - log_det)
    return _density_truth(own, precise, formula=largest(formula.abs()), dtype=x.dtype)


def _density_truth(own: Tensor, precise: Tensor, *, formula: float, dtype: torch.dtype) -> Truth:
    error = max(largest((own - precise).abs()), formula)
    answer = judged(error, NATS)
    # where the last bit of log p is worth the limit, the order of its sums decides
    last_bit = torch.finfo(dtype).eps * largest(own.abs())
    if answer == FIT and last_bit > NATS / MARGIN:
        answer = NEAR
    return Truth(answer, error)


def _log_prob(flow: nn.Module, x: Tensor) -> Tensor:
    location, deviation = base_of(flow)
    z, log_det = encode(steps_of(flow), x)
    scaled = (z.flatten(1) - location) / deviation
    dims = scaled.shape[1]
    logs = deviation.log().expand(dims).sum()
    return log_det - 0.5 * scaled.square().sum(1) - logs - 0.5 * dims * math.log(2 * math.pi)


@torch.no_grad()
def _nif_log_prob(flow: NIF, x: Tensor) -> Tensor:
    return flow.log_prob(x)


@torch.no_grad()
def _nif_by_covariance(flow: NIF, x: Tensor) -> Tensor:
    """log N(h; b, Sigma + A A^T) + log|det dh/dx| with the covariance as a matrix."""
    h, log_det = encode([Step(s.forward_and_log_det, s.inverse) for s in flow.flow.layers()], x)
    prior = flow.prior
    codes = prior(h[:1]).shape[1]
    start = prior.inverse(h.new_zeros(1, codes))
    widening = (prior.inverse(torch.eye(codes, dtype=h.dtype)) - start).T
    covariance = prior.log_variance.exp().diag() + widening @ widening.T
    normal = torch.distributions.MultivariateNormal(start[0], covariance)
    return normal.log_prob(h) + log_det


def dense_jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """dz/dx of every sample, (B, D, D), a backward pass for each output."""
    leaf = x.detach().clone().requires_grad_()
    z = function(leaf).flatten(1)
    rows = []
    for k in range(z.shape[1]):
        row = torch.autograd.grad(z[:, k].sum(), leaf, retain_graph=True, allow_unused=True)[0]
        rows.append(torch.zeros_like(x) if row is None else row)
    return torch.stack(rows, dim=1).flatten(2)


# -- sampling: the rate of draws that do not come back, of draws that the audit does not see


def sampling(flow: nn.Module, x: Tensor) -> Truth:
    """Fit or unfit where the 99 % interval of the rate excludes the limit."""
    steps = _both_ways(flow)
    location, deviation = base_of(flow)
    with torch.no_grad():
        shape = encode(steps, x[:1])[0].shape[1:]
    draws = max(2048, min(MOST_DRAWS, DRAWN_VALUES // x[0].numel()))
    generator = torch.Generator().manual_seed(20261)
    lost = 0
    for _ in range(draws // 2048):
        noise = torch.randn(2048, math.prod(shape), generator=generator, dtype=torch.float64)
        z = (location + deviation * noise.to(x.dtype)).reshape(-1, *shape)
        lost += len(z) - _returning(steps, z, deviation)
    tail = (1 - CONFIDENCE) / 2
    low, high = 0.0, 1.0
    if lost:
        low = float(beta.ppf(tail, lost, draws - lost + 1))
    if lost < draws:
        high = float(beta.ppf(1 - tail, lost + 1, draws - lost))
    answer = NEAR
    if low > RATE:
        answer = UNFIT
    elif high < RATE:
        answer = FIT
    elif lost == 0:
        answer = UNKNOWN  # too few draws to prove the rate
    return Truth(answer, lost / draws)


def _both_ways(flow: nn.Module) -> list[Step]:
    """The layers; of our own without log-determinants, which some do not have in every dtype."""
    if isinstance(flow, Invertible):
        zero = torch.zeros(())
        return [Step(lambda x, s=s: (s(x), zero), s.inverse) for s in flow.layers()]
    return steps_of(flow)


@torch.no_grad()
def _returning(steps: list[Step], z: Tensor, deviation: Tensor) -> int:
    """How many draws come back; in halves where the library refuses a whole batch."""
    try:
        x = decode(steps, z)
        again = encode(steps, x)[0]
    except NotImplementedError:  # of the dtype, not of the numbers
        raise
    except REFUSALS:
        if len(z) == 1:
            return 0
        middle = len(z) // 2
        return _returning(steps, z[:middle], deviation) + _returning(steps, z[middle:], deviation)
    off = (again.double() - z.double()).flatten(1) / deviation.double()
    error = off.square().mean(1).sqrt()
    return int(
        (x.flatten(1).isfinite().all(1) & (error <= max(DRAW, 8 * torch.finfo(z.dtype).eps))).sum()
    )


# -- reconstruction


@torch.no_grad()
def reconstruction(flow: nn.Module, x: Tensor) -> Truth:
    """|F^-1(F(x)) - x| over the feature's deviation or the entry; of a NIF from its latents."""
    steps = _both_ways(flow)
    start = x
    if isinstance(flow, NIF):
        start = encode(steps, x)[0]
        end = encode(steps, decode(steps, start))[0]
    else:
        end = decode(steps, encode(steps, x)[0])
    wide = start.double()
    shared = (0, *range(2, wide.dim()))  # the pixels of a channel are one feature
    deviation = wide.std(shared, correction=0, keepdim=True)
    unit = torch.maximum(deviation, wide.abs())
    error = largest(((end.double() - wide).abs() / unit).nan_to_num(nan=math.inf, posinf=math.inf))
    return Truth(judged(error, max(FEATURE, 8 * torch.finfo(x.dtype).eps)), error)


# -- gradients: every layer's input rebuilt from its output, but for the first layer's, which is x


def gradients(flow: nn.Module, x: Tensor) -> Truth:
    """Angle in degrees to plain backpropagation; unfit also where the length is off by 2 %."""
    if isinstance(flow, NIF):
        return Truth(UNKNOWN, math.nan)
    x = x[:GRADIENT_ROWS]
    steps = steps_of(flow)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    z, log_det = encode(steps, x)
    loss = (0.5 * z.flatten(1).square().sum(1) - log_det).mean()
    stored = _flat(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)
    rebuilt = _rebuilt(steps, x, parameters)
    if not bool((stored.isfinite() & rebuilt.isfinite()).all()):
        return Truth(UNFIT, math.inf)
    h, g = stored.norm(), rebuilt.norm()
    apart, together = (stored / h - rebuilt / g).norm(), (stored / h + rebuilt / g).norm()
    angle = math.degrees(2 * math.atan2(apart.item(), together.item()))
    length = ((g - h).abs() / h).item()
    answers = {judged(angle, DEGREES), judged(length, LENGTH)}
    answer = next(one for one in (UNFIT, NEAR, FIT) if one in answers)
    return Truth(answer, angle)


def _rebuilt(steps: list[Step], x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        state = encode(steps, x)[0]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    up = state / len(x)  # of the mean of |z|^2 / 2
    for k in reversed(range(len(steps))):
        with torch.no_grad():
            state = x if k == 0 else steps[k].inverse(state)
        leaf = state.detach().clone().requires_grad_()
        z, log_det = steps[k].forward(leaf)
        value = (z * up).sum() - log_det.mean()
        up, *found = torch.autograd.grad(value, [leaf, *parameters], allow_unused=True)
        total = total + _flat(found, parameters)
    return total


def _flat(found: Iterable[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    parts = []
    for gradient, parameter in zip(found, parameters, strict=True):
        part = torch.zeros_like(parameter) if gradient is None else gradient
        parts.append(part.flatten().double())
    return torch.cat(parts)


_MEASURES: dict[str, Callable[[nn.Module, Tensor], Truth]] = {
    "density": density,
    "sampling": sampling,
    "reconstruction": reconstruction,
    "gradients": gradients,
}

"""What each flow is fit for, by plain formulas on the library's own functions and float64 copies.

No routine of inn_guard takes part. The limits are those of the question: 0.1 nats, 1 % of a
feature, one draw in a thousand lost, 1 degree. A figure within a factor of two of its limit is near
it and counts for neither side.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

import torch
from scipy.stats import beta
from torch import Tensor

from tests.zoo.flows import Chain, Flow, decode, encode, in_float64

NATS, FEATURE, RATE, DRAW, ANGLE, LENGTH = 0.1, 0.01, 1e-3, 0.01, 1.0, 0.01
NEAR = 2.0
BLOCK = 4096
GRADIENT_ROWS = 64


class Truth(enum.Enum):
    """Whether a model is fit for a use."""

    FIT = "fit"
    UNFIT = "unfit"
    NEAR = "near"


def judged(figure: float, limit: float) -> Truth:
    if figure <= limit / NEAR:
        return Truth.FIT
    return Truth.NEAR if figure <= limit * NEAR else Truth.UNFIT


def worse(a: Truth, b: Truth) -> Truth:
    order = (Truth.FIT, Truth.NEAR, Truth.UNFIT)
    return max(a, b, key=order.index)


def largest(values: Tensor) -> float:
    return values.double().nan_to_num(nan=math.inf, posinf=math.inf).max().item()


def truths(flow: Flow, x: Tensor) -> dict[str, tuple[Truth, float]]:
    """use -> (truth, figure)."""
    found = {}
    for use, measure in MEASURES.items():
        try:
            found[use] = measure(flow, x)
        except (
            AssertionError,
            RuntimeError,
            ValueError,
        ):  # a spline without a root, a failed check
            found[use] = (Truth.UNFIT, math.inf)
    return found


def density(flow: Flow, x: Tensor) -> tuple[Truth, float]:
    """Against the float64 copy, and its log-determinant against autograd, layer by layer."""
    module = flow.make()
    wide = in_float64(module)
    with torch.no_grad():
        own = log_prob(flow, module, x)
        off = own.double() - log_prob(flow, wide, x.double())
    error = largest(off.abs())
    # the last bit of a log p of a million nats is worth the limit: the order of its sums decides
    last_bit = torch.finfo(own.dtype).eps * largest(own.abs())
    formula = 0.0
    state = x[:16].double()
    for forward, _ in flow.chain(wide):
        jacobian = dense_jacobian(lambda t, forward=forward: forward(t)[0], state)
        with torch.no_grad():
            state, log_det = forward(state)
        formula = formula + (torch.linalg.slogdet(jacobian)[1] - log_det)
    wrong = largest(formula.abs()) if isinstance(formula, Tensor) else 0.0
    truth = worse(judged(error, NATS), judged(wrong, NATS))
    if truth is Truth.FIT and last_bit > NATS / NEAR:
        truth = Truth.NEAR
    return truth, max(error, wrong)


def log_prob(flow: Flow, module: torch.nn.Module, x: Tensor) -> Tensor:
    location, deviation = flow.base(module)
    z, log_det = encode(flow.chain(module), x)
    scaled = (z - location) / deviation
    constant = 0.5 * math.log(2 * math.pi) * x.shape[1]
    return log_det - 0.5 * scaled.square().sum(1) - deviation.log().sum() - constant


def dense_jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    z = function(leaf)
    rows = []
    for k in range(z.shape[1]):
        row = torch.autograd.grad(z[:, k].sum(), leaf, retain_graph=True, allow_unused=True)[0]
        rows.append(torch.zeros_like(x) if row is None else row)
    return torch.stack(rows, dim=1)


def reconstruction(flow: Flow, x: Tensor) -> tuple[Truth, float]:
    module = flow.make()
    chain = flow.chain(module)
    with torch.no_grad():
        back = decode(chain, encode(chain, x)[0])
    scale = torch.maximum(x.double().std(0), x.double().abs())
    error = largest((back.double() - x.double()).abs() / scale)
    return judged(error, FEATURE), error


def sampling(flow: Flow, x: Tensor) -> tuple[Truth, float]:
    """The rate of lost draws, from draws that the audit does not see."""
    module = flow.make()
    chain = flow.chain(module)
    location, deviation = flow.base(module)
    generator = torch.Generator().manual_seed(20261)
    lost = 0
    for _ in range(flow.draws // BLOCK):
        z = location + deviation * torch.randn(BLOCK, x.shape[1], generator=generator)
        lost += BLOCK - returning(chain, z, deviation)
    low = float(beta.ppf(0.005, lost, flow.draws - lost + 1)) if lost else 0.0
    high = float(beta.ppf(0.995, lost + 1, flow.draws - lost)) if lost < flow.draws else 1.0
    if low > RATE:
        truth = Truth.UNFIT
    else:
        truth = Truth.FIT if high < RATE else Truth.NEAR
    return truth, lost / flow.draws


@torch.no_grad()
def returning(chain: Chain, z: Tensor, deviation: Tensor) -> int:
    """How many draws come back; one by one where the library refuses a whole batch."""
    try:
        x = decode(chain, z)
        again = encode(chain, x)[0]
    except (AssertionError, RuntimeError, ValueError):
        if len(z) == 1:
            return 0
        middle = len(z) // 2
        return returning(chain, z[:middle], deviation) + returning(chain, z[middle:], deviation)
    off = ((again - z) / deviation).double().square().mean(1).sqrt()
    return int((x.isfinite().all(1) & (off <= DRAW)).sum())


def gradients(flow: Flow, x: Tensor) -> tuple[Truth, float]:
    """Gradients of the likelihood with every state rebuilt by the inverse, against autograd."""
    module = flow.make()
    chain = flow.chain(module)
    x = x[:GRADIENT_ROWS]
    parameters = [p for p in module.parameters() if p.requires_grad]
    z, log_det = encode(chain, x)
    loss = (0.5 * z.square().sum(1) - log_det).mean()
    stored = _flat(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)
    rebuilt = _rebuilt(chain, x, parameters)
    if not bool((stored.isfinite() & rebuilt.isfinite()).all()):
        return Truth.UNFIT, math.inf
    h, g = stored.norm(), rebuilt.norm()
    apart = (stored / h - rebuilt / g).norm() / 2
    angle = math.degrees(2 * math.asin(min(1.0, apart.item())))
    length = ((g - h).abs() / h).item()
    return worse(judged(angle, ANGLE), judged(length, LENGTH)), angle


def _rebuilt(chain: Chain, x: Tensor, parameters: list[Tensor]) -> Tensor:
    """As memory saving does it: from z backwards, each layer's input from its output."""
    with torch.no_grad():
        state = encode(chain, x)[0]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    up = state / len(x)  # of the mean of |z|^2 / 2
    for forward, inverse in reversed(chain):
        with torch.no_grad():
            state = inverse(state)
        leaf = state.detach().clone().requires_grad_()
        z, log_det = forward(leaf)
        value = (z * up).sum() - log_det.mean()
        up, *found = torch.autograd.grad(value, [leaf, *parameters], allow_unused=True)
        total = total + _flat(found, parameters)
    return total


def _flat(
    found: tuple[Tensor | None, ...] | list[Tensor | None], parameters: list[Tensor]
) -> Tensor:
    parts = []
    for gradient, parameter in zip(found, parameters, strict=True):
        part = torch.zeros_like(parameter) if gradient is None else gradient
        parts.append(part.flatten().double())
    return torch.cat(parts)


MEASURES = {
    "density": density,
    "sampling": sampling,
    "reconstruction": reconstruction,
    "gradients": gradients,
}

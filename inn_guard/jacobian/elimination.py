"""det J of one layer from a few products J^T u, where J has structure: exact, and no J is formed.

A column of J with one entry that is not zero lets det J be expanded along it (Laplace): its row and
column drop out, and the next columns may then have one entry. The active half of a coupling drops
out first, then the half that it leaves alone; a permutation or a scale drops out at once. In
images, columns whose entries all lie at their own position drop out together: 1x1 convolutions,
and couplings that are followed by one. Two couplings in one layer are cut apart first. Which
columns these are is not known from the class of the layer but found with random vectors, and
confirmed with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.core.layer_jacobian import AutogradJacobian
from inn_guard.core.tensors import finite_rows

__all__ = [
    "Remainder",
    "eliminate_columns",
    "eliminate_halves",
    "eliminate_positions",
    "nothing_eliminated",
]

PROBES = 3  #: products that find the columns with one entry
#: Relative error of a product of one entry that rounding explains in float64; a column with a
#: second entry above this share of the first one is not taken for one with one entry.
TOLERANCE = 1e-10
MAX_CHANNELS = 128  #: of the small matrices of positions


@dataclass(frozen=True)
class Remainder:
    """What is left of J when its simple columns have dropped out.

    |det J| = exp(log_abs) |det J[rows, columns]|; the sign is known up to one that all samples
    share.

    Attributes:
        log_abs: natural logarithm of what dropped out, (B,) float64.
        sign: of what dropped out, 1 or -1, (B,).
        rows: numbers of the outputs that are left.
        columns: numbers of the inputs that are left, as many.
    """

    log_abs: Tensor
    sign: Tensor
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class _Pullback:
    """u -> J^T u of all samples, (B, dim z) -> (B, dim x).

    Attributes:
        product: the map.
        like: a tensor (B, dim z).
    """

    product: Callable[[Tensor], Tensor]
    like: Tensor

    def of(self, rows: Tensor, code: Tensor) -> Tensor:
        """J^T u with u the same code in these rows of every sample, and 0 elsewhere."""
        u = torch.zeros_like(self.like)
        u[:, rows] = code.to(u)
        return self.product(u)


def _of(jacobian: AutogradJacobian) -> _Pullback:
    shape = jacobian.output.shape
    return _Pullback(
        lambda u: jacobian.vjp(u.reshape(shape)).flatten(1), jacobian.output.flatten(1)
    )


def eliminate_columns(jacobian: AutogradJacobian, x: Tensor) -> Remainder:
    """Expand along columns with one entry as long as there are more of them than probes cost.

    Args:
        jacobian: of a layer at x, in float64.
        x: (B, *data).
    """
    return _eliminated(_of(jacobian), nothing_eliminated(jacobian, x))


def _eliminated(pull: _Pullback, left: Remainder) -> Remainder:
    """What is left after all columns with one entry have dropped out, round by round."""
    rows, columns = left.rows, left.columns
    log_abs, sign = left.log_abs, left.sign
    while len(columns):
        places, entries, single = _single_entries(pull, rows, columns)
        found = int(single.sum())
        if found < len(columns) and found <= PROBES:
            break
        log_abs = log_abs + entries[:, single].abs().log().sum(1)
        sign = sign * entries[:, single].sign().prod(1)
        used = torch.zeros_like(rows, dtype=torch.bool)
        used[places[single]] = True
        rows = rows[~used]
        columns = columns[~single]
    return Remainder(log_abs, sign, rows, columns)


def eliminate_halves(jacobian: AutogradJacobian, x: Tensor) -> Remainder | None:
    """The same for two couplings in one layer: z1 = a1(x2) x1 + b1(x2), z2 = a2(z1) x2 + b2(z1).

    With the outputs cut in two, J = [[A, B], [C, D]] and A has one entry in every row and column,
    |det J| = |det A| |det S| with Schur's complement S = D - C A^-1 B, whose columns then drop out.
    A product S^T u takes two products J^T u. The cut is tried at half of the channels.

    Returns:
        no rows or columns are left; None where the layer has no such structure.
    """
    pull = _of(jacobian)
    whole = nothing_eliminated(jacobian, x)
    channels = jacobian.output.shape[1]
    each = jacobian.output[0].numel() // channels
    for cut in sorted({channels // 2, channels - channels // 2}):
        top = whole.rows[: cut * each]
        places, entries, single = _single_entries(pull, top, whole.columns)
        if not 0 < int(single.sum()) == len(top):
            continue
        A = entries[:, single]
        rows = top[places[single]]
        columns = whole.columns[single]
        start = Remainder(
            A.abs().log().sum(1), A.sign().prod(1), whole.rows[cut * each :], whole.columns[~single]
        )
        left = _eliminated(_schur(pull, A, rows, columns), start)
        if not len(left.rows):
            return left
    return None


def _schur(pull: _Pullback, A: Tensor, rows: Tensor, columns: Tensor) -> _Pullback:
    """u -> S^T u, for u that is 0 in these rows; read at the other columns."""

    def pulled(u: Tensor) -> Tensor:
        image = pull.product(u)
        through = torch.zeros_like(u)
        through[:, rows] = image[:, columns] / A
        return image - pull.product(through)

    return _Pullback(pulled, pull.like)


def _single_entries(
    pull: _Pullback, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For every column: the place of its one row in ``rows``, the entry, and whether it is so.

    With a random vector r, a column with one entry a in row i makes r_i a of J^T r, and k_i r_i a
    of J^T (k r), with k the numbers of the rows: the quotient is the number of its row. A second
    random vector confirms the row and the entry.
    """
    count = len(rows)
    first, second = _codes(2, count, rows.device)
    numbers = torch.arange(1, count + 1, dtype=torch.float64, device=rows.device)
    plain = pull.of(rows, first)[:, columns]
    numbered = pull.of(rows, first * numbers)[:, columns]
    other = pull.of(rows, second)[:, columns]
    finite = finite_rows(plain) & finite_rows(numbered) & finite_rows(other)
    if not bool(finite.any()):
        nowhere = torch.zeros_like(columns)
        return nowhere, plain, nowhere.bool()
    quotient = (numbered / plain)[finite]
    number = quotient.nan_to_num(0.0).round().clamp(1, count)
    place = number[0].long() - 1
    entries = plain / first[place]
    agrees = (number == number[:1]) & _close(quotient, number, number)
    expected = (entries * second[place])[finite]
    agrees &= _close(other[finite], expected, entries[finite].abs())
    single = agrees.all(0)
    # two columns with their one entry in the same row make J singular: that is left to a dense J
    shared = torch.bincount(place[single], minlength=count)[place] > 1
    return place, entries, single & ~shared


def eliminate_positions(jacobian: AutogradJacobian, x: Tensor) -> Remainder | None:
    """The same for images: expand along channels whose columns stay at their own position.

    At every position p the channels with that property have a small matrix M_p = Q_p R_p. Their
    determinant is that of R_p, and the rows Q_p^T that are orthogonal to M_p go on with the other
    channels. Takes 2 C products of the whole batch for C channels in each round.

    Returns:
        no rows or columns are left; None where the layer has no such structure.
    """
    channels = x.shape[1]
    if x.dim() < 3 or jacobian.output.shape != x.shape or channels > MAX_CHANNELS:
        return None
    positions = x[0, 0].numel()
    whole = nothing_eliminated(jacobian, x)
    log_abs, sign = whole.log_abs, whole.sign
    left = torch.arange(channels, device=x.device)
    basis = torch.eye(channels, dtype=x.dtype, device=x.device)
    basis = basis.expand(len(x), positions, channels, channels)
    while len(left):
        matrices, local = _local_channels(jacobian, basis, left, x)
        if not bool(local.any()):
            return None
        count = int(local.sum())
        Q, R = torch.linalg.qr(matrices[..., local].nan_to_num(0.0), mode="complete")
        diagonal = R.diagonal(dim1=2, dim2=3)[..., :count]
        broken = ~finite_rows(matrices)
        gained = diagonal.abs().log().flatten(1).sum(1)
        log_abs = log_abs + torch.where(broken, math.nan, gained)
        turned = torch.linalg.slogdet(Q).sign.prod(1)
        sign = sign * turned * diagonal.sign().flatten(1).prod(1)
        basis = Q[..., count:].mT @ basis
        left = left[~local]
    none = torch.zeros(0, dtype=torch.long, device=x.device)
    return Remainder(log_abs, sign, none, none)


def _local_channels(
    jacobian: AutogradJacobian, basis: Tensor, left: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """The matrices (B, P, k, channels left) at all positions, and which channels they are true of.

    With row a of the basis times a random number r_p at every position p, J^T u has at position p
    only the column's own entries times r_p, if there are no others. Another random vector confirms
    that.
    """
    samples, positions, count, channels = basis.shape
    first, second = _codes(2, positions, x.device)
    matrices = x.new_zeros(samples, positions, count, len(left))
    gap = x.new_zeros(samples, len(left))
    size = x.new_zeros(samples, len(left))
    for a in range(count):
        pulled = []
        for code in (first, second):
            u = (basis[:, :, a] * code[:, None]).mT.reshape(samples, channels, *x.shape[2:])
            pulled.append(jacobian.vjp(u).flatten(2)[:, left].mT)
        matrices[:, :, a] = pulled[0] / first[:, None]
        off = (matrices[:, :, a] * second[:, None] - pulled[1]).abs().amax(1)
        gap = torch.maximum(gap, off)
        size = torch.maximum(size, pulled[0].abs().amax(1))
    finite = finite_rows(size) & finite_rows(gap)
    if not bool(finite.any()):
        return matrices, torch.zeros_like(left, dtype=torch.bool)
    return matrices, (gap <= TOLERANCE * size)[finite].all(0)


def _codes(count: int, size: int, device: torch.device) -> Tensor:
    """Random numbers between 1 and 2, none of which is small, (count, size)."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.rand(count, size, generator=generator, dtype=torch.float64, device="cpu")
    return (1 + codes).to(device)


def _close(a: Tensor, b: Tensor, size: Tensor) -> Tensor:
    return (a - b).abs() <= TOLERANCE * size


def nothing_eliminated(jacobian: AutogradJacobian, x: Tensor) -> Remainder:
    """What is left of J before anything has dropped out: all rows and columns."""
    rows = torch.arange(jacobian.output[0].numel(), device=x.device)
    columns = torch.arange(x[0].numel(), device=x.device)
    zero = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    return Remainder(zero, torch.ones_like(zero), rows, columns)

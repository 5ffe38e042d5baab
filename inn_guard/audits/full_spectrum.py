"""full_spectrum: all singular values of the Jacobian of a few samples."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from inn_guard.audits.audited_model import AuditedModel
from inn_guard.audits.context import AuditContext
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.level import Level
from inn_guard.audits.spec import audit_check
from inn_guard.core.layer_jacobian import (
    AutogradJacobian,
    NotApplicable,
    is_adjoint_pair,
    random_vectors,
)
from inn_guard.execution.parallel import WorkSharing
from inn_guard.execution.progress import ProgressBar
from inn_guard.jacobian.dense import composed_jacobian, is_composable
from inn_guard.jacobian.singular_values import Spectrum, full_jacobian, resolution, spectrum
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict

__all__ = ["full_spectrum"]

PATIENCE = 3.0  #: seconds after which a progress bar appears, on a terminal
MAX_ENTRIES = 2**27  #: of one sample's dense Jacobian


def _cost(task: Task) -> Cost:
    rows = Passes(linearize=1, product=task.dimension) * task.chosen
    # the Jacobian in the model's dtype, and in float64 for its decomposition
    passes = Passes(forward=1) * task.samples + rows
    return Cost(passes, 1, linearized=True, vectors=4 * task.dimension)


@audit_check(
    question="What are all singular values of the Jacobian?",
    level=Level.FULL,
    cost=_cost,
    shares_samples=True,
)
def full_spectrum(context: AuditContext, *, samples: int = 2) -> AuditResult:
    """All singular values of J = dF/dx of a few samples, no unit.

    J is composed layer by layer where all layers can and autograd agrees, else formed row by row,
    in the model's dtype; it is decomposed in float64. Values below `resolution` of the largest one
    are rounding noise of the dense J; they are counted as not resolved, not printed:
    jacobian_spectrum measures the smallest one without a dense Jacobian.

    Args:
        context: model and data.
        samples: how many of the samples with finite latents are measured, the first ones.

    Returns:
        per sample ``singular_values`` (samples, D) in descending order, NaN where not resolved.

    Raises:
        NotApplicable: if a dense Jacobian would not fit into memory.
    """
    x = context.x
    rows = context.usable_rows()[:samples]
    if not len(rows):
        reason = "no sample has a finite latent: there is no Jacobian to measure"
        return AuditResult("full_spectrum", Verdict.NON_FINITE, reason)
    if x[0].numel() ** 2 > MAX_ENTRIES:
        raise NotApplicable(f"a dense Jacobian of D = {x[0].numel()} does not fit into memory")
    values, resolved = _spectra(context, rows)
    unreadable = int((~resolved).sum(1).max())
    reason = f"{values.shape[1] - unreadable} of {values.shape[1]} singular values are resolved"
    if unreadable:
        reason += (
            f"; the rest is below {resolution(x.dtype):.0e} of the largest one, rounding noise of "
            "a dense Jacobian"
        )
    finite = bool(values.isfinite().all())
    readable = torch.where(resolved, values, torch.full_like(values, math.nan))
    return AuditResult(
        "full_spectrum",
        Verdict.STABLE if finite else Verdict.NON_FINITE,
        reason if finite else "the Jacobian has entries that are not finite",
        headline=("sigma_max", "smallest_resolved", "not_resolved"),
        values={
            "sigma_max": values[:, 0].max().item(),
            "smallest_resolved": readable.nan_to_num(math.inf, posinf=math.inf).min().item(),
            "not_resolved": float(unreadable),
        },
        per_sample={"singular_values": readable},
        settings={"samples": len(rows), "of": len(x), "resolution": resolution(x.dtype)},
    )


def _spectra(context: AuditContext, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and whether they are resolved, (samples, D) each.

    All processes form one sample's Jacobian after the other together; then each decomposes one of
    them.
    """
    parallel = context.parallel
    found: list[Spectrum] = []
    with ProgressBar(
        total=len(rows), desc="spectrum", delay=PATIENCE, disable=True if parallel.rank else None
    ) as bar:
        for together in rows.split(parallel.size):
            mine = None
            for k, row in enumerate(together.split(1)):
                J = _jacobian(*context.at(row), parallel)
                mine = J if k == parallel.rank else mine
            spectra = parallel.all_gather(
                lambda mine=mine: None if mine is None else spectrum(mine)
            )  # type: ignore[misc]
            found += [one for one in spectra if one is not None]
            bar.update(len(together))
    return torch.cat([one.values for one in found]), torch.cat([one.resolved for one in found])


def _jacobian(model: AuditedModel, x: Tensor, parallel: WorkSharing) -> Tensor:
    """J from the layers' own factors if autograd agrees on a random vector, else row by row.

    Its columns, or its rows, are shared over the processes, which go the same way.
    """
    if all(parallel.all_gather(lambda: is_composable(model, x))):
        # factors that raise are ours, and no finding about the model
        with contextlib.suppress(Exception):
            columns = torch.arange(x[0].numel(), device=x.device)
            (found,) = parallel.map(
                columns, lambda part: (composed_jacobian(model, x, columns=_range(part))[0].T,)
            )
            if all(parallel.all_gather(lambda: _agrees(model, x, found.T))):
                return found.T[None]
    rows = torch.arange(model(x)[0].numel(), device=x.device)
    return parallel.map(
        rows, lambda part: (full_jacobian(model.forward, x, rows=_range(part))[0],)
    )[0][None]


def _agrees(model: AuditedModel, x: Tensor, J: Tensor) -> bool:
    whole = AutogradJacobian(model.forward, model.inverse, x)
    v, w = random_vectors(x, whole.output)
    image = torch.einsum("ij,bj->bi", J, v.flatten(1)).reshape(w.shape)
    return is_adjoint_pair(image, w, v, whole.vjp(w))


def _range(part: Tensor) -> range:
    return range(int(part[0]), int(part[-1]) + 1)

"""dequantization_attack: the worst round trip of a valid sample next to a training image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.audited_model import ModelError
from inn_guard.audits.context import AuditContext
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.dequantization_attack.quantization import Cubes, Quantization
from inn_guard.audits.dequantization_attack.restarts import Restarts
from inn_guard.audits.dequantization_attack.search import Attack, Search, run_attack
from inn_guard.audits.dequantization_attack.spectral_ascent import SpectralAscent
from inn_guard.audits.dequantization_attack.spsa import GradientFree
from inn_guard.audits.fault_tolerant import Guarded, patience
from inn_guard.audits.level import Level
from inn_guard.audits.spec import audit_check
from inn_guard.audits.thresholds import data_scale
from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.core.tensors import finite_rows
from inn_guard.execution.time_limit import time_limit
from inn_guard.report.formatting import brief
from inn_guard.report.result import AuditResult, to_full_batch
from inn_guard.report.verdict import Verdict

__all__ = ["dequantization_attack", "differentiable_inverse"]

MISMATCH = 0.05  #: |J^T J^-T w - w| / |w| up to which the inverse's derivative is called right
#: ... plus this many times the relative error of the round trip, which bears the same rounding.
NOISE = 100.0
SHOWN = 8  #: images, the worst ones
REMEDY = (
    "Train with a regularizer (RegularizerHook), or use layers with a bounded inverse: these are "
    "valid training samples."
)
TOGETHER = 8  #: points of a sample in one batch, where memory has no bound
POINTS = 60  #: of the curve in the table


def _cost(task: Task) -> Cost:
    budget = getattr(task.settings.get("strategy"), "budget", 800.0)
    return Cost(Passes(forward=budget) * task.chosen, task.chosen, linearized=True, vectors=4)


@audit_check(
    question="How large can the round-trip error of a valid dequantized image be?",
    level=Level.FULL,
    cost=_cost,
    shares_samples=lambda settings: isinstance(settings.get("strategy"), Restarts),
)
def dequantization_attack(
    context: AuditContext,
    *,
    quantization: Quantization | None = None,
    strategy: Attack | None = None,
    samples: int = 8,
) -> AuditResult:
    """Largest |x' - F^-1(F(x'))|_2 among the dequantized samples x' of an image, in units of x.

    An image of integers n becomes a continuous sample by adding noise: every x' in the cube low +
    (high - low) [n, n + 1) / 2^bits is a valid training sample. The cubes are searched for the
    points that come back worst; each is checked to lie in its cube in the model's own dtype, and
    its round trip is run once more. Unstable: the largest entry of the error over the sample's
    scale exceeds ``limits.reconstruction``, or is not finite. It explains; no use depends on it.
    Processes share the starts of ``Restarts``.

    Args:
        context: a bijective model, and data (B, *data), dequantized or on the grid; the cube is
            that of the integers they came from.
        quantization: how integers became inputs. Default: 8 bits over the range that x seems to
            have.
        strategy: how to search, and for how much. Default: ``SpectralAscent()``, or
            ``GradientFree()`` where the derivative of the inverse is measured to be wrong.
            ``ProjectedGradient()`` is the paper's attack.
        samples: how many of the finite samples are attacked, the first ones.

    Returns:
        max_error, at the centres and at the worst points; the samples broken; per sample; the
        attack's curve (errors against forward-equivalents); the worst points as images.

    Raises:
        NotApplicable: if the map is injective only, or its dtype has no number in some cube.
        ValueError: if x lies outside of the quantization's range.

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), appendix E. This differs from the paper in: the
        default strategy (see ``SpectralAscent``).
    """
    if not context.model.bijective:
        raise NotApplicable(
            "the map is injective only: x -> z -> x is a projection, whose error says nothing"
        )
    rows = context.finite_rows()[: int(min(samples, context.max_linearized(8)))]
    if not len(rows):
        return AuditResult("dequantization_attack", Verdict.NON_FINITE, "no sample of x is finite")
    chosen, start = context.at(rows)
    assumed = quantization is None
    quantization = Quantization.assumed(start) if quantization is None else quantization
    cubes = quantization.cubes(start)
    seconds = max(context.parallel.all_gather(lambda: patience(chosen, cubes.centre)))
    if strategy is None:
        right = differentiable_inverse(chosen, cubes.centre, seconds=seconds, seed=context.seed)
        strategy = SpectralAscent() if right else GradientFree()
    search = run_attack(
        chosen,
        cubes,
        strategy,
        generator=context.generator(),
        seconds=seconds,
        parallel=context.parallel,
        at_once=TOGETHER if context.parallel.memory is None else 1,
    )
    found = _WorstPoints.of(search, chosen)
    usable = context.limits.round_trip(start.dtype)
    verdict, reason = found.judged(usable)
    if assumed:
        reason += (
            f"; assumed {quantization.bits} bits from {quantization.low:.4g} to "
            f"{quantization.high:.4g}"
        )
    return AuditResult(
        "dequantization_attack",
        verdict,
        reason,
        headline=("relative_error", "centre_error"),
        values=found.values(),
        units=dict.fromkeys(
            ("max_error", "centre_error", "median_error", "error", "largest_error"), "units of x"
        )
        | {"spent": "forwards"},
        **to_full_batch(
            {"error": found.again, "centre_error": found.at_centre}, rows, len(context.x)
        ),
        tables={"attack_curve": _curve(search), "price": _prices(search)},
        settings={
            "strategy": repr(strategy),
            "bits": quantization.bits,
            "low": str(quantization.low),
            "high": str(quantization.high),
            "quantization": "assumed" if assumed else "given",
            "samples": len(rows),
            "of": len(context.x),
            "seed": context.seed,
            "limit": usable,
            "failures": str(search.guarded.failures) or "none",
        },
        advice=REMEDY if verdict.failed else "",
        images=found.images(start),
    )


def differentiable_inverse(
    model: Invertible, x: Tensor, *, seconds: float | int, seed: int = 0
) -> bool:
    """Whether autograd through the inverse is its derivative: J^T J^-T w = w for a random w.

    Where the round trip is off, so may be the product, by as much; such a map is taken at its word.
    """
    w = torch.randn(
        x.shape, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float64
    ).to(x)
    leaf = x.detach().clone().requires_grad_()
    try:
        with torch.enable_grad(), time_limit(seconds):
            back = model.inverse(model(leaf))
            (pulled,) = torch.autograd.grad(back, leaf, w, allow_unused=True)
    except (ModelError, NotApplicable, RuntimeError):
        return False
    if pulled is None:
        return False
    off = (back.detach() - x).double().flatten(1).norm(dim=1) / x.double().flatten(1).norm(
        dim=1
    ).clamp(min=1e-300)
    mismatch = (pulled - w).double().flatten(1).norm(dim=1) / w.double().flatten(1).norm(dim=1)
    known = off.isfinite() & mismatch.isfinite()
    return bool((mismatch <= MISMATCH + NOISE * off)[known].all())


@dataclass(frozen=True)
class _WorstPoints:
    """The worst points, measured again; errors are (B,) float64, inf where not finite."""

    points: Tensor
    back: Tensor
    at_centre: Tensor
    searched: Tensor
    again: Tensor
    relative: Tensor
    valid: Tensor
    spent: float

    @classmethod
    def of(cls, search: Search, model: Invertible) -> _WorstPoints:
        cubes: Cubes = search.cubes
        guarded = Guarded(model, cubes.centre, seconds=search.guarded.seconds)
        back = guarded.inverse(guarded.forward(search.points))
        off = (back.double() - search.points.double()).flatten(1)
        whole = finite_rows(back)
        infinite = torch.full_like(off[:, 0], math.inf)
        return cls(
            points=search.points,
            back=back,
            at_centre=search.curve[0][1],
            searched=search.error,
            again=torch.where(whole, off.norm(dim=1), infinite).cpu(),
            # all entries of quantized data have one unit
            relative=(
                torch.where(whole, off.abs().amax(1), infinite) / data_scale(search.points)
            ).cpu(),
            valid=cubes.contain(search.points).cpu(),
            spent=search.spent,
        )

    def judged(self, usable: float) -> tuple[Verdict, str]:
        count, broken = len(self.again), int(self.again.isinf().sum())
        if not bool(self.valid.all()):
            raise RuntimeError(
                "the search left its cube: this is a fault of the attack, please report it"
            )
        if broken:
            reason = (
                f"valid dequantized samples of {broken} of {count} images come back as NaN or Inf"
            )
            return Verdict.NON_FINITE, reason + self._before
        worst, bad = self.relative.max().item(), int((self.relative > usable).sum())
        if bad:
            reason = (
                f"valid dequantized samples of {bad} of {count} images come back off by up to "
                f"{brief(worst)}"
            )
            return Verdict.UNSTABLE, f"{reason} of their scale{self._before}"
        reason = (
            f"no dequantized sample was found that comes back off by more than {brief(worst)} "
            "of its scale"
        )
        return Verdict.STABLE, f"{reason}; an attack finds failures, it cannot rule them out"

    @property
    def _before(self) -> str:
        broken = int(self.at_centre.isinf().sum())
        if broken:
            return f" ({broken} of them at the centre of the cube already)"
        largest = brief(self.at_centre.max().item())
        return f" (at the centres of the cubes the largest error is {largest})"

    def values(self) -> dict[str, float]:
        growth = self.again / self.at_centre
        same = (self.again == self.searched) | ((self.again / self.searched - 1).abs() < 1)
        return {
            "max_error": self.again.max().item(),
            "median_error": self.again.median().item(),
            "centre_error": self.at_centre.max().item(),
            "relative_error": self.relative.max().item(),
            "median_growth": growth.nan_to_num(1.0, posinf=math.inf).median().item(),
            "non_finite_samples": float(self.again.isinf().sum()),
            "reproduced_samples": float(same.sum()),
            "spent": self.spent,
        }

    def images(self, x: Tensor) -> dict[str, Tensor]:
        """The worst pairs: image, point found, its reconstruction, and the two differences."""
        if x.dim() != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 2:
            return {}
        rows = self.again.argsort(descending=True)[:SHOWN].to(x.device)
        original, point, back = (t[rows].detach().cpu() for t in (x, self.points, self.back))
        return {
            "original": original,
            "point found": point,
            "reconstruction": back,
            "difference of point and original": point - original,
            "difference of reconstruction and point": back - point,
        }


def _curve(search: Search) -> tuple[Mapping[str, Any], ...]:
    step = max(1, math.ceil(len(search.curve) / POINTS))
    kept = [*search.curve[:-1:step], search.curve[-1]]
    if search.spent > kept[-1][0]:
        kept.append((search.spent, search.error))
    return tuple(
        {
            "forward_equivalents": spent,
            "median_error": error.median().item(),
            "largest_error": error.max().item(),
            "broken_samples": int(error.isinf().sum()),
        }
        for spent, error in kept
    )


def _prices(search: Search) -> tuple[Mapping[str, Any], ...]:
    return tuple(
        {"call": kind, "forward_equivalents": price} for kind, price in search.price.items()
    )

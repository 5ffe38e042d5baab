"""Reports made by hand, for the tests that look at how they are shown."""

from __future__ import annotations

import torch

from inn_guard.report.audit_report import AuditReport
from inn_guard.report.result import AuditResult
from inn_guard.report.uses import Finding
from inn_guard.report.verdict import Verdict


def unstable_report(*, samples: int = 64, layers: int = 16) -> AuditReport:
    generator = torch.Generator().manual_seed(0)
    low = -3 * torch.rand(samples, generator=generator).sort().values - 1
    high = 2 * torch.rand(samples, generator=generator) + 0.5
    error = 10 ** (3 * torch.randn(samples, generator=generator) - 4)
    error[:2] = torch.tensor([torch.nan, torch.inf])
    log_det = AuditResult(
        "log_det",
        Verdict.STABLE,
        "forward log-det and autograd agree to 3e-13 nats",
        uses={"density": finding("stable", 3.1e-13, 0.1, "nats")},
        values={"max_difference": 3.1e-13},
        units={"max_difference": "nats"},
        tables={
            "dtypes": ({"dtype": "float32", "error": 1e-6}, {"dtype": "float16", "error": INF})
        },
    )
    gradients = AuditResult.not_applicable("gradient_angle", "the model has no loss")
    return AuditReport(
        results=(
            log_det,
            reconstruction(error, generator=generator),
            spectrum(high, low, generator=generator),
            blame(layers, generator=generator),
            gradients,
        ),
        model="Glow",
        settings={
            "library": "FrEIA",
            "dimensions": 64,
            "samples": samples,
            "dtype": "float32",
            "device": "cpu",
            "seed": 0,
            "level": "standard",
            "date": "2026-11-30T18:28:55+00:00",
        },
        counted={"density": "every model declares it", "reconstruction": "named by the caller"},
        asked=(),
        advice=(
            "Bound the scales of layer 23.",
            "Train with a regularizer:\nig.RegularizerHook(flow, [ig.FiniteDifferences(1.0)])",
        ),
    )


INF = float("inf")


def finding(label, figure, limit, unit, *, reason="", samples=64):
    """A finding with the reason that its figures make."""
    words = reason or f"off by {figure:.1e} {unit} (limit {limit:g})"
    return Finding(Verdict(label), figure, limit, unit, words, samples, 64)


def one_result_report(verdict=Verdict.STABLE, **fields) -> AuditReport:
    """A report of one check that counts by itself."""
    return AuditReport((AuditResult("a", verdict, "fine", **fields),), "m")


def reconstruction(error: torch.Tensor, *, generator: torch.Generator) -> AuditResult:
    images = torch.rand(8, 1, 8, 8, generator=generator)
    noisy = images + 0.05 * torch.randn(8, 1, 8, 8, generator=generator)
    noisy[2, 0, 3, 3:6] = torch.nan
    reason = "2 of 64 round trips return NaN or Inf"
    unit = "of the feature's deviation or size"
    return AuditResult(
        "reconstruction",
        Verdict.NON_FINITE,
        reason,
        uses={"reconstruction": finding("non_finite", INF, 0.01, unit, reason=reason)},
        headline=("relative_error", "max_error"),
        values={
            "max_error": INF,
            "relative_error": INF,
            "median_error": 1.3e-4,
            "non_finite_samples": 2.0,
            "nan_value": float("nan"),
        },
        units={"max_error": "units of x", "relative_error": "of the feature"},
        per_sample={"relative_error": error, "l2_error": error},
        settings={
            "dtype": "float32",
            "samples": 64,
            "limit": 0.01,
            "latents": ["encoded", "prior"],
        },
        advice="Bound the scale of the couplings (sigmoid, not exp).",
        images={"original": images, "reconstruction": noisy, "difference": noisy - images},
    )


def spectrum(high: torch.Tensor, low: torch.Tensor, *, generator: torch.Generator) -> AuditResult:
    between = torch.rand(high.shape[0], 30, generator=generator)
    powers = low[:, None] + between * (high - low)[:, None]
    return AuditResult(
        "jacobian_spectrum",
        Verdict.UNSTABLE,
        "the largest condition number in 64 of 64 samples is 1.1e+06",
        values={"condition_max": 1.1e6, "sigma_max": 231.0, "sigma_min": 2.1e-4},
        per_sample={
            "sigma_max": 10**high,
            "sigma_min": 10**low,
            "condition": 10 ** (high - low),
            "spectrum": 10**powers,
        },
        settings={"steps": 30, "tolerance": 1e-3},
        advice="Lower the condition number with FiniteDifferences.",
    )


def blame(layers: int, *, generator: torch.Generator) -> AuditResult:
    kinds = ["ActNorm", "InvertibleConv1x1", "AffineCoupling", "Squeeze"]
    condition = 10 ** (2 * torch.rand(layers, generator=generator))
    gain = 10 ** (4 * torch.rand(layers, generator=generator) - 2)
    rows = []
    for place in range(layers):
        row = {
            # layers without parameters have no row: the index is not the position
            "index": 2 * place + 1,
            "name": kinds[place % 4],
            "condition": condition[place].item(),
            "gain": gain[place].item(),
            "digits_lost": condition[place].log10().item(),
        }
        rows.append(row)
    rows[-1]["gain"] = float("nan")
    return AuditResult(
        "layer_blame",
        Verdict.UNSTABLE,
        "layer 23 (Squeeze) loses 2.0 of 9.1 digits",
        per_layer=tuple(rows),
        headline=("digits_lost",),
        values={"digits_lost": 9.1},
        advice="Look at layer 23 first.",
        settings={"worst_layer": "layer 23 (Squeeze)"},
    )

"""Reports made by hand, for the tests that look at how they are shown."""

from __future__ import annotations

import torch

from inn_guard.report.audit_report import AuditReport
from inn_guard.report.result import AuditResult, Verdict


def unstable_report(*, samples: int = 64, layers: int = 16) -> AuditReport:
    generator = torch.Generator().manual_seed(0)
    low = -3 * torch.rand(samples, generator=generator).sort().values - 1
    high = 2 * torch.rand(samples, generator=generator) + 0.5
    error = 10 ** (3 * torch.randn(samples, generator=generator) - 4)
    error[:2] = torch.tensor([torch.nan, torch.inf])
    return AuditReport(
        results=(
            reconstruction(error, generator=generator),
            spectrum(high, low, generator=generator),
            blame(layers, generator=generator),
            AuditResult(
                "log_det", Verdict.STABLE, "Forward log-det and autograd agree to 3e-13 nats.",
                values={"max_difference": 3.1e-13}, units={"max_difference": "nats"},
                tables={"dtypes": ({"dtype": "float32", "error": 1e-6}, {"dtype": "float16", "error": float("inf")})},
            ),
            AuditResult.not_applicable("gradient_angle", "the model has no loss; pass loss=..."),
        ),
        model="Glow",
        settings={"samples": samples, "dtype": torch.float32, "device": "cpu", "seed": 0, "level": "standard"},
    )  # fmt: skip


def reconstruction(error: torch.Tensor, *, generator: torch.Generator) -> AuditResult:
    images = torch.rand(8, 1, 8, 8, generator=generator)
    noisy = images + 0.05 * torch.randn(8, 1, 8, 8, generator=generator)
    noisy[2, 0, 3, 3:6] = torch.nan
    return AuditResult(
        "reconstruction",
        Verdict.NON_FINITE,
        "2 of 64 samples come back as NaN or Inf; the worst finite error is 812.",
        values={
            "max_error": float("inf"),
            "median_error": 1.3e-4,
            "non_finite_samples": 2.0,
            "nan_value": float("nan"),
        },
        units={"max_error": "data units", "median_error": "data units", "error_l2": "data units"},
        per_sample={"error_l2": error},
        settings={
            "dtype": torch.float32,
            "samples": 64,
            "threshold": 3.2e-5,
            "latents": ["encoded", "prior"],
        },
        advice="Bound the scale of the couplings (sigmoid, not exp), or train with NormalizingFlowLoss every 10 steps.",
        images={"original": images, "reconstruction": noisy, "difference": noisy - images},
    )


def spectrum(high: torch.Tensor, low: torch.Tensor, *, generator: torch.Generator) -> AuditResult:
    between = torch.rand(high.shape[0], 30, generator=generator)
    powers = low[:, None] + between * (high - low)[:, None]
    return AuditResult(
        "jacobian_spectrum",
        Verdict.UNSTABLE,
        "The worst condition number, 1.1e6, loses 6 of the 7 digits of float32.",
        values={"condition_max": 1.1e6, "sigma_max": 231.0, "sigma_min": 2.1e-4},
        per_sample={
            "sigma_max": 10**high, "sigma_min": 10**low, "condition": 10 ** (high - low), "spectrum": 10**powers,
        },
        settings={"steps": 30, "tolerance": 1e-3},
        advice="Lower the condition number with FiniteDifferences.",
    )  # fmt: skip


def blame(layers: int, *, generator: torch.Generator) -> AuditResult:
    kinds = ["ActNorm", "InvertibleConv1x1", "AffineCoupling", "Squeeze"]
    condition = 10 ** (2 * torch.rand(layers, generator=generator))
    gain = 10 ** (4 * torch.rand(layers, generator=generator) - 2)
    rows = tuple(
        {
            "layer": kinds[index % 4],
            "condition": condition[index].item(),
            "gain": float("nan") if index == 5 else gain[index].item(),
            "share": (condition / condition.sum())[index].item(),
        }
        for index in range(layers)
    )
    return AuditResult(
        "layer_blame", Verdict.UNSTABLE, "Layer 11 (AffineCoupling) makes 41 % of the error.", per_layer=rows,
        values={"worst_share": 0.41}, advice="Replace or regularize layer 11 first.",
        settings={"worst_layer": "layer 11 (AffineCoupling)"},
    )  # fmt: skip

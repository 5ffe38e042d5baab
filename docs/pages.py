"""Pages of the site that are made of files that stand elsewhere: the README, the docstrings, the committed figures."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FIGURES = Path("benchmarks") / "results"
#: page -> objects whose docstrings it shows
REFERENCE = {
    "front": ("inn_guard.auditing.audit", "inn_guard.auditing.Running", "inn_guard.adapters.wrap",
              "inn_guard.invertible.Invertible"),
    "audits": tuple(f"inn_guard.audits.{name}.{name}" for name in (
        "preflight", "reconstruction", "log_det", "out_of_distribution", "jacobian_spectrum", "layer_blame",
        "precision", "gradient_angle", "full_spectrum", "dequantization_attack", "lipschitz_bounds", "dry_run")),
    "repairs": ("inn_guard.hooks.RegularizerHook", "inn_guard.regularizers.finite_differences.FiniteDifferences",
                "inn_guard.regularizers.normalizing_flow.NormalizingFlowLoss",
                "inn_guard.regularizers.adaptive.AdaptiveCoefficient", "inn_guard.audit_hook.AuditHook",
                "inn_guard.reversible.memory_saving.memory_saving"),
    "lipschitz": ("inn_guard.lipschitz.bounding.lipschitz_bounds",),
    "distributed": ("inn_guard.distributed.WorkSharing", "inn_guard.distributed.register_fsdp_methods",
                    "inn_guard.footprint.peak_bytes"),
    "reports": ("inn_guard.audits.report.AuditReport", "inn_guard.audits.base.AuditResult",
                "inn_guard.audits.base.Verdict"),
}  # fmt: skip
TITLES = {
    "front": "The front door", "audits": "Audits", "repairs": "Regularizers and hooks", "lipschitz": "Lipschitz bounds",
    "distributed": "Several processes", "reports": "Reports",
}  # fmt: skip


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the figures that they show."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {
        "index.md": _linked(readme),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "gallery.md": _gallery(),
    }
    pages |= {f"reference/{name}.md": _reference(name) for name in REFERENCE}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for figure in _figures():
        files.append(File.generated(config, figure.as_posix(), abs_src_path=str(ROOT / figure)))
    return files


def _figures() -> list[Path]:
    """The committed figures, from the root of the repository."""
    return sorted(figure.relative_to(ROOT) for figure in (ROOT / FIGURES).rglob("*.png"))


def _linked(text: str) -> str:
    """The README with links to files of the repository as plain names; figures stay."""
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)[^)]+\)", r"\1", text)


def _gallery() -> str:
    entries = [
        "# Gallery",
        "",
        "Figures that the committed experiments drew; `benchmarks/README.md` has their commands.",
    ]
    for figure in _figures():
        name = " / ".join(figure.relative_to(FIGURES).with_suffix("").parts).replace("_", " ")
        entries += ["", f"## {name}", "", f"![{name}]({figure.as_posix()})"]
    return "\n".join(entries)


def _reference(name: str) -> str:
    return "\n\n".join([f"# {TITLES[name]}", *(f"::: {path}" for path in REFERENCE[name])])

"""Writes docs/results/census.md, its table in HTML, and its three figures, from committed rows.

    python -m benchmarks.census.page

No number on these pages is typed by hand.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.census.findings import Finding, findings
from benchmarks.census.page_price import FIGURE, price_section
from benchmarks.census.page_repairs import repairs_section
from benchmarks.census.price import draw
from benchmarks.census.rows import (
    CHECKED_USES,
    FOLDER,
    KEY,
    USES,
    agreement,
    contradictions,
    failed,
    origins,
    passed,
    read_parts,
    read_price,
    read_repairs,
)
from benchmarks.census.tables import heading, line, text
from benchmarks.common.figures import draw_grid_lines, save_figure
from inn_guard.execution.files import atomic_write
from inn_guard.report.limits import Limits

__all__ = ["figures", "markdown", "table_page", "write"]

DOCS = Path(__file__).parents[2] / "docs" / "results"
PAGE, TABLE = "census.md", "census_table.html"
SHOWN = 8  #: rows of a finding on the page; the table in HTML has them all
LIBRARIES = {
    "nflows": "#d55e00",
    "FrEIA": "#0072b2",
    "normflows": "#009e73",
    "zuko": "#cc79a7",
    "inn_guard": "#444444",
}
DTYPES = {"float64": "#0072b2", "float32": "#009e73", "bfloat16": "#d55e00"}
LIMITS = {
    "density": Limits().density,
    "sampling": Limits().sampling,
    "reconstruction": Limits().reconstruction,
    "gradients": Limits().gradient_angle,
}
UNITS = {
    "density": "nats",
    "sampling": "share of draws lost",
    "reconstruction": "of a feature's deviation",
    "gradients": "degrees, or relative length",
}

INTRODUCTION = """# The census: which default flows can be trusted for what

<!-- written by benchmarks/census/page.py; do not edit -->

Default blocks of nflows, FrEIA, normflows and zuko, and our own flows, put together as their
documentation does, trained by Adam without clipping, and audited for the five
[uses](../uses.md). Every model is also judged by plain formulas that share no code with the audits.
[All rows, sortable](census_table.html).

```bash
inn-guard bench census --preset smoke                          # seconds
inn-guard bench census --preset cpu --sets moons --out FOLDER   # one part of the grid
inn-guard bench census --preset full --data-root FOLDER         # all of it, for days
inn-guard bench census.repairs --rounds 0 --out FOLDER          # repairs of what fails
inn-guard bench census.price --sets moons --out FOLDER          # the price of stability
```

The script `benchmarks/census/page.py` writes this page, the table and the figures from the
committed rows.
"""


# ------------------------------------------------------------------------------------- Markdown


def markdown(
    frame: pd.DataFrame,
    parts: dict[str, dict[str, Any]],
    repaired: pd.DataFrame,
    priced: pd.DataFrame,
) -> str:
    """The whole page.

    Args:
        frame: all rows of the census.
        parts: how each part came about.
        repaired: rows of the repairs.
        priced: rows of the price of stability.
    """
    found = findings(frame)
    sections = [
        INTRODUCTION,
        _grid(frame),
        _by_flow(frame),
        _pictures(),
        _findings(found),
        _settled(frame),
        repairs_section(frame, repaired),
        price_section(priced),
        _truth(frame),
        _origins(parts, [frame, repaired, priced]),
    ]
    return "\n".join(section for section in sections if section)


def _grid(frame: pd.DataFrame) -> str:
    raised = frame[frame["raised"] != ""]
    trainings = frame.groupby(["flow", "data", "depth", "seed"]).ngroups
    lines = [
        "## What was measured",
        "",
        f"{len(frame)} rows; a row is one model in one dtype. They come from {trainings} trainings "
        f"of {frame['flow'].nunique()} kinds of flows.",
        "",
        "| data | dimensions | depth | seeds | steps of training | dtypes | flows | rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (data, dims, depth), some in frame.groupby(["data", "dimensions", "depth"], sort=False):
        cells = [data, dims, depth, *(_listed(some[name]) for name in ("seed", "steps", "dtype"))]
        cells += [some["flow"].nunique(), len(some)]
        lines.append(line(cells))
    if len(raised):
        kinds = raised.groupby(["flow", "dtype"]).size()
        listed = ", ".join(f"{flow} in {dtype} ({n})" for (flow, dtype), n in kinds.items())
        lines += ["", f"Not measured, because the library refuses the dtype: {listed}."]
    return "\n".join([*lines, ""])


def _by_flow(frame: pd.DataFrame) -> str:
    rows = frame[(frame["dtype"] == "float32") & (frame["raised"] == "")]
    lines = [
        "## Which flow for what",
        "",
        "Models in float32: fit / unfit / undecided, over all data, depths, seeds and steps.",
        "",
        *heading(["flow", "models", *USES.values(), "largest condition number, median"]),
    ]
    for flow, some in rows.groupby("flow"):
        cells = [flow, len(some)]
        for use in USES:
            good, bad = int(passed(some, use).sum()), int(failed(some, use).sum())
            cells.append(f"{good} / {bad} / {len(some) - good - bad}")
        cells.append(text(10 ** some["log10_condition"].median()))
        lines.append(line(cells))
    return "\n".join([*lines, ""])


def _pictures() -> str:
    titles = {
        "verdicts": "Share of float32 models that are fit for each use",
        "lost_draws": "Lost draws against the condition number at the data, float32",
        "precision": "Figures in three dtypes against their limits",
    }
    lines = ["## Three figures", ""]
    for name, title in titles.items():
        lines += [f"![{title}](../../benchmarks/results/census/{name}.png)", ""]
    return "\n".join(lines)


def _findings(found: Sequence[Finding]) -> str:
    sure = [one for one in found if one.on_three_seeds]
    hints = [one for one in found if not one.on_three_seeds]
    lines = [
        "## Findings",
        "",
        f"{len(sure)} statements that the rows support with three seeds. Under each: its rows, and "
        "whether the plain formulas agree with the verdicts that it counts. A verdict is open "
        "where it is undecided, or where the true figure is within a factor of two of the limit.",
        "",
    ]
    for position, one in enumerate(sure, start=1):
        lines += _statement(position, one)
    if hints:
        lines += ["## Hints", "", f"{len(hints)} more that rest on fewer than three seeds.", ""]
    for position, one in enumerate(hints, start=len(sure) + 1):
        lines += _statement(position, one)
    return "\n".join(lines)


def _statement(position: int, one: Finding) -> list[str]:
    first, _, rest = one.text.partition(". ")
    lines = [f"### {position}. {first.rstrip('.')}", ""]
    if rest:
        lines += [rest, ""]
    if one.uses:
        lines += [_checked(one.rows, one.uses), ""]
    return [*lines, _rows_table(one), ""]


def _checked(rows: pd.DataFrame, uses: Iterable[str]) -> str:
    counts = agreement(rows, uses)
    return (
        f"Plain formulas: {counts['agree']} verdicts agree, {counts['contradict']} contradict, "
        f"{counts['open']} open."
    )


def _rows_table(one: Finding) -> str:
    rows = one.rows
    columns = [*KEY, *one.columns]
    lines = heading(_names(columns))
    for _, row in rows.head(SHOWN).iterrows():
        lines.append(line(text(row[name]) for name in columns))
    if len(rows) > SHOWN:
        lines += ["", f"The first {SHOWN} of {len(rows)} rows."]
    return "\n".join(lines)


def _settled(frame: pd.DataFrame) -> str:
    """Inverse against density, of every dtype."""
    lines = [
        "## Not invertible, and the density?",
        "",
        "Behrmann et al. (2021) warn that the change of variables gives no valid likelihood where "
        "the inverse fails numerically. Xu and Campbell (2023) find flows whose round trips are "
        "lost and whose densities are accurate. Counted here: models whose round trips or draws "
        "fail, by whether log p(x) of held-out data is right to 0.1 nats.",
        "",
        "| dtype | models | not invertible | of these, density right | density wrong | open "
        "| round trips right, density wrong |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype in DTYPES:
        rows = frame[(frame["dtype"] == dtype) & (frame["raised"] == "")]
        if not len(rows):
            continue
        lost = rows[failed(rows, "reconstruction") | failed(rows, "sampling")]
        good, bad = int(passed(lost, "density").sum()), int(failed(lost, "density").sum())
        other = int((passed(rows, "reconstruction") & failed(rows, "density")).sum())
        cells = [dtype, len(rows), len(lost), good, bad, len(lost) - good - bad, other]
        lines.append(line(cells))
    return "\n".join([*lines, ""])


def _truth(frame: pd.DataFrame) -> str:
    checked = frame[frame["true_density"] != ""]
    lines = [
        "## Are the verdicts true?",
        "",
        f"{len(checked)} of {len(frame)} rows were checked by the formulas of "
        "`benchmarks/census/truth.py`: dense float64 Jacobians layer by layer, draws of another "
        "seed, direct round trips, and gradients through inputs rebuilt by hand.",
        "",
        "| use | agree | contradict | open |",
        "|---|---|---|---|",
    ]
    for use in CHECKED_USES:
        counts = agreement(checked, [use])
        lines.append(line([USES[use], *counts.values()]))
    wrong = contradictions(checked)
    if len(wrong):
        lines += ["", "The verdicts that the formulas contradict:", ""]
        lines += heading(wrong.columns)
        lines += [line(text(value) for value in row) for row in wrong.to_numpy()]
    return "\n".join([*lines, ""])


def _origins(parts: dict[str, dict[str, Any]], frames: Sequence[pd.DataFrame]) -> str:
    lines = [
        "## How the rows came about",
        "",
        "One process on two cores that other work shared, with one thread. Each part is a folder "
        "below `benchmarks/results/census/` with its rows, configuration, versions and seeds. The "
        "column `data_checksum` of the rows has the first 16 digits of the sha256 of the training "
        "and held-out samples, `weights` those of the model.",
        "",
        "* The grid is what two to three hours on a shared machine allowed, and has gaps: splines, "
        "i-ResNet, AEF and NIF on few data sets; depth 64 on one data set and one seed, trained "
        "with four flows; 4,000 steps on one data set and one seed, so that no statement counts "
        "them; image patches with six flows, three of them with three seeds.",
        "* Image patches are 16 x 16 cuts of CIFAR-10 in JPEG copies, so that pixels differ "
        "slightly from the original's. The part's JSON file has the checksums of the files.",
        "* The kinds of statements above were chosen after looking at the first rows. Their "
        "numbers are counted by `benchmarks/census/findings.py`.",
        "* The plain formulas first called four bfloat16 models unfit whose library has no inverse "
        "in bfloat16. They are unknown now, and the three flows concerned were measured again.",
        "* The rows of FrEIA's AllInOne, but for those on patches and in `all_in_one_float64`, "
        "cannot be repeated bit for bit: it draws its rotations from numpy, whose generator was "
        "not seeded then. Its rows in different parts are of different weights.",
        "* Times are those of a machine that did other work.",
        "",
        "| part | command | rows |",
        "|---|---|---|",
    ]
    for name, origin in parts.items():
        count = sum(int((frame["part"] == name).sum()) for frame in frames if len(frame))
        command = f"{origin['command']} --out benchmarks/results/census/{name}"
        lines.append(line([name, f"`{command}`", count]))
    versions = next(iter(parts.values()), {}).get("packages", {})
    listed = ", ".join(f"{package} {version}" for package, version in versions.items())
    return "\n".join([*lines, "", f"Versions: {listed}.", ""])


def _names(columns: Iterable[str]) -> list[str]:
    return [name.replace("_", " ") for name in columns]


def _listed(values: pd.Series) -> str:
    return ", ".join(str(value) for value in sorted(values.unique()))


# ------------------------------------------------------------------------------------- figures


def figures(frame: pd.DataFrame) -> dict[str, Figure]:
    """Name -> figure."""
    measured = frame[frame["raised"] == ""]
    return {
        "verdicts": _verdicts(measured[measured["dtype"] == "float32"]),
        "lost_draws": _lost_draws(measured[measured["dtype"] == "float32"]),
        "precision": _precision(measured),
    }


def _verdicts(rows: pd.DataFrame) -> Figure:
    flows = sorted(rows["flow"].unique(), reverse=True)
    figure = Figure(figsize=(7.6, 0.34 * len(flows) + 1.1), layout="constrained")
    axis = figure.subplots()
    shares = [
        [float(passed(rows[rows["flow"] == flow], use).mean()) for use in USES] for flow in flows
    ]
    axis.imshow(shares, cmap="RdYlBu", vmin=0, vmax=1, aspect="auto", alpha=0.5)
    for row, flow in enumerate(flows):
        some = rows[rows["flow"] == flow]
        for column, use in enumerate(USES):
            label = f"{int(passed(some, use).sum())} of {len(some)}"
            axis.text(column, row, label, ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(USES)), list(USES.values()))
    axis.set_yticks(range(len(flows)), flows)
    axis.tick_params(length=0)
    axis.xaxis.tick_top()
    axis.set_title("Models in float32 that are fit for a use", fontsize=10)
    return figure


def _lost_draws(rows: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    axis = figure.subplots()
    least = 1e-5  # where models without a lost draw are drawn
    most = 12  # digits of a condition number; larger ones are drawn at the edge
    for library, colour in LIBRARIES.items():
        some = rows[(rows["library"] == library) & rows["log10_condition"].notna()]
        if len(some):
            rate = some["sampling_figure"].clip(lower=least)
            condition = 10 ** some["log10_condition"].clip(upper=most)
            axis.plot(condition, rate, "o", color=colour, alpha=0.65,
                      markersize=4.5, label=library)  # fmt: skip
    axis.axhline(LIMITS["sampling"], color="#888888", linewidth=1, linestyle="--")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(least / 2, 1.5)
    axis.set_yticks(
        [least, 1e-4, 1e-3, 1e-2, 1e-1, 1], ["none", "1e-4", "1e-3", "1e-2", "0.1", "1"]
    )
    axis.set_xlabel(f"largest condition number at the data, at most 1e{most}")
    axis.set_ylabel("share of draws lost")
    axis.set_title("Lost draws; the dashed line is the limit", fontsize=10)
    axis.legend(fontsize=8)
    draw_grid_lines(axis)
    return figure


def _precision(rows: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    for axis, use in zip(figure.subplots(1, len(CHECKED_USES)), CHECKED_USES, strict=True):
        _strip(axis, rows, use)
    return figure


def _strip(axis: Axes, rows: pd.DataFrame, use: str) -> None:
    """Every model's figure, dtype by dtype; zeros and what is not finite at the ends."""
    low, high = 1e-17, 1e6
    if use == "sampling":
        low, high = 1e-5, 1.0
    for place, (dtype, colour) in enumerate(DTYPES.items()):
        some = rows[rows["dtype"] == dtype]
        values = some[f"{use}_figure"].fillna(math.inf).clip(low, high)
        spread = [place + 0.5 * ((7 * k) % 11 / 11 - 0.5) for k in range(len(values))]
        axis.plot(spread, values, "o", color=colour, alpha=0.5, markersize=3)
        limit = LIMITS[use]
        if use == "reconstruction":
            limit = Limits().round_trip(getattr(torch, dtype))
        axis.plot([place - 0.45, place + 0.45], [limit] * 2, "--", color="#666666", linewidth=1)
    axis.set_yscale("log")
    axis.set_ylim(low / 3, high * 3)
    axis.set_xticks(range(len(DTYPES)), list(DTYPES), fontsize=8)
    axis.set_title(f"{USES[use]}\n{UNITS[use]}", fontsize=9)
    axis.tick_params(axis="y", labelsize=8)
    draw_grid_lines(axis)


# ------------------------------------------------------------------------------------- HTML

COLUMNS = (
    *KEY,
    "bits",
    *(name for use in USES for name in (use, f"{use}_figure")),
    "sampling_rate_low",
    "sampling_rate_high",
    "density_share_low",
    "density_share_high",
    "reconstruction_share_low",
    "reconstruction_share_high",
    "log10_condition",
    "bits_lost",
    "digits_lost",
    "weakest_layer",
    "lowest_density",
    "lowest_reconstruction",
    "lowest_sampling",
    "seconds",
    *(f"true_{use}" for use in CHECKED_USES),
    "raised",
    "part",
)
PAGE_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The census of default flows</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 1em; color: #222; background: #fff; }
table { border-collapse: collapse; font-size: 12px; }
th, td { border: 1px solid #ccc; padding: 2px 6px; white-space: nowrap; text-align: right; }
th { position: sticky; top: 0; z-index: 1; background: #eee; }
th:first-child, td:first-child { position: sticky; left: 0; background: #f6f6f6; }
th:first-child { z-index: 2; text-align: left; }
th button { all: unset; cursor: pointer; font-weight: bold; }
th button:focus-visible { outline: 2px solid #0072b2; }
td.text { text-align: left; }
td.stable, td.fit { background: #d9f0d3; }
td.marginal, td.near { background: #fff7bc; }
td.undecided { background: #e0e0e0; }
td.unstable, td.non_finite, td.unfit { background: #fddbc7; }
</style>
</head>
<body>
<h1>The census of default flows</h1>
"""
SCRIPT = """<script>
const body = document.querySelector("tbody");
const rows = Array.from(body.rows);
const place = cell => cell.dataset.value === undefined ? cell.textContent : cell.dataset.value;
let last = -1, sign = 1;
function sort(column) {
  sign = column === last ? -sign : 1;
  last = column;
  rows.sort((a, b) => {
    const x = place(a.cells[column]), y = place(b.cells[column]);
    if (x === "" || y === "") return (x === "") - (y === "");
    const p = Number(x), q = Number(y);
    const order = Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q;
    return sign * order;
  });
  body.append(...rows);
}
document.querySelectorAll("th button").forEach((button, column) => {
  button.addEventListener("click", () => sort(column));
});
const search = document.querySelector("input");
search.addEventListener("input", () => {
  const words = search.value.toLowerCase().split(/\\s+/);
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
  }
});
</script>
</body>
</html>
"""


def table_page(frame: pd.DataFrame) -> str:
    """One file with all rows that sorts by a click on a column's name; all text is escaped."""
    columns = [name for name in COLUMNS if name in frame]
    parts = [PAGE_HEAD]
    parts.append(
        f"<p>{len(frame)} rows. Click a column's name to sort, click again to reverse. "
        '<label>Only rows that contain <input type="search"></label></p>\n<table>\n<thead><tr>'
    )
    for name in _names(columns):
        parts.append(f'<th><button type="button">{html.escape(name)}</button></th>')
    parts.append("</tr></thead>\n<tbody>\n")
    for _, row in frame.iterrows():
        cells = "".join(_cell(row[name]) for name in columns)
        parts.append(f"<tr>{cells}</tr>\n")
    parts += ["</tbody>\n</table>\n", SCRIPT]
    return "".join(parts)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        name = html.escape(value)
        kind = f"text {name}" if value.replace("_", "").isalpha() else "text"
        return f'<td class="{kind}">{name}</td>'
    shown = text(value)
    if not shown:
        return "<td></td>"
    exact = str(value).replace("inf", "Infinity")
    return f'<td data-value="{html.escape(exact)}">{html.escape(shown)}</td>'


def write(folder: Path = FOLDER, docs: Path = DOCS) -> None:
    """Write both pages and the figures."""
    frame, repaired, priced = read_parts(folder), read_repairs(folder), read_price(folder)
    for name, content in (
        (PAGE, markdown(frame, origins(folder), repaired, priced)),
        (TABLE, table_page(frame)),
    ):
        with atomic_write(docs / name) as partial:
            partial.write_text(content, encoding="utf-8")
    for name, figure in figures(frame).items():
        save_figure(figure, folder / f"{name}.png", dpi=100)
    if len(priced):
        save_figure(draw(priced), folder / f"{FIGURE}.png", dpi=100)


if __name__ == "__main__":
    write()

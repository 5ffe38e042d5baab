"""The census page's section on repairs: what each of the four costs, and what it cures."""

from __future__ import annotations

import pandas as pd

from benchmarks.census.repairs import REPAIRS, failing_models
from benchmarks.census.rows import CHECKED_USES, USES, agreement
from benchmarks.census.tables import heading, line, number, text

__all__ = ["repairs_section"]

MODEL = ["flow", "data", "depth", "steps", "seed"]
#: repair -> what it is, and of what its time is a multiple
REPAIRED_BY = {
    "regularized": "trained anew with finite differences, the same steps; time of the training",
    "stabilize": "`ig.stabilize`, a tenth of the steps; time of the training",
    "raise_precision": "`ig.raise_precision`, no training; time of a pass",
    "exact": "`ig.exact`, no training; time of both ways",
}


def repairs_section(frame: pd.DataFrame, repaired: pd.DataFrame) -> str:
    """Two tables; "" before any model was repaired.

    Args:
        frame: all rows of the census.
        repaired: a row for each model and repair.
    """
    if not len(repaired):
        return ""
    failing = failing_models(frame)
    models = repaired.drop_duplicates(MODEL)
    again = repaired[repaired["failing"] == ""].drop_duplicates(MODEL)
    groups = models.groupby(MODEL[:-1]).ngroups
    lines = [
        "## Repairs",
        "",
        f"{len(failing)} trained models in float32 fail density, sampling, reconstruction or "
        f"gradients. They are of {failing.groupby(MODEL[:-1]).ngroups} kinds of flow, data, depth "
        f"and steps. {len(models)} of them, of {groups} kinds, were trained again and repaired in "
        "four ways. The others did not fit into the time.",
        "",
    ]
    if len(again):
        lines += [f"{len(again)} of the {len(models)} did not fail when trained again.", ""]
    lines += [
        _summary(repaired),
        "",
        *_by_repair(repaired),
        "",
        "Cured: of the models that fail a use, those that pass it afterwards; undecided: the rate "
        "of lost draws may be below the limit, which the draws do not prove. Broken: uses that "
        "passed before and fail afterwards. Exact mode restores rows of data; draws and densities "
        "stay what they are. It keeps bits beside z, given per dimension; they are negative where "
        "a flow expands, because it takes bits back then. Times are those of a busy machine.",
        "",
        _truth(repaired),
        "",
        *_by_model(repaired),
        "",
    ]
    return "\n".join(lines)


def _summary(repaired: pd.DataFrame) -> str:
    """How many failing uses each repair cures."""
    failing = repaired[repaired["failing"] != ""]
    parts = []
    for repair in REPAIRS:
        rows = failing[failing["repair"] == repair]
        cured = sum(len(uses.split()) for uses in rows["cured"])
        parts.append(f"`{repair}` {cured}")
    uses = failing.drop_duplicates(MODEL)["failing"].map(lambda words: len(words.split())).sum()
    return f"Of {uses} failing uses of these models, cured are by {', by '.join(parts)}."


def _by_repair(repaired: pd.DataFrame) -> list[str]:
    names = [USES[use] for use in CHECKED_USES]
    lines = heading(
        ["repair", "what", *(f"{name} cured" for name in names), "broken uses",
         "change in bits per dimension", "time, times"]
    )  # fmt: skip
    for repair in REPAIRS:
        rows = repaired[(repaired["repair"] == repair) & (repaired["failing"] != "")]
        cells = [f"`{repair}`", REPAIRED_BY[repair]]
        for use in CHECKED_USES:
            of_use = rows[_has(rows["failing"], use)]
            cured = int(_has(of_use["cured"], use).sum())
            unproved = int((of_use[f"{use}_after"] == "undecided").sum())
            applies = repair != "exact" or use == "reconstruction"
            count = f"{cured} of {len(of_use)}"
            if unproved:
                count += f", {unproved} undecided"
            cells.append(count if applies else "")
        cells.append(str(sum(len(uses.split()) for uses in rows["broken"])))
        change = (rows["bits_after"] - rows["bits_before"]).dropna()
        cells.append(_spread(change))
        cells.append(_spread(rows["time_factor"].dropna()))
        lines.append(line(cells))
    return lines


def _has(lists: pd.Series, use: str) -> pd.Series:
    """Which of the lists of words hold the word."""
    return lists.map(lambda words: use in words.split()).astype(bool)


def _spread(values: pd.Series) -> str:
    if not len(values):
        return ""
    return f"{number(values.median())} ({number(values.min())} to {number(values.max())})"


def _truth(repaired: pd.DataFrame) -> str:
    names = {f"{use}_after": use for use in CHECKED_USES}
    names |= {f"true_{use}_after": f"true_{use}" for use in CHECKED_USES}
    done = repaired[(repaired["refused"] == "") & (repaired["repair"] != "exact")]
    counts = agreement(done.rename(columns=names))
    return (
        f"Of the verdicts after the repairs {counts['agree']} agree with the plain formulas, "
        f"{counts['contradict']} contradict them, {counts['open']} are open."
    )


def _by_model(repaired: pd.DataFrame) -> list[str]:
    lines = heading(
        [*MODEL, "repair", "figures before, after (verdict)", "cured", "broken",
         "bits before", "after", "steps", "time, times", "layers in float64", "bits kept"]
    )  # fmt: skip
    for _, row in repaired[repaired["failing"] != ""].iterrows():
        figures = []
        for use in row["failing"].split():
            before, after = row[f"{use}_before_figure"], row[f"{use}_after_figure"]
            label = str(row[f"{use}_after"]).replace("_", " ")
            figures.append(f"{USES[use]} {text(before)}, {text(after)} ({label})")
        layers = ""
        if row["repair"] == "raise_precision" and not row["refused"]:
            layers = f"{row['raised_layers']:.0f} of {row['layers']:.0f}"
        cells = [
            *(row[name] for name in MODEL),
            row["repair"],
            row["refused"] or "; ".join(figures),
            row["cured"],
            row["broken"],
            *(text(row[name]) for name in ("bits_before", "bits_after", "repair_steps")),
            text(row["time_factor"]),
            layers,
            text(row["kept_bits"]),
        ]
        lines.append(line(cells))
    return lines

"""The census page's section on the price of stability."""

from __future__ import annotations

import pandas as pd

from benchmarks.census.price import KINDS, resolved
from benchmarks.census.rows import agreement
from benchmarks.census.tables import heading, line, number

__all__ = ["FIGURE", "price_section"]

FIGURE = "price"
USES = ("density", "sampling", "reconstruction")
TENFOLD = 1.0  #: of log10: what counts as a clearly smaller condition number


def price_section(priced: pd.DataFrame) -> str:
    """Figure, sentences and table; "" before anything was measured.

    Args:
        priced: a row for each data set, treatment and seed.
    """
    if not len(priced):
        return ""
    pairs = against_nothing(priced)
    sets = list(dict.fromkeys(priced["data"]))
    lines = [
        "## The price of stability",
        "",
        "RealNVP of depth 8 with unbounded exponential scales, 400 steps, from the same first "
        "weights with each treatment. FD c and NF c add c times the penalty of Behrmann et al. "
        "(2021) at every fifth step. Bits per dimension are those of 128 held-out rows; the "
        "condition number is the largest at these, by dense float64 Jacobians. Beyond 1e16, or "
        "where a Jacobian is not finite, it counts as 1e16: float64 resolves no more.",
        "",
        f"![Likelihood against condition number](../../benchmarks/results/census/{FIGURE}.png)",
        "",
        *(f"* {_sentence(pairs[pairs['data'] == data], data)}" for data in sets),
        *_bounds(pairs),
        *_idle(pairs),
        "",
        _truth(priced),
        "",
        *_table(pairs),
        "",
    ]
    return "\n".join(lines)


def against_nothing(priced: pd.DataFrame) -> pd.DataFrame:
    """Every row with its difference to the untreated flow of the same data and seed."""
    priced = resolved(priced)
    plain = priced[priced["treatment"] == "nothing"]
    columns = ["data", "seed", "bits", "log10_condition"]
    pairs = priced.merge(plain[columns], on=["data", "seed"], suffixes=("", "_plain"))
    pairs["more_bits"] = pairs["bits"] - pairs["bits_plain"]
    pairs["fewer_digits"] = pairs["log10_condition_plain"] - pairs["log10_condition"]
    return pairs


def _sentence(pairs: pd.DataFrame, data: str) -> str:
    """The cheapest treatment that divides the condition number by ten with every seed."""
    plain = pairs[pairs["treatment"] == "nothing"]
    start = (
        f"On {data} the untreated flow has a condition number of "
        f"{_powers(plain['log10_condition'])} over {len(plain)} seeds"
    )
    treated = pairs[pairs["treatment"] != "nothing"]
    groups = treated.groupby("treatment", sort=False)
    least = groups["fewer_digits"].min()
    costs = groups["more_bits"].median()[least >= TENFOLD]
    if not len(costs):
        best = least.idxmax()
        some = treated[treated["treatment"] == best]
        return (
            f"{start}. No treatment divides it by ten with every seed; {best} comes nearest, by "
            f"{_powers(some['fewer_digits'])}, for {_range(some['more_bits'])} bits per dimension."
        )
    best = costs.idxmin()
    some = treated[treated["treatment"] == best]
    enough = ", ".join(costs.index)
    return (
        f"{start}. Treatments that divide it by ten with every seed: {enough}. The "
        f"cheapest is {best}: {_range(some['more_bits'])} bits per dimension, for a division by "
        f"{_powers(some['fewer_digits'])}."
    )


def _bounds(pairs: pd.DataFrame) -> list[str]:
    """What hard bounds on the couplings do, one sentence for each."""
    lines = ["* The bounds hold for the couplings. The linear maps between them are free."]
    bounds = pairs[pairs["treatment"].map(KINDS) == "bound"]
    for name, some in bounds.groupby("treatment", sort=False):
        larger = int((some["fewer_digits"] < 0).sum())
        lines.append(
            f"* {str(name).capitalize()}: {_range(some['more_bits'])} bits per dimension. The "
            f"condition number is larger than without in {larger} of {len(some)} models."
        )
    return lines


def _idle(pairs: pd.DataFrame) -> list[str]:
    """What the normalizing-flow loss does where it is the loss already."""
    rows = pairs[pairs["treatment"].map(KINDS) == "NF"]
    if not len(rows):
        return []
    return [
        f"* NF is the loss of these flows itself, and no new aim. In {len(rows)} models NF 10 "
        f"costs {_range(rows['more_bits'])} bits per dimension and divides the condition number "
        f"by {_powers(rows['fewer_digits'])}: a gradient of eleven times the size at every fifth "
        "step slows Adam's others. It is meant for other losses, such as a classifier's."
    ]


def _truth(priced: pd.DataFrame) -> str:
    counts = agreement(priced, USES)
    return (
        f"Plain formulas: {counts['agree']} verdicts of density, sampling and reconstruction "
        f"agree, {counts['contradict']} contradict, {counts['open']} are open."
    )


def _table(pairs: pd.DataFrame) -> list[str]:
    lines = heading(
        ["data", "treatment", "bits per dimension, median", "more than with nothing",
         "condition number, median", "divided by", "draws lost, most", "worst round trip"]
    )  # fmt: skip
    for (data, treatment), some in pairs.groupby(["data", "treatment"], sort=False):
        cells = [
            data,
            treatment,
            f"{some['bits'].median():.3f}",
            _range(some["more_bits"]) if treatment != "nothing" else "",
            number(10 ** some["log10_condition"].median()),
            _powers(some["fewer_digits"]) if treatment != "nothing" else "",
            number(some["sampling_figure"].max()),
            number(some["reconstruction_figure"].max()),
        ]
        lines.append(line(cells))
    return lines


def _range(values: pd.Series) -> str:
    return f"{values.min():+.3f} to {values.max():+.3f}"


def _powers(digits: pd.Series) -> str:
    return f"{number(10 ** digits.min())} to {number(10 ** digits.max())}"

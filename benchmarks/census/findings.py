"""The findings: sentences made of rows. One that its rows do not support is left out.

Each function takes all rows and returns a Finding, or None. The numbers in a sentence are counted
here; none is written by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd

from benchmarks.census.rows import CHECKED_USES, USES, failed, passed
from benchmarks.census.tables import number
from inn_guard.audits.rates import percent

__all__ = ["FINDINGS", "Finding", "findings"]

LEAST = 3  #: models that a finding must rest on
LEAST_SEEDS = 3  #: seeds that its models must have
#: masked autoregressive flow -> g in x g(s) + t, as its library has it
SCALES = {
    "nflows MAF": "0.001 + softplus(s)",
    "our MAF": "0.001 + softplus(s)",
    "normflows MAF": "0.001 + sigmoid(s + 2)",
    "zuko MAF": "exp(s / (1 + |s| / 6.9))",
}
INVERSE = ("reconstruction", "sampling")  #: uses that need the inverse


@dataclass(frozen=True)
class Finding:
    """A sentence and what it rests on.

    Attributes:
        text: plain sentences; the first one is the heading.
        rows: of the models that it counts.
        uses: whose verdicts it counts, of those that have a truth.
        columns: of the rows that the page shows, besides the model.
    """

    text: str
    rows: pd.DataFrame
    uses: tuple[str, ...]
    columns: tuple[str, ...]

    @property
    def on_three_seeds(self) -> bool:
        """Whether its models have three seeds; else it is no more than a hint."""
        return self.rows["seed"].nunique() >= LEAST_SEEDS


def per_cent(share: float) -> str:
    """A share in per cent, with as many digits as tell it from 0 and 100.

    >>> per_cent(0.0007), per_cent(0.9991), per_cent(1.0)
    ('0.07 %', '99.91 %', '100 %')
    """
    return f"{percent(share)} %"


def findings(frame: pd.DataFrame) -> list[Finding]:
    """Those that the rows support, in their order."""
    measured = frame[frame["raised"] == ""]
    found = [make(measured) for make in FINDINGS]
    return [one for one in found if one is not None]


def _named(row: pd.Series) -> str:
    """Which model it is, but for the seed."""
    return f"{row['flow']} on {row['data']} with depth {row['depth']} after {row['steps']} steps"


def _of_three_seeds(rows: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    """The rows of those kinds of models that have three seeds."""
    several = rows.groupby(key)["seed"].transform("nunique") >= LEAST_SEEDS
    return rows[several]


def _in(frame: pd.DataFrame, dtype: str = "float32") -> pd.DataFrame:
    return frame[frame["dtype"] == dtype]


def _shares(rows: pd.DataFrame, uses: Iterable[str]) -> str:
    counts = [f"{int(passed(rows, use).sum())} for {USES[use]}" for use in uses]
    return f"the fit ones are {', '.join(counts)}"


def _inverse_fails(frame: pd.DataFrame) -> pd.Series:
    return failed(frame, "reconstruction") | failed(frame, "sampling")


def soundness(frame: pd.DataFrame) -> Finding | None:
    """How many float32 models are fit for each use."""
    rows = _in(frame)
    if len(rows) < LEAST:
        return None
    shares = _shares(rows, USES)
    every = int((passed(rows, "density") & passed(rows, "reconstruction")).sum())
    both = passed(rows, "density") & passed(rows, "sampling") & passed(rows, "reconstruction")
    text = (
        f"Of {len(rows)} models in float32, {shares}. "
        f"{every} are fit for density and reconstruction, "
        f"{int(both.sum())} for these and sampling."
    )
    return Finding(text, rows, CHECKED_USES, tuple(USES))


def sound_densities(frame: pd.DataFrame) -> Finding | None:
    """Models whose inverse fails: how many have right densities."""
    rows = _in(frame)
    rows = rows[_inverse_fails(rows)]
    if len(rows) < LEAST:
        return None
    sound = rows[passed(rows, "density")]
    text = (
        f"{len(rows)} of {len(_in(frame))} models in float32 are not invertible where a use needs "
        f"it: round trips of data or draws of the base are lost. {len(sound)} of these have sound "
        f"densities, right to {number(sound['density_figure'].max())} nats."
    )
    return Finding(text, rows, ("density", *INVERSE), ("density", *INVERSE, "density_figure"))


def off_data(frame: pd.DataFrame) -> Finding | None:
    """Models that fail only outside of the data."""
    rows = _in(frame)
    rows = rows[failed(rows, "other_inputs")]
    if len(rows) < LEAST:
        return None
    kept = rows[passed(rows, "density") & passed(rows, "reconstruction")]
    text = (
        f"{len(rows)} models in float32 lose their inverse or their likelihood on inputs within "
        f"the range of the data that are no data. {len(kept)} of these are fit for density and "
        "reconstruction of data: a failure off the data says little about the data."
    )
    columns = ("other_inputs", "density", "reconstruction", "invertible_radius")
    return Finding(text, rows, ("density", "reconstruction"), columns)


def lost_draws(frame: pd.DataFrame) -> Finding | None:
    """Default flows that lose draws although their round trips are fine."""
    rows = _in(frame)
    rows = rows[failed(rows, "sampling") & passed(rows, "reconstruction")]
    if len(rows) < LEAST:
        return None
    worst = rows.loc[rows["sampling_figure"].idxmax()]
    text = (
        f"{len(rows)} models in float32 reconstruct their data to "
        f"{number(rows['reconstruction_figure'].max())} of a feature's deviation or better, and "
        f"lose draws of their own base; most the {_named(worst)}: "
        f"{per_cent(worst['sampling_figure'])} "
        f"({per_cent(worst['sampling_rate_low'])} to {per_cent(worst['sampling_rate_high'])})."
    )
    columns = ("sampling", "sampling_figure", "sampling_rate_low", "sampling_rate_high")
    return Finding(text, rows, INVERSE, (*columns, "reconstruction_figure"))


def one_default(frame: pd.DataFrame) -> Finding | None:
    """The flow that fails sampling most often at depth 4 after 400 steps, over the seeds."""
    rows = _in(frame)
    rows = rows[(rows["depth"] == 4) & (rows["steps"] == 400)]
    bad = rows[failed(rows, "sampling")]
    if not len(bad):
        return None
    kinds = bad.groupby(["flow", "data"]).size().sort_values(ascending=False, kind="stable")
    flow, data = kinds.index[0]
    rows = rows[(rows["flow"] == flow) & (rows["data"] == data)]
    if len(rows) < LEAST:
        return None
    rates = rows["sampling_figure"]
    text = (
        f"A default {flow} of depth 4 on {data} loses {per_cent(rates.min())} to "
        f"{per_cent(rates.max())} of its draws after 400 steps, over {len(rows)} seeds."
    )
    columns = ("sampling", "sampling_figure", "sampling_rate_low", "sampling_rate_high")
    return Finding(text, rows, ("sampling",), columns)


def whose_fault(frame: pd.DataFrame) -> Finding | None:
    """Models that fail sampling in float32: what float64 does."""
    # equal bits per dimension: of parts that were run apart, only pairs with the same weights count
    key = ["flow", "data", "depth", "steps", "seed", "bits"]
    single, double = _in(frame), _in(frame, "float64")
    single = single[failed(single, "sampling")]
    pairs = single.merge(double[[*key, "sampling", "sampling_figure"]], on=key)
    if len(pairs) < LEAST:
        return None
    cured = pairs["sampling_y"].isin(("stable", "marginal"))
    stay = pairs["sampling_y"].isin(("unstable", "non_finite"))
    text = (
        f"Of {len(pairs)} models that lose draws in float32 and were also measured in float64, "
        f"{int(cured.sum())} pass there and {int(stay.sum())} fail there, too. The median rate "
        f"falls from {per_cent(pairs['sampling_figure_x'].median())} to "
        f"{per_cent(pairs['sampling_figure_y'].median())}. Of all {len(single)} that lose draws in "
        f"float32, the audit finds in {_causes(single, 'model')} that a float64 copy sends the "
        "lost ones to the same place: the model puts them there, and float64 can only bring more "
        "of them back."
    )
    chosen = frame.merge(pairs[key], on=key)
    rows = chosen[chosen["dtype"].isin(("float32", "float64"))]
    return Finding(text, rows, ("sampling",), ("sampling", "sampling_figure", "sampling_cause"))


def _causes(rows: pd.DataFrame, cause: str) -> int:
    return int((rows["sampling_cause"] == cause).sum())


def scales(frame: pd.DataFrame) -> Finding | None:
    """Which scale of an autoregressive layer loses draws."""
    rows = _in(frame)
    rows = rows[rows["flow"].isin(SCALES)]
    if len(rows) < LEAST or not failed(rows, "sampling").any():
        return None
    kinds = rows["flow"].map(SCALES)
    parts = []
    for kind in dict.fromkeys(SCALES.values()):
        some = rows[kinds == kind]
        if len(some):
            lost = int(failed(some, "sampling").sum())
            parts.append(f"{lost} of {len(some)} with g = {kind} ({', '.join(some.flow.unique())})")
    text = (
        "Masked autoregressive flows x g(s) + t lose draws with some scales g and not with others. "
        f"Models that lose draws: {'; '.join(parts)}. The flows also differ in their networks and "
        "first weights, so that the scale need not be the cause."
    )
    return Finding(text, rows, ("sampling",), ("sampling", "sampling_figure", "sampling_cause"))


def blind_spectrum(frame: pd.DataFrame) -> Finding | None:
    """What the condition number at the data does not show."""
    rows = _in(frame)
    rows = rows[rows["log10_condition"].notna() & (rows["steps"] > 0)]
    bad, good = rows[failed(rows, "sampling")], rows[passed(rows, "sampling")]
    if len(bad) < LEAST or len(good) < LEAST:
        return None
    least = bad.loc[bad["log10_condition"].idxmin()]
    most = good.loc[good["log10_condition"].idxmax()]
    if least["log10_condition"] >= most["log10_condition"]:
        return None
    above = int((good["log10_condition"] > least["log10_condition"]).sum())
    text = (
        "The condition number at the data does not tell who loses draws. Among trained models the "
        f"{_named(least)} has one of {number(10 ** least['log10_condition'])} and loses "
        f"{per_cent(least['sampling_figure'])}; {above} models with a larger one pass, up to "
        f"{number(10 ** most['log10_condition'])}."
    )
    return Finding(text, rows, ("sampling",), ("log10_condition", "sampling", "sampling_figure"))


def bfloat16(frame: pd.DataFrame) -> Finding | None:
    """What bfloat16 is enough for."""
    rows = _in(frame, "bfloat16")
    if len(rows) < LEAST:
        return None
    shares = _shares(rows, CHECKED_USES)
    error = rows["density_figure"].replace(float("inf"), float("nan")).median()
    text = (
        f"Of {len(rows)} models cast to bfloat16, {shares}. The median of their largest "
        f"errors of log p(x) is {number(error)} nats. Draws were held to 1 % of the base's "
        "deviation, and one rounding of bfloat16 is 0.4 %; since then they are held to 6 %."
    )
    return Finding(text, rows, CHECKED_USES, CHECKED_USES)


def precisions(frame: pd.DataFrame) -> Finding | None:
    """The precision that each use needs."""
    rows = _in(frame)
    rows = rows[rows["lowest_density"] != ""]
    if len(rows) < LEAST:
        return None
    parts = []
    for use in ("density", "reconstruction", "sampling"):
        counts = rows[f"lowest_{use}"].value_counts()
        listed = ", ".join(f"{name} {count}" for name, count in counts.items() if name)
        parts.append(f"{use}: {listed}")
    text = (
        f"The lowest precision in which a use still passes, of {len(rows)} float32 models: "
        f"{'; '.join(parts)}. Autocast leaves the arithmetic outside of the networks in float32."
    )
    columns = tuple(f"lowest_{use}" for use in ("density", "reconstruction", "sampling"))
    return Finding(text, rows, (), columns)


def depth(frame: pd.DataFrame) -> Finding | None:
    """The same flows, data, seeds and steps at several depths."""
    rows = _in(frame)
    key = ["flow", "data", "steps", "seed"]
    depths = sorted(rows["depth"].unique())
    if len(depths) < 2:
        return None
    shallow, deep = depths[0], 16
    pairs = rows[rows["depth"] == shallow].merge(rows[rows["depth"] == deep][key], on=key)
    if len(pairs) < LEAST:
        return None
    both = rows.merge(pairs[key].drop_duplicates(), on=key)
    both = both[both["depth"].isin((shallow, deep))]
    parts = []
    for one in (shallow, deep):
        some = both[both["depth"] == one]
        parts.append(
            f"at depth {one} {int(failed(some, 'sampling').sum())} fail sampling and "
            f"{int(failed(some, 'reconstruction').sum())} reconstruction (median largest condition "
            f"number {number(10 ** some['log10_condition'].median())})"
        )
    text = f"Of {len(pairs)} pairs of models that differ in depth alone, {' and '.join(parts)}."
    return Finding(text, both, INVERSE, ("sampling", "reconstruction", "log10_condition"))


def deepest(frame: pd.DataFrame) -> Finding | None:
    """Which fresh flows keep an inverse at depth 64."""
    return _at_depth_64(frame, 0, "Fresh")


def deepest_trained(frame: pd.DataFrame) -> Finding | None:
    """Which trained flows keep an inverse at depth 64."""
    return _at_depth_64(frame, 400, "After 400 steps")


def _at_depth_64(frame: pd.DataFrame, steps: int, when: str) -> Finding | None:
    rows = _in(frame)
    rows = rows[(rows["depth"] == 64) & (rows["steps"] == steps)]
    if len(rows) < LEAST:
        return None
    lost = rows[_inverse_fails(rows)]["flow"].unique()
    whole = rows[passed(rows, "sampling") & passed(rows, "reconstruction")]["flow"]
    kept = [
        flow for flow in whole.unique() if (whole == flow).sum() == (rows["flow"] == flow).sum()
    ]
    text = (
        f"{when} at depth 64, {', '.join(kept) or 'no flow'} keep an inverse for data and draws "
        f"with every seed; {', '.join(lost) or 'none'} lose it with at least one."
    )
    sound = int(passed(rows[_inverse_fails(rows)], "density").sum())
    text += (
        f" Models that lose it: {int(_inverse_fails(rows).sum())}, with a right density {sound}."
    )
    text += f" Seeds measured: {rows['seed'].nunique()}."
    idle = rows[(rows["skipped"] == steps) & (steps > 0)]["flow"].unique()
    if len(idle):
        text += f" No step of {', '.join(idle)} was possible: its loss is not finite."
    columns = (*INVERSE, "sampling_figure", "reconstruction_figure", "skipped")
    return Finding(text, rows, ("density", *INVERSE), columns)


def images(frame: pd.DataFrame) -> Finding | None:
    """Trained flows on image patches."""
    rows = _in(frame)
    rows = rows[(rows["data"] == "patches") & (rows["steps"] > 0)]
    if len(rows) < LEAST:
        return None
    dims = rows["dimensions"].iloc[0]
    precise = int((rows["lowest_density"] == "float32").sum())
    off = int(failed(rows, "other_inputs").sum())
    text = (
        f"Of {len(rows)} trained models on image patches of {dims} dimensions, "
        f"{_shares(rows, CHECKED_USES)}. Their log p(x) is right to "
        f"{number(rows['density_figure'].max())} nats, {precise} of them need float32 for it, and "
        f"{off} fail on other inputs."
    )
    columns = (*CHECKED_USES, "density_figure", "lowest_density", "other_inputs")
    return Finding(text, rows, CHECKED_USES, columns)


def training(frame: pd.DataFrame) -> Finding | None:
    """The same models fresh and trained."""
    rows = _in(frame)
    key = ["flow", "data", "depth", "seed"]
    fresh, trained = rows[rows["steps"] == 0], rows[rows["steps"] == 400]
    pairs = fresh.merge(trained, on=key)
    if len(pairs) < LEAST:
        return None
    chosen = rows.merge(pairs[key], on=key)
    chosen = chosen[chosen["steps"].isin((0, 400))]
    grown = (pairs["log10_condition_y"] - pairs["log10_condition_x"]).median()
    first = chosen[chosen["steps"] == 0]
    last = chosen[chosen["steps"] == 400]
    text = (
        f"400 steps multiply the largest condition number by {number(10**grown)} (median of "
        f"{len(pairs)} models). Sampling fails in {int(failed(first, 'sampling').sum())} fresh and "
        f"{int(failed(last, 'sampling').sum())} trained models, density in "
        f"{int(failed(first, 'density').sum())} and {int(failed(last, 'density').sum())}."
    )
    return Finding(text, chosen, ("density", "sampling"), ("density", "sampling"))


def longer(frame: pd.DataFrame) -> Finding | None:
    """The same models after 400 and 4,000 steps."""
    rows = _in(frame)
    key = ["flow", "data", "depth", "seed"]
    pairs = rows[rows["steps"] == 400].merge(rows[rows["steps"] == 4000], on=key)
    pairs = _of_three_seeds(pairs, ["flow", "data", "depth"])
    if len(pairs) < LEAST:
        return None
    chosen = rows.merge(pairs[key], on=key)
    chosen = chosen[chosen["steps"].isin((400, 4000))]
    counts = [int(failed(chosen[chosen["steps"] == n], "sampling").sum()) for n in (400, 4000)]
    change = (pairs["bits_y"] - pairs["bits_x"]).median()
    grown = (pairs["log10_condition_y"] - pairs["log10_condition_x"]).median()
    text = (
        f"Of {len(pairs)} models, {counts[0]} fail sampling after 400 steps and {counts[1]} after "
        f"4,000. Ten times the steps improve the median likelihood by {number(-change)} bits per "
        f"dimension and multiply the largest condition number by {number(10**grown)}."
    )
    return Finding(text, chosen, ("sampling",), ("sampling", "sampling_figure", "bits"))


def seeds(frame: pd.DataFrame) -> Finding | None:
    """Settings whose verdict depends on the seed."""
    rows = _in(frame)
    key = ["flow", "data", "depth", "steps"]
    rows = _of_three_seeds(rows, key)
    if not len(rows):
        return None
    settings = rows.groupby(key).ngroups
    if settings < LEAST:
        return None
    flips = {}
    for use in USES:
        both = rows.assign(bad=failed(rows, use), good=passed(rows, use))
        seen = both.groupby(key)[["bad", "good"]].any()
        flips[use] = int((seen["bad"] & seen["good"]).sum())
    listed = ", ".join(f"{USES[use]} {count}" for use, count in flips.items())
    text = (
        f"Of {settings} settings with three seeds, the verdict passes with one seed and fails with "
        f"another in: {listed}."
    )
    return Finding(text, rows, CHECKED_USES, tuple(USES))


def inexact_float64(frame: pd.DataFrame) -> Finding | None:
    """Flows whose float64 round trip is no better than float32's."""
    rows = _in(frame, "float64")
    key = ["flow", "data", "depth", "steps", "seed"]
    # a condition number of 1e5 explains errors of 1e-11 in float64
    tame = _in(frame)[_in(frame)["log10_condition"] < 5][key]
    rows = rows.merge(tame, on=key)
    rows = rows[rows["reconstruction_figure"].between(1e-10, 1e-2)]
    names = rows["flow"].unique()
    if len(rows) < LEAST or len(names) > 3:
        return None
    others = _in(frame, "float64")
    others = others[~others["flow"].isin(names)]
    text = (
        f"Cast to float64, {', '.join(names)} still come back to "
        f"{number(rows['reconstruction_figure'].max())} of a feature's deviation only, where the "
        f"median of the other flows is {number(others['reconstruction_figure'].median())}. "
        "Condition numbers below 1e5 do not explain it; constants of the block that were rounded "
        "to float32 can."
    )
    return Finding(text, rows, ("reconstruction",), ("reconstruction", "reconstruction_figure"))


def weakest(frame: pd.DataFrame) -> Finding | None:
    """Where digits are lost."""
    rows = _in(frame)
    rows = rows[(rows["weakest_layer"] != "") & (rows["digits_lost"] > 1)]
    if len(rows) < LEAST:
        return None
    kinds = rows["weakest_layer"].str.extract(r"\((.*)\)")[0].value_counts()
    listed = ", ".join(f"{name} {count}" for name, count in kinds.items())
    text = (
        f"In {len(rows)} float32 models the inverse loses more than one digit at the data. The "
        f"layer that costs most is: {listed}."
    )
    return Finding(text, rows, (), ("weakest_layer", "digits_lost", "bits_lost"))


def cost(frame: pd.DataFrame) -> Finding | None:
    """What an audit takes."""
    rows = _in(frame)
    if len(rows) < LEAST:
        return None
    slow = rows.loc[rows["seconds"].idxmax()]
    text = (
        f"The audit of a float32 model (level standard and all five uses) took "
        f"{number(rows['seconds'].median())} s in the median, at most {slow['seconds']:.0f} s "
        f"({_named(slow)}), on a share of one busy core."
    )
    return Finding(text, rows, (), ("seconds",))


FINDINGS: tuple[Callable[[pd.DataFrame], Finding | None], ...] = (
    soundness,
    sound_densities,
    lost_draws,
    one_default,
    scales,
    whose_fault,
    blind_spectrum,
    off_data,
    depth,
    deepest,
    deepest_trained,
    images,
    training,
    longer,
    seeds,
    bfloat16,
    precisions,
    inexact_float64,
    weakest,
    cost,
)

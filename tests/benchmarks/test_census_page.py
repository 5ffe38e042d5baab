"""The census' page: its counts are those of its rows, and its table shows text as text."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from benchmarks.census import page, rows
from benchmarks.census.findings import (
    deepest,
    deepest_trained,
    findings,
    images,
    longer,
    sound_densities,
)
from benchmarks.census.page_price import price_section
from benchmarks.census.page_repairs import repairs_section
from benchmarks.census.repairs import failing_models

BAD = "unstable"


def models(**columns: list[object]) -> pd.DataFrame:
    """Sound float32 models, but for the columns given."""
    count = max((len(values) for values in columns.values()), default=4)
    frame = pd.DataFrame(
        {
            "flow": [f"flow {k}" for k in range(count)],
            "library": "zuko",
            "data": "moons",
            "dimensions": 2,
            "depth": 4,
            "steps": 400,
            "seed": 0,
            "dtype": "float32",
            "bits": 1.5,
            "seconds": 2.0,
            "raised": "",
            "part": "one",
            "log10_condition": 1.0,
            "digits_lost": 0.1,
            "bits_lost": 0.1,
            "invertible_radius": 3.0,
            "sampling_rate_low": 0.0,
            "sampling_rate_high": 0.0009,
        }
    )
    for use in rows.USES:
        frame[use], frame[f"{use}_figure"] = "stable", 1e-6
        frame[f"true_{use}"], frame[f"true_{use}_figure"] = "fit", 1e-6
        frame[f"lowest_{use}"] = "float16"
    for name in rows.TEXT:
        frame[name] = ""
    return frame.assign(**columns)


def test_verdicts_are_held_against_the_truth():
    frame = models(
        density=["stable", "marginal", BAD, BAD, "stable", "undecided"],
        true_density=["fit", "near", "unfit", "fit", "unfit", "fit"],
    )
    assert rows.agreement(frame, ["density"]) == {"agree": 2, "contradict": 2, "open": 2}
    wrong = rows.contradictions(frame)
    assert list(wrong["flow"]) == ["flow 3", "flow 4"]
    assert set(wrong["use"]) == {"density"}
    assert "flow 3" in page._truth(frame)


def test_sound_densities_are_counted_among_those_that_are_not_invertible():
    frame = models(
        reconstruction=["stable", BAD, "non_finite", "stable", "stable"],
        sampling=["stable", "stable", BAD, BAD, "undecided"],
        density=["stable", "stable", "stable", BAD, "stable"],
    )
    found = sound_densities(frame)
    assert found.text.startswith("3 of 5 models")
    assert "2 of these have sound densities" in found.text
    assert list(found.rows["flow"]) == ["flow 1", "flow 2", "flow 3"]
    assert "| float32 | 5 | 3 | 2 | 1 | 0 | 1 |" in page._settled(frame)


def test_what_the_rows_do_not_support_is_no_finding():
    texts = [one.text for one in findings(models(flow=["a", "b", "c"]))]
    assert not [text for text in texts if "lose" in text.split(".")[0]]
    assert findings(models().head(0)) == []


def test_what_rests_on_one_seed_is_a_hint():
    lost = models(flow=["a", "b", "c"], sampling=[BAD] * 3, sampling_figure=[0.1] * 3)
    text = page.markdown(lost, {}, pd.DataFrame(), pd.DataFrame())
    sure, _, hints = text.partition("## Hints")
    assert "lose draws" in hints
    assert "lose draws" not in sure
    three = page.markdown(lost.assign(seed=[0, 1, 2]), {}, pd.DataFrame(), pd.DataFrame())
    assert "lose draws" in three
    assert "## Hints" not in three


def test_a_flow_keeps_its_inverse_at_depth_64_if_every_seed_does():
    frame = models(
        flow=["a", "a", "b", "b", "c"],
        seed=[0, 1, 0, 1, 0],
        sampling=["stable", "stable", "stable", BAD, "undecided"],
        density=["stable"] * 5,
        skipped=[0, 3, 0, 0, 400],
    )
    assert deepest_trained(frame.assign(depth=16)) is None
    found = deepest_trained(frame.assign(depth=64))
    assert found.text.startswith("After 400 steps at depth 64, a keep an inverse")
    assert "with every seed; b lose it with at least one." in found.text
    assert "Models that lose it: 1, with a right density 1." in found.text
    assert "No step of c was possible" in found.text
    assert deepest(frame.assign(depth=64)) is None


def test_longer_trainings_are_compared_where_three_seeds_were_trained():
    short = models(flow=["a", "a", "a", "b"], seed=[0, 1, 2, 0], bits=[2.0, 2.0, 2.0, 9.0])
    long = short.assign(
        steps=4000, bits=[1.0, 1.5, 1.75, 0.0], log10_condition=[2.0, 3.0, 4.0, 9.0]
    )
    long["sampling"] = [BAD, "stable", "stable", BAD]
    found = longer(pd.concat([short, long], ignore_index=True))
    assert found.text.startswith("Of 3 models, 0 fail sampling after 400 steps and 1 after 4,000.")
    assert "by 0.5 bits per dimension" in found.text
    assert "condition number by 1e+02" in found.text


def test_image_patches_are_counted_once_trained():
    frame = models(density_figure=[0.25, 0.5, 0.125, 0.5], steps=[400, 400, 400, 0])
    assert images(frame) is None
    found = images(frame.assign(data="patches", dimensions=768, lowest_density="float32"))
    assert found.text.startswith("Of 3 trained models on image patches of 768 dimensions")
    assert "right to 0.5 nats, 3 of them need float32" in found.text


def test_the_page_is_made_of_any_rows():
    text = page.markdown(models(), {}, pd.DataFrame(), pd.DataFrame())
    assert "4 rows; a row is one model in one dtype." in text
    assert set(page.figures(models())) == {"verdicts", "lost_draws", "precision"}


def test_the_table_shows_text_as_text_and_numbers_as_they_are():
    frame = models(raised=["<script>alert(1)</script>", "", 'a "b"', ""], bits=[1e-7, 2.0, 3.5, -4])
    text = page.table_page(frame)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert 'data-value="1e-07"' in text
    assert text.count("<tr>") == 1 + len(frame)
    assert text.count("http") == 0


def test_parts_are_joined_and_no_model_is_counted_twice(tmp_path):
    with pytest.raises(FileNotFoundError, match="found none"):
        rows.read_parts(tmp_path)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        frame = models().assign(data=name)
        frame.to_csv(tmp_path / name / f"{rows.STEM}.csv", index=False)
    assert len(rows.read_parts(tmp_path)) == 8
    (tmp_path / "third").mkdir()
    models().assign(data="first").to_csv(tmp_path / "third" / f"{rows.STEM}.csv", index=False)
    with pytest.raises(ValueError, match="in two parts: flow 0, first, 4, 400, 0, float32"):
        rows.read_parts(tmp_path)


def test_models_that_fail_are_numbered_within_their_kind():
    frame = models(
        flow=["a", "a", "a", "b", "b", "c"],
        seed=[0, 1, 2, 0, 1, 0],
        sampling=[BAD, "stable", BAD, "stable", BAD, BAD],
        gradients=["stable", "stable", "non_finite", "stable", "stable", "stable"],
        steps=[400, 400, 400, 400, 400, 0],
    )
    found = failing_models(frame)
    assert list(zip(found["flow"], found["seed"], found["round"], strict=True)) == [
        ("a", 0, 0),
        ("a", 2, 1),
        ("b", 1, 0),
    ]


def repaired(**columns: object) -> pd.DataFrame:
    """One model that fails sampling and reconstruction, repaired in two ways."""
    frame = models().head(2)[["flow", "data", "depth", "steps", "seed"]].assign(flow="a")
    for use in rows.CHECKED_USES:
        frame[f"{use}_before"], frame[f"{use}_before_figure"] = BAD, 0.5
        frame[f"{use}_after"], frame[f"{use}_after_figure"] = "stable", 0.25
        frame[f"true_{use}_after"] = "fit"
    return frame.assign(
        repair=["stabilize", "exact"],
        failing="sampling reconstruction",
        refused="",
        bits_before=1.0,
        bits_after=[1.5, 1.0],
        repair_steps=[40.0, math.nan],
        time_factor=2.0,
        raised_layers=math.nan,
        layers=math.nan,
        kept_bits=[math.nan, 3.5],
        **columns,
    )


def test_what_repairs_cure_and_break_is_counted_by_use():
    frame = repaired(cured=["sampling", "reconstruction"], broken=["density", ""])
    text = repairs_section(models(), frame)
    stabilize = next(line for line in text.splitlines() if line.startswith("| `stabilize`"))
    exact = next(line for line in text.splitlines() if line.startswith("| `exact`"))
    cells = [cell.strip() for cell in stabilize.split("|")]
    assert cells[3:8] == ["0 of 0", "1 of 1", "0 of 1", "0 of 0", "1"]
    assert cells[8] == "0.5 (0.5 to 0.5)"
    assert [cell.strip() for cell in exact.split("|")][3:8] == ["", "", "1 of 1", "", "0"]
    assert (
        "Of 2 failing uses of these models, cured are by `regularized` 0, by `stabilize` 1" in text
    )
    assert "sampling 0.5, 0.25 (stable); reconstruction 0.5, 0.25 (stable)" in text
    assert repairs_section(models(), frame.head(0)) == ""


def test_the_price_is_that_of_pairs_of_the_same_seed():
    frame = pd.DataFrame(
        {
            "data": "moons",
            "treatment": ["nothing", "nothing", "FD 1", "FD 1", "FD 10", "FD 10"],
            "seed": [0, 1, 1, 0, 0, 1],
            "bits": [1.0, 2.0, 2.25, 1.125, 1.5, 2.5],
            "log10_condition": [3.0, 5.0, 3.5, 1.875, 1.0, 1.0],
            "sampling_figure": 0.0,
            "reconstruction_figure": 1e-6,
        }
    )
    for use in rows.CHECKED_USES:
        frame[use], frame[f"true_{use}"] = "stable", "fit"
    text = price_section(frame)
    assert "divide it by ten with every seed: FD 1, FD 10. The cheapest is FD 1" in text
    assert "+0.125 to +0.250 bits per dimension" in text
    assert "18 verdicts of density, sampling and reconstruction agree, 0 contradict" in text
    assert price_section(frame.head(0)) == ""
    # of two condition numbers that float64 does not resolve neither is smaller
    frame.loc[frame["seed"] == 0, "log10_condition"] = [math.inf, 18.0, 1.0]
    assert "divide it by ten with every seed: FD 10. The cheapest" in price_section(frame)


def test_the_committed_pages_are_those_of_the_committed_rows():
    frame = rows.read_parts()
    text = (page.DOCS / page.PAGE).read_text(encoding="utf-8")
    assert text == page.markdown(frame, rows.origins(), rows.read_repairs(), rows.read_price())
    assert (page.DOCS / page.TABLE).read_text(encoding="utf-8") == page.table_page(frame)

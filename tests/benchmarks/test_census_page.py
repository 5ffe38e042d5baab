"""The census' page: its counts are those of its rows, and its table shows text as text."""

from __future__ import annotations

import pandas as pd
import pytest

from benchmarks.census import page, rows
from benchmarks.census.findings import findings, sound_densities

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


def test_the_page_is_made_of_any_rows():
    text = page.markdown(models(), {})
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


def test_the_committed_pages_are_those_of_the_committed_rows():
    frame = rows.read_parts()
    text = (page.DOCS / page.PAGE).read_text(encoding="utf-8")
    assert text == page.markdown(frame, rows.origins())
    assert (page.DOCS / page.TABLE).read_text(encoding="utf-8") == page.table_page(frame)

"""Plots place numbers where they belong, and say in words which ones they could not place."""

from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from inn_guard.report.plots import (
    full_spectrum,
    histogram,
    layer_bars,
    looks,
    pictures,
    row_bars,
    spectrum_range,
    standalone,
)
from inn_guard.report.plots.axis_scale import scale_for

NAN, INF = float("nan"), float("inf")


def texts(drawing) -> list[str]:
    return [
        "".join(element.itertext()).strip()
        for element in ElementTree.fromstring(drawing.markup).iter("text")
    ]


def count(drawing, style: str) -> int:
    return sum(
        style in element.get("style", "")
        for element in ElementTree.fromstring(drawing.markup).iter("path")
    )


def painted(drawing) -> list[np.ndarray]:
    data = re.findall(r"base64,([^\"]+)", drawing.markup)
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(item))).convert("RGB")) for item in data
    ]


@pytest.mark.thorough
@settings(max_examples=settings().max_examples // 3)  # a drawing takes half a second
@given(arrays.arrays(np.float64, st.integers(1, 30), elements=st.floats(allow_subnormal=True)))
def test_any_numbers_can_be_drawn_and_the_missing_are_counted(values):
    drawing = histogram("error", torch.from_numpy(values))
    for name, bad in (("NaN", np.isnan(values)), ("infinite", np.isinf(values))):
        found = re.search(rf"(\d+) of {values.size} (?:is|are) {name}", drawing.caption)
        assert (int(found.group(1)) if found else 0) == bad.sum()
    rows = [{"index": 4, "name": "x", "gain": value} for value in values.tolist()]
    ElementTree.fromstring(layer_bars("gain", rows).markup)
    powers = torch.from_numpy(np.where(np.abs(values) > 1e4, np.copysign(np.inf, values), values))
    ElementTree.fromstring(spectrum_range(powers, powers - 1).markup)


@given(arrays.arrays(np.float64, st.integers(1, 30), elements=st.floats(allow_subnormal=False)))
def test_every_finite_number_has_a_place_but_zero_and_negatives_on_a_logarithmic_axis(values):
    scale = scale_for(values)
    placed = ~np.isnan(scale.place(values))
    expected = np.isfinite(values) & ((values > 0) if scale.logarithmic else True)
    assert (placed == expected).all()


def test_samples_that_were_not_examined_are_no_nan():
    """Of five samples two were examined, and one of these is NaN: one finding."""
    values, measured_mask = (
        torch.tensor([NAN, 0.5, NAN, NAN, NAN]),
        torch.tensor([False, True, True, False, False]),
    )
    caption = histogram("error", values, measured_mask=measured_mask).caption
    assert "1 of 2 is NaN" in caption
    assert "Not examined: 3 of 5 samples" in caption
    assert "Not examined" not in histogram("error", values).caption


def test_errors_are_logarithmic_unless_they_have_signs():
    assert scale_for(np.array([1e-9, 1e-2])).logarithmic
    assert not scale_for(np.array([-1e-9, 1e-2])).logarithmic


def test_logarithmic_histogram_says_how_many_are_zero():
    drawing = histogram("error", torch.tensor([0.0, 0.0, 1e-6, 1.0]), unit="nats")
    assert "2 of 4 are exactly zero" in drawing.caption
    assert "error [nats]" in texts(drawing)


def test_median_is_that_of_all_finite_numbers_or_is_not_drawn():
    assert "median" in texts(histogram("error", torch.tensor([0.0, 1e-6, 1.0])))
    mostly_zero = histogram("error", torch.tensor([0.0, 0.0, 0.0, 1e-6, 1.0]))
    assert "median" not in texts(mostly_zero)
    assert "median 0" in mostly_zero.caption


def test_histogram_of_nothing_finite_says_so():
    drawing = histogram("error", torch.tensor([NAN, INF]))
    assert "no finite number to show" in texts(drawing)
    assert "1 of 2 is NaN, 1 of 2 is infinite" in drawing.caption


def test_bar_heights_add_up_to_the_samples():
    drawing = histogram("error", torch.linspace(1, 2, 50))
    heights = []
    for path in ElementTree.fromstring(drawing.markup).iter("path"):
        if "fill: var(--low)" in path.get("style", ""):
            y = [float(pair.split()[1]) for pair in re.findall(r"[ML] ([\d. -]+)", path.get("d"))]
            heights.append(max(y) - min(y))
    unit = sum(heights) / 50
    assert all(abs(height / unit - round(height / unit)) < 1e-3 for height in heights)


def test_bars_mark_the_largest_and_name_what_is_not_finite():
    rows = [
        {"index": 2, "name": "A", "gain": 1.0},
        {"index": 5, "name": "B", "gain": 7.0},
        {"index": 6, "name": "C", "gain": NAN},
        {"index": 9, "name": "D"},
    ]
    drawing = layer_bars("gain", rows[:2])
    assert "Largest: 7 in layer 5 B." in drawing.caption
    assert count(drawing, "fill: var(--high)") == 1
    assert {"2  A", "5  B"} <= set(texts(drawing))
    assert texts(layer_bars("gain", rows)).count("NaN") == 2
    assert "2 of 4 have no finite number" in layer_bars("gain", rows).caption


def test_zeros_are_drawn_as_nothing_and_counted():
    values = np.array([0.0, 1e-9, 1.0, INF])
    drawing = row_bars("error", ["a", "b", "c", "d"], values)
    assert "1 of 4 are exactly zero and not drawn." in drawing.caption
    assert texts(drawing).count("Inf") == 1
    assert "0" not in texts(drawing)


def test_many_layers_with_zeros_have_no_line_of_the_colour_of_nan():
    rows = [{"index": k, "name": "x", "gain": 10.0 ** -(k % 9)} for k in range(60)]
    for row in rows[::2]:
        row["gain"] = 0.0
    drawing = layer_bars("gain", rows)
    assert "30 of 60 are exactly zero and not drawn." in drawing.caption
    assert "var(--bad)" not in drawing.markup
    rows[3]["gain"] = NAN
    assert "var(--bad)" in layer_bars("gain", rows).markup


def test_a_logarithm_is_not_taken_twice():
    rows = [{"index": k, "name": "x", "log10_gain": float(-k)} for k in range(5)]
    drawing = layer_bars("log10_gain", rows, unit="log10")
    assert "gain" in texts(drawing)
    assert "10⁻⁴" in texts(drawing)
    assert "Largest: 1 in layer 0 x." in drawing.caption
    powers = histogram("log10_condition_number", torch.tensor([1.0, 400.0]), unit="log10")
    assert "largest 10⁴⁰⁰" in powers.caption
    assert "condition number" in texts(powers)
    digits = layer_bars("digits_lost", [{"index": 0, "digits_lost": 1e-9}, {"digits_lost": 2.0}])
    assert not [text for text in texts(digits) if "10⁻" in text]


def test_a_limit_is_a_line_and_parts_the_bars():
    values = torch.tensor([1e-8, 1e-7, 1e-6, 0.5])
    drawing = histogram("error", values, unit="nats", limit=0.1)
    assert "limit 0.1" in texts(drawing)
    assert "1 of 4 are above the limit 0.1." in drawing.caption
    assert count(drawing, "fill: var(--high)") >= 1
    assert "limit" not in histogram("error", values).caption
    assert "limit 0.1" in texts(histogram("error", torch.zeros(3) + 1e-9, limit=0.1))
    rows = [{"index": k, "name": "x", "angle": 0.3 * k} for k in range(50)]
    assert "16 of 50" not in layer_bars("angle", rows).caption
    assert "46 of 50 are above the limit 1." in layer_bars("angle", rows, limit=1.0).caption


def test_numbers_that_are_all_zero_are_no_finding():
    drawing = histogram("error", torch.zeros(4), limit=0.1)
    assert "0 of 4 are above the limit" in drawing.caption
    assert "no finite number to show" not in texts(drawing)


def test_looks_show_the_interval_and_the_limit():
    rows = [
        {"draws": 1024, "lost": 0, "rate_low": 0.0, "rate_high": 0.0036},
        {"draws": 4096, "lost": 2, "rate_low": 6e-5, "rate_high": 0.00176},
    ]
    drawing = looks(rows, limit=1e-3)
    assert {"0 of 1,024", "2 of 4,096", "limit 0.1 %"} <= set(texts(drawing))
    assert drawing.caption == "After 4,096 draws the rate lies between 0.006 and 0.176 %."


def test_a_figure_of_its_own_needs_no_page():
    text = standalone(histogram("error", torch.tensor([1.0, 2.0])))
    ElementTree.fromstring(text)
    assert "var(" not in text
    assert "#0072b2" in text


def test_shares_of_a_whole_are_compared_by_length():
    drawing = layer_bars("share", [{"share": 0.99}, {"share": 0.01}])
    assert "0.6" in texts(drawing)
    assert not any("10⁻" in text for text in texts(drawing))


def test_many_layers_become_a_line():
    drawing = layer_bars("gain", [{"index": 2 * k, "gain": float(k + 1)} for k in range(300)])
    assert "layer 598" in texts(drawing)
    assert count(drawing, "fill: var(--low)") == 0


@pytest.mark.parametrize(
    "name",
    ["$", r"$\frac{", "<script>alert(1)</script>", 'id="a"', "a\x00b\ud800", "日本 μ", "x\ny"],
)
def test_names_are_text_never_mathematics_or_markup(name):
    drawing = layer_bars(name, [{"name": name, name: 1.0}, {"name": name, name: 2.0}], unit=name)
    root = ElementTree.fromstring(drawing.markup)
    assert not list(root.iter("script"))
    shown = "".join(texts(drawing))
    assert name.replace("\x00", "�").replace("\ud800", "�").replace("\n", " ")[
        :20
    ] in shown.replace("\n", " ")


def test_spectrum_range_says_the_worst_condition_number_also_beyond_floats():
    drawing = spectrum_range(torch.tensor([2.0, 200.0, 0.0]), torch.tensor([0.0, -300.0, -INF]))
    assert "10⁵⁰⁰" in drawing.caption
    assert "1 of 3" in drawing.caption


def test_whole_spectrum_takes_any_order_and_counts_zeros():
    drawing = full_spectrum(torch.tensor([[1.0, 100.0, 0.0], [1.0, 10.0, 0.1]]))
    assert "1 of 2 spectra" in drawing.caption
    assert full_spectrum(torch.full((2, 3), NAN)).caption


def test_images_keep_values_and_paint_non_finite_pixels():
    image = torch.tensor([[[[0.0, 1.0], [0.5, NAN]]]])
    (shown,) = painted(pictures({"original": image}))
    assert shown[0, 0].tolist() == [0, 0, 0]
    assert shown[0, 1].tolist() == [255, 255, 255]
    assert shown[1, 0, 0] in (127, 128)
    assert len(set(shown[1, 1].tolist())) > 1
    assert "1 values are not finite" in pictures({"original": image}).caption


def test_what_is_cut_by_less_than_half_a_grey_level_is_not_called_cut():
    original = torch.tensor([[[[0.0, 1.0]]]])
    assert "cut" not in pictures({"original": original, "reconstruction": original + 1e-6}).caption
    assert (
        "1 of 2 values cut"
        in pictures({"original": original, "reconstruction": original + 0.004}).caption
    )


def test_difference_has_its_own_symmetric_scale_and_the_rest_that_of_the_first():
    original = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    drawing = pictures(
        {"original": original, "reconstruction": original * 100, "difference": original * 99}
    )
    assert "values cut at its ends" in drawing.caption
    assert len(painted(drawing)) == 6
    zero = painted(pictures({"difference": torch.tensor([[[[0.0, 1.0, -1.0]]]])}))[0][0]
    assert min(zero[0]) > 240
    assert zero[1][0] > zero[1][2]
    assert zero[2][2] > zero[2][0]


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels_is_shown_and_said(channels):
    drawing = pictures({"original": torch.rand(12, channels, 3, 3)})
    assert len(painted(drawing)) == 8
    assert "first 8 of 12 images" in drawing.caption
    assert ("channels" in drawing.caption) == (channels not in (1, 3))


@pytest.mark.parametrize("value", [NAN, INF, 1e308, -1e308, 5e-324, 0.0])
def test_images_of_one_extreme_value(value):
    assert (
        len(painted(pictures({"original": torch.full((1, 1, 2, 2), value, dtype=torch.float64)})))
        == 1
    )


def test_matplotlib_is_left_as_it_was_and_drawing_is_repeatable():
    before = dict(matplotlib.rcParams)
    first = histogram("error", torch.tensor([1.0, 2.0]))
    assert dict(matplotlib.rcParams) == before
    assert histogram("error", torch.tensor([1.0, 2.0])) == first

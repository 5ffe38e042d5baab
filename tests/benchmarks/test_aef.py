"""The AEF experiments run in their smallest setting, and their data is split as they say."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.aef import against_vae, denoising
from benchmarks.aef.drawing import draw
from benchmarks.quantized_images import quantized_digits


@pytest.fixture(autouse=True)
def _as_at_home(_float64, tmp_path, monkeypatch):
    """float32, and a folder of its own for what a run leaves behind."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)


def test_digits_are_split_without_overlap_and_keep_their_grey_values():
    data = quantized_digits()
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1200, 147, 450]
    assert int(data.train.max()) == data.levels - 1 == 16
    assert torch.equal(data.train, quantized_digits().train)
    assert not torch.equal(data.train, quantized_digits(seed=1).train)


@pytest.mark.slow
def test_against_vae_measures_every_model_and_draws():
    config = against_vae.Config.smoke()
    frame = against_vae.run(config)
    assert list(frame["model"]) == list(config.models)
    assert frame["bpd"].map(math.isfinite).all()
    assert (frame["bpd"] <= frame["bpd_upper"] + 1e-9).all()
    assert frame["parameters"].nunique() > 1
    assert not frame["features"].str.contains("FID").any()
    assert len(draw(frame).findobj()) > 100


def test_denoising_measures_every_model_and_draws():
    config = denoising.Config.smoke()
    frame = denoising.run(config)
    assert list(frame["model"]) == list(config.models)
    assert frame["pixel_mse_of_noisy"].nunique() == 1
    assert len(denoising.draw(frame).axes) == len(config.models)

"""The image experiments: data, training that survives a kill, rows of an evaluation."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.common.experiments import find
from benchmarks.common.runner import preset
from benchmarks.exploding_inverses import cifar10_classifiers, dequantization, regularizer_cost
from benchmarks.exploding_inverses.classifier_report import compare_with_paper, with_paper_columns
from benchmarks.exploding_inverses.flow_report import grid
from benchmarks.exploding_inverses.image_classifiers import (
    FiniteDifferencesTerm,
    NormalizingFlowTerm,
    Run,
)
from benchmarks.exploding_inverses.image_data import DATA, shifted
from benchmarks.exploding_inverses.image_training import (
    Batch,
    Plan,
    decayed,
    evaluation_steps,
    train,
    warmed_up,
)
from benchmarks.exploding_inverses.table10 import conclusions
from inn_guard.audits.round_trip import round_trip
from inn_guard.layers.residual import Residual


@pytest.fixture(autouse=True)
def _as_on_the_command_line(monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def training(text="affine conv none", **changes):
    return cifar10_classifiers.Training.of(
        dataclasses.replace(preset(cifar10_classifiers, "smoke"), **changes), Run.parse(text)
    )


def batch(step=0, rows=8):
    return Batch(torch.arange(rows), step, generator(step))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), reach=st.integers(0, 3), mirrored=st.booleans())
def test_a_shifted_image_is_a_crop_of_the_padded_one_or_of_its_mirror_image(seed, reach, mirrored):
    pixels = torch.randint(1, 255, (5, 2, 6, 7), generator=generator(seed), dtype=torch.uint8)
    moved = shifted(pixels, reach=reach, mirrored=mirrored, generator=generator(seed + 1))
    assert moved.shape == pixels.shape
    for image, found in zip(pixels, moved, strict=True):
        sources = [image, image.flip(2)] if mirrored else [image]
        padded = [torch.nn.functional.pad(source, [reach] * 4) for source in sources]
        crops = [
            p[:, i : i + 6, j : j + 7]
            for p in padded
            for i in range(2 * reach + 1)
            for j in range(2 * reach + 1)
        ]
        assert any(torch.equal(found, crop) for crop in crops)


def test_about_half_of_the_images_are_mirrored_and_all_shifts_occur():
    ramp = torch.arange(1, 8).expand(400, 1, 7, 7)
    moved = shifted(ramp, reach=1, mirrored=True, generator=generator())
    rising = int((moved[:, 0, 3, 4] > moved[:, 0, 3, 3]).sum())
    assert 140 < rising < 260
    assert {int(v) for v in moved[moved[:, 0, 3, 4] > moved[:, 0, 3, 3]][:, 0, 3, 3]} == {3, 4, 5}


def test_normalised_training_images_have_mean_zero_and_variance_one_per_channel():
    net = training(train_images=1200)
    x = net.normalised(net.data.train)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(1), atol=1e-5)
    assert torch.allclose(x.var((0, 2, 3), correction=0), torch.ones(1), atol=1e-4)


def test_pixels_cut_to_five_bits_keep_their_leading_bits():
    data = dataclasses.replace(
        DATA["digits"](None), levels=256, train=torch.arange(256, dtype=torch.uint8)
    )
    cut = data.in_bits(5)
    assert cut.levels == 32
    assert torch.equal(cut.train, torch.arange(32).repeat_interleave(8).to(torch.uint8))


@given(steps=st.integers(1, 10**5), count=st.integers(1, 40))
def test_looks_ascend_and_end_with_the_last_step(steps, count):
    looks = evaluation_steps(steps, count)
    assert looks[-1] == steps
    assert looks[0] >= 1
    assert list(looks) == sorted(set(looks))


def test_rates_decay_at_their_epochs_and_warm_up():
    rate = decayed((2, 3), steps_per_epoch=10)
    assert [rate(19), rate(20), rate(30)] == pytest.approx([1, 0.1, 0.01])
    assert [warmed_up(4)(step) for step in (0, 3, 9)] == pytest.approx([0.25, 1, 1])


class Killed(Exception):
    pass


@pytest.mark.parametrize("text", ["affine conv FD 1e-3", "affine shuffle NF 1e-3"])
def test_a_training_that_was_killed_continues_to_the_same_weights_and_rows(tmp_path, text):
    def run(checkpoint, kill_at=None):
        net = training(text)
        evaluated = []

        def evaluate():
            evaluated.append(1)
            if len(evaluated) == kill_at:
                raise Killed
            return {"weight": float(sum(p.detach().double().sum() for p in net.net.parameters()))}

        plan = Plan(steps=6, batch_size=16, evaluations=(2, 4, 6), rate=decayed((1,), 4))
        optimizer = torch.optim.Adam(net.net.parameters(), 1e-2)
        return train(
            net.net,
            optimizer,
            net.loss(),
            plan=plan,
            evaluate=evaluate,
            checkpoint=checkpoint,
            examples=len(net.data.train),
        )

    whole = run(tmp_path / "whole.safetensors")
    with pytest.raises(Killed):
        run(tmp_path / "killed.safetensors", kill_at=3)
    resumed = run(tmp_path / "killed.safetensors")
    assert [row["step"] for row in resumed] == [2, 4, 6]
    assert [row["weight"] for row in resumed] == [row["weight"] for row in whole]
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]


def test_a_loss_that_stays_nan_ends_the_training_with_a_row(tmp_path):
    net = training()
    rows = train(
        net.net,
        torch.optim.Adam(net.net.parameters(), 1e30),
        net.loss(),
        plan=Plan(steps=50, batch_size=16, evaluations=(1, 5, 50)),
        evaluate=net.evaluate,
        checkpoint=tmp_path / "c.safetensors",
        examples=64,
    )
    assert [row["step"] for row in rows] == [1, 5]
    assert rows[1]["skipped_steps"] == 4
    assert not math.isfinite(rows[1]["loss"])
    assert rows[1]["broken_images"] == 16
    assert not rows[1]["invertible"]
    assert rows[1]["reconstruction_error"] == math.inf
    assert rows[1]["broken_gradients"] == 1


@pytest.mark.parametrize("clip", [10.0, math.inf])
def test_steps_whose_gradient_is_not_finite_are_left_out(tmp_path, clip):
    weight = torch.nn.Linear(1, 1, bias=False)
    seen = []

    def loss(batch):
        seen.append(weight.weight.item())
        return (weight.weight * (math.nan if batch.step == 1 else 1.0)).sum()

    torch.nn.init.ones_(weight.weight)
    plan = Plan(steps=4, batch_size=1, evaluations=(1, 3, 4), clip=clip)
    optimizer = torch.optim.SGD(weight.parameters(), 0.25)
    rows = train(
        weight, optimizer, loss, plan=plan, evaluate=dict, checkpoint=tmp_path / "c", examples=1
    )
    assert seen == [1, 0.75, 0.75, 0.5]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1]


@pytest.mark.parametrize(
    "text", ["affine conv", "affine conv FD", "affine conv none 1e-3", "linear conv none", ""]
)
def test_a_run_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="expected"):
        Run.parse(text)


def test_the_unregularized_affine_net_alone_is_trained_with_stored_activations():
    names = preset(cifar10_classifiers, "paper").runs
    assert [name for name in names if not Run.parse(name).reversible] == [
        "affine shuffle none",
        "affine conv none",
    ]
    assert len(names) == len(find("exploding_inverses.cifar10_classifiers").published())


@pytest.mark.parametrize(
    "text", ["affine conv FD 1e-2", "additive conv NF 1e-2", "additive shuffle none"]
)
def test_memory_saving_training_has_the_gradients_of_plain_training(text):
    gradients = []
    for saving in (False, True):
        net = training(text, memory_saving=saving)
        net.loss()(batch()).backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in net.net.parameters() if p.grad is not None])
        )
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)


def test_fd_is_due_every_kth_step_with_noise_that_depends_on_the_step_alone():
    net = training()
    x = net.normalised(net.data.train[:8])
    term = FiniteDifferencesTerm(1.0, every=3, fraction=0.5)
    penalties = [
        float(torch.as_tensor(term.latents(net.net.inn, x, batch(step))[1]).detach())
        for step in (0, 1, 2, 3, 0)
    ]
    assert penalties[0] > 0
    assert penalties[1:3] == [0, 0]
    assert penalties[3] not in (0, penalties[0])
    assert penalties[4] == penalties[0]


def test_nf_is_the_negative_log_likelihood_of_the_same_pass():
    net = training()
    x = net.normalised(net.data.train[:8])
    z, penalty = NormalizingFlowTerm(0.1).latents(net.net.inn, x, batch())
    assert torch.equal(z, net.net.inn(x))
    assert penalty.item() == pytest.approx(-0.1 * float(net.net.inn.log_prob(x).mean()), rel=1e-5)


def last_row(case, data="CIFAR-10 (JPEG copies)"):
    run = Run.parse(case)
    row = {
        "case": case,
        "coupling": run.coupling,
        "mixing": run.mixing,
        "regularizer": run.regularizer,
        "data": data,
    }
    ours = dict.fromkeys(
        ("test_accuracy", "reconstruction_error", "condition_number", "sigma_min", "sigma_max"), 1.0
    )
    return row | {"coefficient": run.coefficient, "broken_images": 0, "mean_angle": 0.0} | ours


def test_the_papers_figures_stand_beside_their_own_runs():
    names = [
        "affine conv none",
        "affine conv NF 1e-4",
        "additive shuffle FD 1e-4",
        "affine conv FD 7e-7",
    ]
    frame = with_paper_columns(
        pd.DataFrame([last_row(name) for name in names] + [last_row(names[0], data="digits")])
    )
    assert frame["paper_condition_number"].tolist()[:3] == [8.6e14, 9.6e3, 7.0e2]
    assert frame["paper_test_accuracy"].tolist()[:3] == pytest.approx([0.8907, 0.8864, 0.8849])
    assert frame["paper_test_accuracy"].isna().tolist() == [False, False, False, True, True]
    assert (
        "/ -" in compare_with_paper(frame).set_index("run").loc["affine conv FD 7e-7", "accuracy"]
    )


def test_the_papers_conclusions_hold_of_its_own_figures_and_not_of_others():
    frame = with_paper_columns(
        pd.DataFrame([last_row(name) for name in preset(cifar10_classifiers, "paper").runs])
    )
    counted = conclusions(frame)
    assert [text.split(" of ")[0] for text in counted["paper"]] == [
        text.split(" of ")[1] for text in counted["paper"]
    ]
    assert counted.set_index("conclusion").loc["FD lowers the condition number", "ours"] == "0 of 4"
    assert counted["paper"].iloc[1] == "8 of 8"


def test_a_residual_inverse_of_few_iterations_is_off_and_the_converged_one_is_not():
    config = dataclasses.replace(
        preset(dequantization, "smoke"), coefficient=0.97, few_iterations=2
    )
    flow = dequantization.Flow.fresh(config, "residual")
    with torch.no_grad():
        for parameter in flow.net.parameters():
            parameter.mul_(5)
    x = flow.attacked
    off = round_trip(flow.with_few_iterations(), x, batch_size=8).largest.max()
    assert off > 100 * round_trip(flow.net.eval(), x, batch_size=8).largest.max()
    assert any(isinstance(layer, Residual) for layer in flow.net.layers())


def test_what_is_attacked_lies_in_the_middle_of_its_cubes():
    flow = dequantization.Flow.fresh(preset(dequantization, "smoke"), "affine (0 1)")
    assert torch.equal((flow.attacked * 32).floor().to(torch.uint8), flow.training.data.train[:2])


def test_the_cost_of_k_steps_is_that_of_one_penalty():
    config = dataclasses.replace(preset(regularizer_cost, "smoke"), every=(1, 4))
    rows = [row for row in regularizer_cost.measure(config, "stored") if row["fraction"] == 1]
    once, every_fourth = (row["overhead"] for row in rows)
    assert every_fourth == pytest.approx((3 + once) / 4)
    memory_saving = {row["every"]: row for row in regularizer_cost.measure(config, "memory-saving")}
    assert memory_saving[0]["paper_epoch_seconds"] == 281.0


def test_pixels_that_are_not_finite_are_drawn_in_cyan():
    images = torch.full((1, 3, 4, 4), 0.5)
    images[0, 1, 2, 3] = math.nan
    figure = grid({"broken": images}, columns=1)
    drawn = torch.as_tensor(figure.axes[0].images[0].get_array())
    assert drawn[2, 3].tolist() == [0, 1, 1]
    assert drawn[0, 0].tolist() == [0.5, 0.5, 0.5]

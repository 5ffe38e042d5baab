"""Soundness of a rule: no sampled Jacobian above its bounds, no value outside its image box."""

from __future__ import annotations

import math

import torch

from inn_guard.core.invertible import Invertible
from inn_guard.jacobian.checks import dense_jacobian
from inn_guard.lipschitz.branch_and_bound.affine_forms import AffineForm
from inn_guard.lipschitz.branch_and_bound.propagation import State, step_of
from inn_guard.lipschitz.maps.base import BlockBounds, bounded_map
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.intervals import Box, Interval

EFFORT = SearchBudget(steps=6, seconds=0.5)
ROUNDING = 1 + 1e-9  # of the sampled Jacobians themselves


def jacobians(layer: Invertible, x: torch.Tensor) -> torch.Tensor:
    return dense_jacobian(layer.linearize(x), x)


def sample(box: Interval, count: int) -> torch.Tensor:
    width = (box.hi - box.lo).nan_to_num(0, 0, 0)
    inside = box.lo.nan_to_num(0, 0, 0) + width * torch.rand(count, *box.shape)
    points = torch.where((box.hi - box.lo).isfinite(), inside, 2 * torch.randn(count, *box.shape))
    corners = torch.where(torch.rand(8, *box.shape) < 0.5, box.lo, box.hi)
    return torch.cat([points, corners]) if box.bounded else points


def assert_sound(
    layer: Invertible, box: Box, *, count: int = 60, finite: bool = True
) -> BlockBounds:
    described = bounded_map(layer.block, layer)
    bounds = described.bounds(box, EFFORT)
    if finite:
        assert math.isfinite(bounds.forward), bounds.reason
        assert math.isfinite(bounds.inverse), bounds.reason
    x = sample(box, count)
    J = jacobians(layer, x)
    sigma = torch.linalg.svdvals(J)
    assert float(sigma[:, 0].max()) <= bounds.forward * ROUNDING
    assert float((1 / sigma[:, -1]).max()) <= bounds.inverse * ROUNDING
    _assert_jacobians_enclosed(described, box, J)
    printed = described.paper_formula(box, EFFORT)
    assert bounds.forward <= printed.forward * ROUNDING
    with torch.no_grad():
        z = layer(x)
    image = described.image(box)
    assert bool(
        ((image.lo <= z + 1e-9 * (1 + z.abs())) & (z - 1e-9 * (1 + z.abs()) <= image.hi)).all()
    )
    if box.bounded and len(box.shape) == 1 and box.shape[0] <= 8:
        _assert_steps_enclose(described, layer, box, x, J)
    return bounds


def _assert_jacobians_enclosed(described, box, J) -> None:
    """Sampled Jacobians and their inverses lie in the enclosures."""
    try:
        enclosures = described.jacobians(box)
    except Unbounded:
        return
    K = torch.linalg.inv(J)
    solved = (
        1e-12 * torch.linalg.matrix_norm(K).max() ** 2 * torch.linalg.matrix_norm(J).max()
    )  # of inv itself
    for enclosed, M, slack in zip(enclosures, (J, K), (1e-12, solved), strict=True):
        margin = (ROUNDING - 1) * M.abs() + slack
        assert bool(((enclosed.lo <= M + margin) & (M - margin <= enclosed.hi)).all())


def _assert_steps_enclose(described, layer, box, x, J) -> None:
    try:
        step = step_of(described, box)
    except Unbounded:
        return
    width = 0.02 * (box.hi - box.lo)
    small = Interval(torch.maximum(x - width, box.lo), torch.minimum(x + width, box.hi))
    end = step(State.of(small))
    with torch.no_grad():
        z = layer(x)
    K = torch.linalg.inv(J)
    solved = (
        1e-12 * torch.linalg.matrix_norm(J).max() * torch.linalg.matrix_norm(K).max() ** 2
    )  # of inv itself
    for form, true, slack in ((end.x, z, 1e-9), (end.J, J, 1e-9), (end.K, K, solved)):
        assert_encloses(form, small, x, true, slack * (1 + true.abs()))
    assert float(end.J.spread.max()) < math.inf


def assert_encloses(
    form: AffineForm, boxes: Interval, x: torch.Tensor, true: torch.Tensor, margin: torch.Tensor
) -> None:
    """The truth at points x (B, d) differs from a form's linear part by at most its rest."""
    position = ((x - boxes.centre) / boxes.radius).clamp(-1, 1).T
    linear = form.middle + (
        form.slopes * position.reshape(*position.shape, *[1] * (true.dim() - 1))
    ).sum(0)
    assert bool(((true - linear).abs() <= form.rest + margin).all())
    assert bool(((form.range.lo <= true + margin) & (true - margin <= form.range.hi)).all())

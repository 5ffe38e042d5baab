"""Further cases of wrong claims: each model is wrong, or right, by a plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import inn_guard as ig
from inn_guard.audits.audited_model import InputRejected
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.permutation import Permutation


def data(batch: int = 64, dimension: int = 4) -> Tensor:
    return torch.randn(batch, dimension, generator=torch.Generator().manual_seed(1)).float()


def flow() -> Chain:
    torch.manual_seed(0)
    steps = []
    for _ in range(2):
        steps += [AffineCoupling(MLP([2, 8, 4])), Permutation.reverse(4)]
    return Chain(*steps).float()


def verdicts(model: nn.Module, x: Tensor | None = None, **settings) -> dict[str, str]:
    report = ig.audit(model, data() if x is None else x, level="quick", **settings)
    return {use: str(found.verdict) for use, found in report.uses.items()}


def of_nflows(kind: type) -> nn.Module:
    transforms = pytest.importorskip("nflows.transforms")
    distributions = pytest.importorskip("nflows.distributions")
    transform = transforms.ReversePermutation(4)
    return kind(transform, distributions.StandardNormal([4])).float().eval()


def test_a_log_prob_that_is_not_its_parts_is_found():
    flows = pytest.importorskip("nflows.flows")

    class Shifted(flows.Flow):
        def log_prob(self, inputs, context=None):
            return super().log_prob(inputs, context) + 3.0

    report = ig.audit(of_nflows(Shifted), data(), level="quick")
    assert report.uses["density"].verdict == "unstable"
    assert "differ by up to 3 nats" in report.uses["density"].reason
    assert verdicts(of_nflows(flows.Flow))["density"] == "stable"


class BatchNorm(nn.Module):
    """Standardises with the batch's own statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.mean, self.deviation = x.mean(0), x.std(0)
        log_det = (self.scale.log() - self.deviation.log()).sum().expand(len(x))
        return (x - self.mean) / self.deviation * self.scale, log_det

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = (self.deviation.log() - self.scale.log()).sum().expand(len(z))
        return z / self.scale * self.deviation + self.mean, log_det


def test_what_preflight_calls_unmeasurable_no_other_check_decides():
    """An uninitialised layer of normflows initialises itself anew in every other check."""
    normflows = pytest.importorskip("normflows")
    base = normflows.distributions.DiagGaussian(4)
    model = normflows.NormalizingFlow(base, [normflows.flows.ActNorm(4)]).float().eval()
    report = ig.audit(model, data(), level="quick")
    assert report["gradient_angle"].verdict.failed
    assert report["preflight"].uses
    for use in report["preflight"].uses:
        assert report.uses[use].verdict == "undecided"
        assert report.uses[use].check == "preflight"


def test_a_batch_dependent_map_has_no_density():
    found = verdicts(BatchNorm().float())
    assert found["density"] == found["gradients"] == "undecided"


def test_a_random_map_has_no_log_det_that_could_be_wrong():
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, training=True)

    conditioner = nn.Sequential(Noisy(), nn.Linear(2, 4))
    model = Chain(AffineCoupling(conditioner), Permutation.reverse(4)).float()
    result = ig.AUDITS["log_det"](model, data())
    assert result.verdict == "undecided"
    assert "of different draws" in result.reason


def test_parameters_of_several_dtypes_are_named():
    model = flow()
    model.steps[0].double()
    with pytest.raises(InputRejected, match=r"of one dtype, got parameters of torch.float32 and"):
        ig.audit(model, data())


def test_an_output_that_is_no_latent_is_not_called_a_matter_of_shape():
    class Rounds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.long()

        def inverse(self, z: Tensor) -> Tensor:
            return z.float()

    with pytest.raises(InputRejected, match=r"^forward of the model returns torch.int64"):
        ig.audit(Rounds(), data())


UNITS = torch.tensor([1e-6, 1.0, 1e3, 1e6])


def in_units(first: Diagonal) -> Chain:
    with torch.no_grad():
        first.log_scale.copy_(-UNITS.log())
    return Chain(first, *flow().steps).float()


class SmallFeatureOff(Diagonal):
    """Its inverse is a tenth off in the feature of the smallest unit."""

    def inverse(self, z: Tensor) -> Tensor:
        x = super().inverse(z)
        return torch.cat([1.1 * x[:, :1], x[:, 1:]], dim=1)


def test_an_error_in_the_smallest_unit_is_found_and_no_unit_is_accused():
    x = data() * UNITS.float()
    assert set(verdicts(in_units(Diagonal(4)), x).values()) == {"stable"}
    wrong = verdicts(in_units(SmallFeatureOff(4)), x)
    assert wrong["reconstruction"] == wrong["sampling"] == "unstable"
    assert wrong["density"] == "stable"


@pytest.mark.parametrize(
    "alter",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        torch.nn.utils.weight_norm,
    ],
    ids=["weight norm", "spectral norm", "old weight norm"],
)
def test_computed_weights_are_the_models_own(alter):
    model = flow()
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            alter(module)
    model(data()).sum().backward()
    assert set(verdicts(model).values()) == {"stable"}


def test_hooks_belong_to_the_map():
    on_container, on_layer = flow(), flow()
    on_container.register_forward_hook(lambda module, given, z: 1.5 * z)
    on_layer.steps[0].register_forward_hook(lambda module, given, z: z + 0.5)
    for model in (on_container, on_layer):
        assert verdicts(model)["reconstruction"] == "unstable"


@pytest.mark.parametrize("batch", [1, 2, 1024])
def test_any_number_of_samples(batch):
    assert set(verdicts(flow(), data(batch)).values()) == {"stable"}


class Scaled(nn.Module):
    """Each class has scales of its own; the inverse may take those of another class."""

    def __init__(self, *, shift: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scales = nn.Embedding(3, 4)
        self.shift = shift

    def forward(self, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = 0.3 * self.scales(label)
        return x * log_scale.exp(), log_scale.sum(1)

    def inverse(self, z: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = 0.3 * self.scales((label + self.shift) % 3)
        return z * (-log_scale).exp(), -log_scale.sum(1)


@pytest.mark.parametrize(("shift", "verdict"), [(0, "stable"), (1, "unstable")])
def test_discrete_contexts(shift, verdict):
    labels = torch.randint(3, (64,), generator=torch.Generator().manual_seed(0))
    found = verdicts(Scaled(shift=shift).float(), context=labels)
    assert found["reconstruction"] == found["sampling"] == verdict
    assert found["density"] == "stable"


def test_an_inverse_that_is_off_in_every_format_works_in_none():
    """A twentieth is within what bfloat16 can hold, and beyond what float32 may be off."""

    class Off(Diagonal):
        def inverse(self, z: Tensor) -> Tensor:
            return 1.05 * super().inverse(z)

    result = ig.AUDITS["precision"](Off(4).float(), data())
    assert result.verdict == "unstable"
    assert "Works in: none of those tried" in result.reason


@pytest.mark.parametrize("claimed", [0.0, 5.0])
def test_a_log_det_without_a_derivative_to_check_it_by_is_undecided(claimed):
    class Detached(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.detach() + 1, torch.full((len(x),), claimed)

        def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return z - 1, torch.full((len(z),), -claimed)

    report = ig.audit(Detached(), data(), level="quick")
    assert report.uses["density"].verdict == "undecided"
    assert "could not be checked" in report.uses["density"].reason
    assert report.uses["reconstruction"].verdict == "stable"


def test_fewer_outputs_than_inputs_have_no_determinant():
    class Projects(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * x[:, :2], x.new_zeros(len(x))

        def inverse(self, z: Tensor) -> Tensor:
            return torch.cat([z / 2, 0 * z], dim=1)

    report = ig.audit(Projects(), data(), level="quick")
    assert report.uses["density"].verdict == "undecided"
    assert "2 outputs for 4 inputs" in report.uses["density"].reason
    assert report.uses["reconstruction"].verdict == "unstable"

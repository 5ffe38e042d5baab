"""preserve_state() and changed_state() against what a model can do to itself and to the process."""

from __future__ import annotations

import collections
import os
import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from inn_guard.execution.state import StateSnapshot, changed_state, preserve_state


class Cache:
    """A plain object inside a module, as libraries keep them."""

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.log = [1, 2]


class Restless(nn.Module):
    """Has one of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, float("nan"), -0.0]))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("running", torch.zeros(3))
        self.plain = torch.arange(3.0)
        self.in_list = [torch.ones(2), {"deep": torch.zeros(2)}]
        self.hidden = [nn.Linear(2, 2)]
        self.cache = Cache()
        self.flag = False
        self.queue = collections.deque([1, 2], maxlen=5)
        self.names = {"a"}
        self.array = np.zeros(3)
        self.noise = torch.Generator().manual_seed(1)
        self.numpy_noise = np.random.default_rng(1)
        self.python_noise = random.Random(1)
        self.part = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
        self.part[1].eval()


def photograph(model: Restless) -> dict[str, object]:
    """Everything that must come back, as comparable values."""
    bits = {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}
    grads = {
        name: None if p.grad is None else p.grad.numpy().tobytes()
        for name, p in model.named_parameters()
    }
    return {
        "state": bits,
        "grads": grads,
        "identity": [id(p) for p in model.parameters()]
        + [p.data_ptr() for p in model.parameters()],
        "wants": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()] + [m.training for m in model.hidden],
        "hidden": [m.weight.detach().numpy().tobytes() for m in model.hidden],
        "plain": (model.plain.tolist(), str(model.in_list)),
        "cache": (model.cache.value, list(model.cache.log), sorted(vars(model.cache))),
        "flag": model.flag,
        "queue": list(model.queue),
        "names": set(model.names),
        "array": model.array.tobytes(),
        "attributes": sorted(vars(model)),
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "generators": (
            model.noise.get_state().tolist(),
            str(model.numpy_noise.bit_generator.state),
        ),
        "python": hash(model.python_noise.getstate()),
        "global": (
            torch.get_rng_state().tolist(),
            str(np.random.get_state()),
            hash(random.getstate()),
        ),
    }


def values(model: Restless) -> None:
    with torch.no_grad():
        model.weight.mul_(2)
        model.running.add_(1)
        model.plain.add_(1)
        model.in_list[0].zero_()
        model.in_list[1]["deep"].add_(1)
        model.hidden[0].weight.add_(1)


def negative_zero(model: Restless) -> None:
    with torch.no_grad():
        model.weight[2] = 0.0


def other_nan(model: Restless) -> None:
    with torch.no_grad():
        model.weight.view(torch.int64)[1] += 1


def identity(model: Restless) -> None:
    model.weight = nn.Parameter(torch.zeros(3))
    model.running = torch.ones(7)
    model.register_buffer("new", torch.ones(1))
    model.extra = nn.Linear(1, 1)


def memory(model: Restless) -> None:
    model.weight.data = torch.zeros(5)


def half(model: Restless) -> None:
    model.half()


def gradients(model: Restless) -> None:
    model.frozen.requires_grad_()
    (model.weight.sum() + model.frozen.sum()).backward()


def no_gradients(model: Restless) -> None:
    model.requires_grad_(False)
    model.zero_grad()


def modes(model: Restless) -> None:
    model.eval()
    model.hidden[0].eval()


def call(model: Restless) -> None:
    model.train()
    model.part(torch.randn(4, 2))


def attributes(model: Restless) -> None:
    model.flag = True
    model.initialised = True
    model.cache.value = torch.ones(1)
    model.cache.log.append(3)
    model.cache.other = 1
    model.queue.append(3)
    model.names.add("b")
    model.array += 1
    del model.in_list[1]
    model.hidden = []


def hooks(model: Restless) -> None:
    model.part.register_forward_hook(lambda *_: None)


def generators(model: Restless) -> None:
    torch.rand(1)
    np.random.rand()
    random.random()
    torch.rand(1, generator=model.noise)
    model.numpy_noise.random()
    model.python_noise.random()


DEEDS = [
    values,
    negative_zero,
    other_nan,
    identity,
    memory,
    half,
    gradients,
    no_gradients,
    modes,
    call,
    attributes,
    hooks,
    generators,
]


@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
def test_everything_comes_back(deed):
    model = Restless()
    model.part[0].weight.grad = torch.full((2,), 3.0)
    before = photograph(model)
    with preserve_state(model):
        deed(model)
        assert photograph(model) != before, "the deed must do something, or this test cannot fail"
    assert photograph(model) == before


@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
def test_everything_comes_back_after_an_error(deed):
    model = Restless()
    before = photograph(model)

    def fail() -> None:
        with preserve_state(model):
            deed(model)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert photograph(model) == before


def test_graphs_of_the_caller_stay_valid():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    loss = model(torch.ones(4, 2)).sum()
    with preserve_state(model):
        model.eval()
        model(torch.ones(4, 2))
    loss.backward()
    assert model[0].weight.grad is not None


def test_graphs_that_have_saved_a_buffer_survive_a_change_of_it():
    buffer = torch.ones(3)
    model = nn.Module()
    model.register_buffer("scale", buffer)
    untouched = torch.ones(3)
    model.register_buffer("untouched", untouched)
    x = torch.ones(3, requires_grad=True)
    loss = (x * model.scale).sum() + (x * model.untouched).sum()
    versions = buffer._version, untouched._version
    with preserve_state(model):
        model.scale.mul_(2)
        model.scale += 1
        assert buffer._version != versions[0]
    assert (buffer._version, untouched._version) == versions
    loss.backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_a_tensor_that_is_exchanged_keeps_its_version():
    model = nn.BatchNorm1d(2)
    version = model.running_mean._version
    with preserve_state(model):
        model.running_mean.data = torch.zeros(2, dtype=torch.float64)
        model.running_mean.add_(1)
    assert model.running_mean._version == version


class Attention(nn.Module):
    """Keeps the keys and values of former calls, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()
        self.cache.layers = [Cache(), Cache()]
        self.steps = {"keys": [torch.zeros(1)]}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.cache.layers:
            layer.value = x if layer.value is None else torch.cat([layer.value, x])
        self.steps["keys"].append(x)
        self.steps["keys"][0].add_(1)
        return x


def test_caches_of_keys_and_values_come_back():
    model = Attention()
    with preserve_state(model):
        model(torch.ones(1))
        model(torch.ones(1))
    assert [layer.value for layer in model.cache.layers] == [None, None]
    assert len(model.steps["keys"]) == 1
    assert model.steps["keys"][0].item() == 0

    with torch.inference_mode():
        model(torch.ones(1))
    cached = model.cache.layers[0].value
    with preserve_state(model), torch.inference_mode():
        model.cache.layers[0].value.zero_()
        model(torch.ones(1))
    assert model.cache.layers[0].value is cached
    assert cached.tolist() == [1.0]


def settings() -> dict[str, object]:
    """Everything of the process that must come back."""
    return {
        "environment": dict(os.environ),
        "warnings": (id(warnings.filters), list(warnings.filters), warnings.showwarning),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "precision": torch.get_float32_matmul_precision(),
        "numpy": np.geterr(),
    }


CHANGES = [
    lambda: os.environ.update(INN_GUARD_TEST="2", PATH=""),
    lambda: os.environ.pop("PATH"),
    lambda: warnings.simplefilter("ignore"),
    lambda: warnings.resetwarnings(),
    lambda: setattr(warnings, "showwarning", print),
    lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    lambda: torch.set_default_dtype(torch.float16),
    lambda: torch.set_default_device("meta"),
    lambda: torch.set_grad_enabled(False),
    lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: np.seterr(all="raise"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_settings_of_the_process_come_back(change):
    before = settings()
    with preserve_state(nn.Linear(1, 1)):
        change()
        assert settings() != before
    assert settings() == before


def test_warning_filters_work_again():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with preserve_state(nn.Linear(1, 1)):
            warnings.simplefilter("ignore")
            warnings.warn("ignored", stacklevel=1)
        with pytest.raises(UserWarning, match="raised"):
            warnings.warn("raised", stacklevel=1)


def test_sparse_and_meta_tensors_do_no_harm():
    model = nn.Module()
    model.sparse = torch.eye(3).to_sparse()
    model.empty = nn.Parameter(torch.empty(2, device="meta"))
    with preserve_state(model):
        model.sparse = None
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))


def test_tied_weights_stay_tied():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    with preserve_state(model):
        model[1].weight = nn.Parameter(torch.zeros(2, 2))
    assert model[1].weight is model[0].weight


def test_cycles_and_foreign_objects_do_no_harm():
    model = Restless()
    model.cache.owner = model
    model.module_type, model.function, model.library = nn.Linear, len, torch
    model.lock = __import__("threading").Lock()
    with preserve_state(model):
        model.cache.value = 3
    assert model.cache.value is None


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.int8, torch.bool]
)
def test_values_of_any_dtype_come_back(dtype):
    model = nn.Module()
    model.register_buffer("kept", torch.tensor([0, 1, 1]).to(dtype))
    before = model.kept.clone()
    with preserve_state(model):
        model.kept.fill_(1)
        assert not torch.equal(model.kept, before)
    assert torch.equal(model.kept, before)


def test_changed_state_names_what_changed():
    model = Restless()
    with changed_state(model) as changed:
        pass
    assert changed == []
    with changed_state(model) as changed, torch.no_grad():
        model.running.add_(1)
        model.weight[0] = 5
        model.register_buffer("new", torch.ones(1))
    assert sorted(changed) == ["new", "running", "weight"]


def of_model(model: Restless) -> dict[str, object]:
    """What belongs to the model: type checks of the tests draw from Python's generator."""
    return {name: value for name, value in photograph(model).items() if name != "global"}


def test_the_model_can_be_restored_within_the_block():
    model = Restless()
    before = of_model(model)
    with preserve_state(model) as recover:
        model.running.add_(1)
        model.flag = True
        model.in_list.append(torch.ones(1))
        model.part.train()
        recover()
        assert of_model(model) == before
        model.running.add_(2)
    assert of_model(model) == before


def test_a_snapshot_restores_at_any_later_time():
    model = Restless()
    before, restore = of_model(model), StateSnapshot(model).restore_written
    for _ in range(2):
        model.running.mul_(3).add_(1)
        model.names.add("b")
        restore()
        assert of_model(model) == before


@pytest.mark.parametrize("name", ["enabled", "benchmark", "deterministic", "allow_tf32"])
def test_the_switches_of_cudnn_come_back(name):
    before = getattr(torch.backends.cudnn, name)
    with preserve_state(nn.Identity()):
        setattr(torch.backends.cudnn, name, not before)
    assert getattr(torch.backends.cudnn, name) == before


def test_the_anomaly_mode_and_the_switches_of_attention_come_back():
    with preserve_state(nn.Identity()):
        torch.set_anomaly_enabled(True)
        torch.backends.cuda.enable_flash_sdp(not torch.backends.cuda.flash_sdp_enabled())
    assert not torch.is_anomaly_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_torch_that_raises_without_an_accelerator_has_none(monkeypatch):
    """As torch 2.6 does; later ones return None."""

    def raises() -> torch.device:
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", raises)
    module = nn.Linear(2, 2)
    before = torch.get_rng_state()
    with preserve_state(module):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)

"""A pretended accelerator: tensors with values that claim to lie on a device of their own.

The values are in the memory of the CPU, so that every path runs to its end and its numbers can be
compared. Operations that mix devices raise as CUDA's do, generators of the CPU are refused on the
device, and the device has random numbers of its own. What is found here is what a GPU would find
about devices; it says nothing about kernels, streams and speed.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "pretended"

#: they move tensors between devices
MOVING = {aten.copy_.default, aten._to_copy.default}
#: they read one number, which is then python's
READING = {aten._local_scalar_dense.default}
#: their indices may lie on the CPU
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
INDEXING |= {aten._index_put_impl_.default, aten._unsafe_index.Tensor}
RANDOM = ("rand", "normal", "uniform", "bernoulli", "dropout", "multinomial", "exponential")


class _DeviceModule(types.ModuleType):
    """What torch.cuda is to CUDA, as far as random numbers go."""

    generator = torch.Generator()

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: object = NAME) -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: object = NAME) -> None:
        self.generator.set_state(state)

    def synchronize(self, device: object = None) -> None:
        pass


module = _DeviceModule(NAME)


def device() -> torch.device:
    """The pretended device; registered with torch at the first call, once in a process."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        torch.utils.rename_privateuse1_backend(NAME)
        _setup_privateuseone_for_python_backend(NAME)
        setattr(torch, NAME, module)
        _register_kernels()
    return torch.device(NAME, 0)


_library = torch.library.Library("aten", "IMPL")
_autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")


def _register_kernels() -> None:
    """What torch calls without asking a mode: indices that are given as lists become tensors."""

    def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
        return OnDevice(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    def copy_from(source, target, non_blocking=False):
        _values(target).copy_(_values(source))
        return target

    # under autocast everything keeps its dtype
    _autocast.fallback(torch.library.fallthrough_kernel)
    _library.impl("empty_strided", empty_strided, "PrivateUse1")
    _library.impl("_copy_from", copy_from, "PrivateUse1")


class OnDevice(Tensor):
    """A tensor on the pretended device; ``values`` are its numbers, on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool = False) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device(),
            requires_grad=requires_grad,
        )
        made.values = values
        return made

    def __repr__(self) -> str:
        return f"OnDevice({self.values})"

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            copied.__dict__.update({k: v for k, v in vars(self).items() if k != "values"})
            if self.grad is not None:
                copied.grad = self.grad.detach().clone()
            memo[id(self)] = copied
        return memo[id(self)]

    @property
    def data(self):
        return OnDevice(self.values)  # with a version counter of its own, as torch's

    @data.setter
    def data(self, new):
        Tensor.data.__set__(self, new)
        self.values = new.values

    def tolist(self):
        return self.values.tolist()

    def untyped_storage(self):
        return self.values.untyped_storage()

    def data_ptr(self):
        return self.values.data_ptr()

    def numpy(self, *, force: bool = False):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy; use Tensor.cpu()")

    def __array__(self, dtype=None):
        return self.numpy()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sends tensors without a device-tensor among their arguments to the device, if asked to."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """A block in which the device exists."""
    where = device()
    with _Mode():
        yield where


def _run(func, args, kwargs):
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [leaf for leaf in given if isinstance(leaf, OnDevice)]
    wanted = kwargs.get("device")
    on_device = bool(ours)
    if wanted is not None:
        on_device = torch.device(wanted).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if ours and func not in MOVING:
        _check_devices(func, args, given)
    if func in READING:
        on_device = False
    if on_device and kwargs.get("generator") is not None:
        raise RuntimeError(
            f"Expected a '{NAME}' device type for generator but found 'cpu' in {func}"
        )
    result = _evaluated(func, *tree_map(_values, (args, kwargs)), on_device)
    if func is aten.copy_.default:
        return args[0]  # a CPU tensor that is written from the device stays one
    known = {id(tensor.values): tensor for tensor in ours}

    def wrapped(value):
        if not isinstance(value, Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        if not on_device:
            return value
        # the wrapper does not show that a view is a lazy conjugate
        return OnDevice(value.resolve_conj().resolve_neg())

    return tree_map(wrapped, result)


def _check_devices(func, args, given) -> None:
    """Raise what CUDA raises where a CPU tensor with a dimension meets one of the device."""
    others = [tensor for tensor in given if not isinstance(tensor, OnDevice) and tensor.dim()]
    if not others:
        return
    if func in INDEXING and isinstance(args[0], OnDevice):
        values = args[2] if len(args) > 2 else None
        if not any(tensor is values for tensor in others):
            return
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, "
        f"{NAME}:0 and cpu! (in {func})"
    )


def _values(value):
    return value.values if isinstance(value, OnDevice) else value


def _evaluated(func, args, kwargs, on_device):
    """The operation; on the device with the device's random numbers in place of the CPU's."""
    if not on_device or not any(name in func.__name__ for name in RANDOM):
        return func(*args, **kwargs)
    before = torch.get_rng_state()
    torch.set_rng_state(module.generator.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        module.generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)

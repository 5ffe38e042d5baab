"""FrEIA: InvertibleModule, SequenceINN and GraphINN as Invertibles, nested ones included.

What is asked of the library is asked by feature, never by version: releases that differ carry the same number.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from FrEIA.framework import GraphINN, SequenceINN
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from inn_guard.adapters.base import Adapted
from inn_guard.adapters.freia import jacobians as tangents_freia  # noqa: F401 - register bound rules and tangents
from inn_guard.adapters.freia.graph import Shapes, chain, pack, unpack
from inn_guard.core.invertible import Context, Invertible

__all__ = ["FreiaGraph", "FreiaModule", "FreiaSequence", "adapt"]


def adapt(model: nn.Module, context: Context = None) -> Invertible:
    """A module or a net of FrEIA as an Invertible.

    Args:
        model: an InvertibleModule, SequenceINN or GraphINN.
        context: the condition (B, ...), or the list of conditions that the library calls ``c``.

    Raises:
        TypeError: if the model is none of these.
    """
    return _adapt(model, context)


def _adapt(
    model: nn.Module, context: Context, shapes: tuple[Shapes, Shapes] | None = None
) -> FreiaModule:
    if isinstance(model, GraphINN):
        return FreiaGraph(model, context, shapes)
    if isinstance(model, SequenceINN):
        return FreiaSequence(model, context, shapes)
    if isinstance(model, InvertibleModule):
        return FreiaModule(model, context, shapes)
    raise TypeError(
        f"expected an InvertibleModule, SequenceINN or GraphINN of FrEIA; got {type(model).__qualname__}"
    )


class FreiaModule(Adapted):
    """One InvertibleModule. Several inputs (or outputs) are one tensor: flattened and concatenated in their order.

    Attributes:
        inputs: shapes of the module's inputs as the library stores them, without the batch; what takes x apart where
            there are several.
        outputs: the same of its outputs and z.
        remarks: what the library warned about during calls, each message once.
    """

    def __init__(
        self,
        module: nn.Module,
        context: Context = None,
        shapes: tuple[Shapes, Shapes] | None = None,
    ) -> None:
        super().__init__(module, context)
        self.inputs, self.outputs = shapes or self._shapes()
        self.remarks: dict[str, None] = {}

    def pack(self, *inputs: Tensor) -> Tensor:
        """The model's inputs as the one tensor x that every audit takes; a single input as it is.

        Raises:
            ValueError: if their number or shapes are not the model's.
        """
        got = tuple(tuple(tensor.shape[1:]) for tensor in inputs)
        if len(got) != len(self.inputs) or (len(got) > 1 and got != self.inputs):
            raise ValueError(
                f"expected {len(self.inputs)} input(s) of {self.name} with shapes (B, ...) = {self.inputs}; got {got}"
            )
        return pack(inputs)

    def unpack(self, z: Tensor) -> tuple[Tensor, ...]:
        """The latent tensor z as the outputs that the library itself returns."""
        return unpack(z, self.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """z = F(x) by the module's own code, without a log-determinant."""
        return pack(self._values(unpack(x, self.inputs), rev=False))

    def inverse(self, z: Tensor) -> Tensor:
        """x = F^-1(z) by the module's own code, without a log-determinant."""
        return pack(self._values(unpack(z, self.outputs), rev=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> FreiaModule:
        # a learned permutation leaves its latest matrix, graph and all, in an attribute; torch cannot copy graphs
        for module in self.modules():
            for value in vars(module).values():
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        outputs, log_det = self._with_log_det(unpack(x, self.inputs), rev=False)
        return pack(outputs), log_det

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        outputs, log_det = self._with_log_det(unpack(z, self.outputs), rev=True)
        return pack(outputs), log_det

    def _values(self, tensors: tuple[Tensor, ...], **direction: bool) -> tuple[Tensor, ...]:
        try:
            return self._called(tensors, **direction, jac=False)[0]
        except (
            ValueError,
            TypeError,
            RuntimeError,
        ):  # some modules return None or no pair then; nets stumble over it
            return self._with_log_det(tensors, **direction)[0]

    def _with_log_det(
        self, tensors: tuple[Tensor, ...], **direction: bool
    ) -> tuple[tuple[Tensor, ...], Any]:
        try:
            return self._called(tensors, **direction, jac=True)
        except RuntimeError:
            if torch.is_grad_enabled():
                raise
            with torch.enable_grad():  # the log-determinant of IResNetLayer is made of gradients
                outputs, log_det = self._called(tensors, **direction, jac=True)
            log_det = log_det.detach() if isinstance(log_det, Tensor) else log_det
            return tuple(output.detach() for output in outputs), log_det

    def _called(self, tensors: tuple[Tensor, ...], **flags: bool) -> tuple[tuple[Tensor, ...], Any]:
        conditions = self._conditions()
        given = {"c": conditions} if conditions else {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = self.module(
                self._argument([tensor.clone() for tensor in tensors]), **given, **flags
            )
        self.remarks.update(dict.fromkeys(str(warning.message) for warning in caught))
        outputs, log_det = result if len(result) == 2 else (result, None)
        return ((outputs,) if isinstance(outputs, Tensor) else tuple(outputs)), log_det

    def _argument(self, tensors: list[Tensor]) -> Any:
        return tensors

    def _conditions(self) -> list[Any]:
        """The context as the list that the library wants, checked as far as the module says what it needs.

        Raises:
            ValueError: if conditions are missing, or given to a module that takes none.
        """
        conditions = _as_list(self.context)
        if len(conditions) < self._needed():
            raise ValueError(
                f"{self.name} expected {self._needed()} condition(s), got {len(conditions)}; "
                "give them as context=[...], in the order of the library's argument c"
            )
        if conditions and not _takes_conditions(self.module):
            raise ValueError(
                f"{self.name} takes no conditions, got {len(conditions)}; leave out context"
            )
        return conditions

    def _needed(self) -> int:
        return len(getattr(self.module, "dims_c", None) or ())

    def _shapes(self) -> tuple[Shapes, Shapes]:
        module: Any = self.module
        stored = tuple(module.dims_in)
        inputs = (
            (stored,) if all(isinstance(size, int) for size in stored) else stored
        )  # ActNorm keeps its only one
        try:
            outputs = module.output_dims([tuple(shape) for shape in inputs])
        except (ValueError, NotImplementedError, TypeError, AssertionError):
            outputs = inputs[
                :1
            ]  # upsampling layers keep the shape they make as their input; they have one output
        return _plain(inputs), _plain(outputs)


class FreiaSequence(FreiaModule):
    """A SequenceINN; its blocks, and those of nested nets, are the layers."""

    def layers(self) -> tuple[Invertible, ...]:
        """The blocks in order, each with the condition that its index names."""
        conditions, net = self._conditions(), self.module
        flat: list[Invertible] = []
        for k, (module, index) in enumerate(zip(net.module_list, net.conditions, strict=True)):  # type: ignore
            context = None if index is None else [conditions[index]]
            shapes = _plain(net.shapes[k : k + 1]), _plain(net.shapes[k + 1 : k + 2])  # type: ignore[index]
            flat += _flat(_adapt(module, context, shapes))
        return tuple(flat)

    def _argument(self, tensors: list[Tensor]) -> Any:
        return tensors[0]

    def _needed(self) -> int:
        return max((index + 1 for index in self.module.conditions if index is not None), default=0)  # type: ignore

    def _shapes(self) -> tuple[Shapes, Shapes]:
        shapes: Any = self.module.shapes
        return _plain(shapes[:1]), _plain(shapes[-1:])


class FreiaGraph(FreiaModule):
    """A GraphINN with any number of inputs, outputs and conditions; x and z hold them in the order of the node list.

    A graph whose conditions are computed by its own nodes is one opaque layer.
    """

    def layers(self) -> tuple[Invertible, ...]:
        """The nodes in order, each acting on the flattened concatenation of the edges alive there."""
        conditions, graph = self._conditions(), self.module

        def expand(node: Any, inputs: Shapes, outputs: Shapes) -> tuple[Invertible, ...]:
            sources = [
                source[0] if isinstance(source, tuple) else source for source in node.conditions
            ]
            if any(source not in graph.condition_nodes for source in sources):  # type: ignore[operator]
                return ()
            context = [conditions[graph.condition_nodes.index(source)] for source in sources]  # type: ignore
            return _flat(_adapt(node.module, context or None, (inputs, outputs)))

        return chain(graph, expand)

    def _needed(self) -> int:
        return len(self.module.condition_nodes)  # type: ignore[arg-type]

    def _shapes(self) -> tuple[Shapes, Shapes]:
        graph: Any = self.module
        return _plain(node.output_dims[0] for node in graph.in_nodes), _plain(
            graph.global_out_shapes
        )


def _flat(layer: FreiaModule) -> tuple[Invertible, ...]:
    return layer.layers() or (layer,)


def _plain(shapes: Any) -> Shapes:
    return tuple(tuple(int(size) for size in shape) for shape in shapes)


def _as_list(context: Context) -> list[Any]:
    if context is None:
        return []
    return list(context) if isinstance(context, (list, tuple)) else [context]


def _takes_conditions(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return "c" in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )

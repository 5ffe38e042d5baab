"""FrEIA: InvertibleModule, SequenceINN and GraphINN as Invertibles, nested ones included.

The library is asked for features, never for its version: different releases carry the same number.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from FrEIA import framework
from FrEIA.framework import GraphINN, SequenceINN
from FrEIA.modules import InvertibleModule
from torch import Tensor, nn

from inn_guard.adapters.base import Adapted
from inn_guard.adapters.freia import jacobians  # noqa: F401 - registers them
from inn_guard.adapters.freia.graph import Shapes, chain, pack, unpack
from inn_guard.core.invertible import Context, Invertible, copies_of_computed_tensors
from inn_guard.core.missing import MissingContextError
from inn_guard.core.readable import runs_code_of

__all__ = ["FreiaGraph", "FreiaModule", "FreiaSequence", "adapt"]

#: ReversibleGraphNet, which later versions do not have, warns and calls the forward of GraphINN
GRAPHS = (GraphINN, getattr(framework, "ReversibleGraphNet", GraphINN))


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
    """`adapt`, with the shapes of inputs and outputs if the net around the model knows them."""
    if isinstance(model, GraphINN):
        return FreiaGraph(model, context, shapes)
    if isinstance(model, SequenceINN):
        return FreiaSequence(model, context, shapes)
    if isinstance(model, InvertibleModule):
        return FreiaModule(model, context, shapes)
    raise TypeError(
        "expected an InvertibleModule, SequenceINN or GraphINN of FrEIA; "
        f"got {type(model).__qualname__}"
    )


class FreiaModule(Adapted):
    """One InvertibleModule. Several inputs (or outputs) are flattened and concatenated in order.

    Attributes:
        inputs: shapes of the module's inputs as the library stores them, without the batch. They
            split x if there are several.
        outputs: shapes of its outputs, which split z.
        remarks: the library's warnings during calls, each message once.
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
                f"expected {len(self.inputs)} input(s) of {self.name} "
                f"with shapes (B, ...) = {self.inputs}; got {got}"
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

    def __deepcopy__(self, memo: dict[Any, Any]) -> FreiaModule:
        # a learned permutation keeps its latest matrix with its graph
        memo.update(copies_of_computed_tensors(self))
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        outputs, log_det = self._with_log_det(unpack(x, self.inputs), rev=False)
        return pack(outputs), log_det

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        outputs, log_det = self._with_log_det(unpack(z, self.outputs), rev=True)
        return pack(outputs), log_det

    def _values(self, tensors: tuple[Tensor, ...], *, rev: bool) -> tuple[Tensor, ...]:
        """The module's outputs, without the cost of a log-determinant if it runs without one."""
        try:
            return self._run(tensors, rev=rev, jac=False)[0]
        except MissingContextError:
            raise
        except (ValueError, TypeError, RuntimeError):
            # without log-determinants some modules return None or no pair, which nets cannot unpack
            return self._with_log_det(tensors, rev=rev)[0]

    def _with_log_det(
        self, tensors: tuple[Tensor, ...], *, rev: bool
    ) -> tuple[tuple[Tensor, ...], Any]:
        """The module's outputs and its log-determinant in the library's own format."""
        try:
            return self._run(tensors, rev=rev, jac=True)
        except RuntimeError:
            if torch.is_grad_enabled():
                raise
            # the log-determinant of IResNetLayer is made of gradients
            with torch.enable_grad():
                outputs, log_det = self._run(tensors, rev=rev, jac=True)
            if isinstance(log_det, Tensor):
                log_det = log_det.detach()
            return tuple(output.detach() for output in outputs), log_det

    def _run(
        self, tensors: tuple[Tensor, ...], *, rev: bool, jac: bool
    ) -> tuple[tuple[Tensor, ...], Any]:
        """One call of the module; its warnings go to ``remarks``."""
        conditions = self._conditions()
        # some modules have no argument c at all
        optional = {"c": conditions} if conditions else {}
        argument = self._argument([tensor.clone() for tensor in tensors])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = self.module(argument, **optional, rev=rev, jac=jac)
        for warning in caught:
            self.remarks[str(warning.message)] = None
        outputs, log_det = result, None
        if len(result) == 2:
            outputs, log_det = result
        if isinstance(outputs, Tensor):
            return (outputs,), log_det
        return tuple(outputs), log_det

    def _argument(self, tensors: list[Tensor]) -> Any:
        """What the module takes as its input: a list of tensors, or the only one."""
        return tensors

    def _conditions(self) -> list[Any]:
        """The context as the list that the library takes.

        Raises:
            MissingContextError: if conditions are missing.
            ValueError: if conditions are given to a module that takes none.
        """
        conditions = _as_list(self.context)
        if len(conditions) < self._needed():
            raise MissingContextError(
                f"{self.name} expected {self._needed()} condition(s), got {len(conditions)}; "
                "pass context=[...], in the order of the library's argument c"
            )
        if conditions and not _takes_conditions(self.module):
            raise ValueError(
                f"{self.name} takes no conditions, got {len(conditions)}; leave out context"
            )
        return conditions

    def _needed(self) -> int:
        """Number of conditions without which the module cannot run."""
        return len(getattr(self.module, "dims_c", None) or ())

    def _shapes(self) -> tuple[Shapes, Shapes]:
        """Shapes of the inputs and of the outputs, as the library stores them."""
        module: Any = self.module
        inputs = tuple(module.dims_in)
        if all(isinstance(size, int) for size in inputs):
            # ActNorm stores its only shape instead of a list of one
            inputs = (inputs,)
        try:
            outputs = module.output_dims([tuple(shape) for shape in inputs])
        except (ValueError, NotImplementedError, TypeError, AssertionError):
            # upsampling layers store their only output's shape as that of their input
            outputs = inputs[:1]
        return _plain(inputs), _plain(outputs)


class FreiaSequence(FreiaModule):
    """A SequenceINN; its blocks and those of nested nets are the layers."""

    def layers(self) -> tuple[Invertible, ...]:
        """The blocks in order, each with the condition that its index names."""
        if not runs_code_of(self.module, SequenceINN, ("__call__", "forward")):
            return ()
        conditions = self._conditions()
        net: Any = self.module
        flat: list[Invertible] = []
        for k, (module, index) in enumerate(zip(net.module_list, net.conditions, strict=True)):
            context = None if index is None else [conditions[index]]
            before = _plain(net.shapes[k : k + 1])
            after = _plain(net.shapes[k + 1 : k + 2])
            flat += _flat(_adapt(module, context, (before, after)))
        return tuple(flat)

    def _argument(self, tensors: list[Tensor]) -> Any:
        return tensors[0]

    def _needed(self) -> int:
        net: Any = self.module
        return max((index + 1 for index in net.conditions if index is not None), default=0)

    def _shapes(self) -> tuple[Shapes, Shapes]:
        shapes: Any = self.module.shapes
        return _plain(shapes[:1]), _plain(shapes[-1:])


class FreiaGraph(FreiaModule):
    """A GraphINN with any number of inputs, outputs and conditions.

    x and z hold them in the order of the node list. A graph whose conditions are computed by its
    own nodes is one opaque layer.
    """

    def layers(self) -> tuple[Invertible, ...]:
        """The nodes in order, each acting on the concatenation of the edges alive there."""
        if not any(runs_code_of(self.module, kind, ("__call__", "forward")) for kind in GRAPHS):
            return ()
        conditions = self._conditions()
        graph: Any = self.module

        def expand(node: Any, inputs: Shapes, outputs: Shapes) -> tuple[Invertible, ...]:
            """The layers of one node; () if another node computes one of its conditions."""
            context: list[Any] = []
            for source in node.conditions:
                source_node = source[0] if isinstance(source, tuple) else source
                if source_node not in graph.condition_nodes:
                    return ()
                context.append(conditions[graph.condition_nodes.index(source_node)])
            return _flat(_adapt(node.module, context or None, (inputs, outputs)))

        return chain(graph, expand)

    def _needed(self) -> int:
        return len(self.module.condition_nodes)  # type: ignore[arg-type]

    def _shapes(self) -> tuple[Shapes, Shapes]:
        graph: Any = self.module
        inputs = _plain(node.output_dims[0] for node in graph.in_nodes)
        return inputs, _plain(graph.global_out_shapes)


def _flat(layer: FreiaModule) -> tuple[Invertible, ...]:
    return layer.layers() or (layer,)


def _plain(shapes: Any) -> Shapes:
    """The library's shapes, lists or torch.Size, as tuples that can be compared."""
    plain = []
    for shape in shapes:
        plain.append(tuple(int(size) for size in shape))
    return tuple(plain)


def _as_list(context: Context) -> list[Any]:
    if context is None:
        return []
    if isinstance(context, (list, tuple)):
        return list(context)
    return [context]


def _takes_conditions(module: nn.Module) -> bool:
    """Whether the module's ``forward`` has an argument c."""
    parameters = inspect.signature(module.forward).parameters
    takes_anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return "c" in parameters or takes_anything

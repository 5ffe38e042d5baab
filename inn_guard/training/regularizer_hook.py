"""Hooks for a training loop: when a regularizer is due, and what it adds to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.core.invertible import Context, Invertible
from inn_guard.training.schedule import Schedule, schedule

__all__ = ["Regularizer", "RegularizerHook"]


@runtime_checkable
class Regularizer(Protocol):
    """Anything that turns a map and a batch into a scalar. One that draws noise keeps it in ``generator``."""

    def __call__(self, model: Invertible, x: Tensor, z: Tensor | None = None) -> Tensor:
        """The penalty, already multiplied by its coefficient."""
        ...


class RegularizerHook:
    """What the regularizers due at this step add to the loss; an exact 0 without graph or cost on the steps between.

        loss = task_loss + hook(x, z=z)

    The hook counts its own calls. With gradient accumulation, where one optimizer step takes several calls, hand it
    the number of the optimizer step instead: ``hook(x, z=z, step=step)``; then every part of a due step is penalised.
    NaN and Inf in a penalty are passed on, not hidden.

    Args:
        model: an Invertible, or a model that ``wrap`` knows.
        regularizers: added up, in this order.
        every: period in steps (due at 0, k, 2k, ...), or any function step -> bool.

    Attributes:
        step: number of the next step.
    """

    def __init__(
        self, model: nn.Module, regularizers: Sequence[Regularizer], *, every: int | Schedule = 10
    ) -> None:
        self.model: Invertible = wrap(model)
        if callable(regularizers) or not all(
            callable(one) and not isinstance(one, type) for one in regularizers
        ):
            raise TypeError(
                f"expected a list of regularizers, such as [FiniteDifferences(1e-4)]; got {regularizers!r}"
            )
        self.regularizers = tuple(regularizers)
        self.due: Schedule = schedule(every)
        self.step = 0
        self._last: dict[str, Tensor] = {}

    def __call__(
        self,
        x: Shaped[Tensor, "batch *data"],
        z: Tensor | None = None,
        context: Context = None,
        *,
        step: int | None = None,
    ) -> Float[Tensor, ""]:
        """The sum of the penalties if this step is due, else 0.

        Args:
            x: data, (B, *data).
            z: F(x) with its graph, if it has been computed already.
            context: condition for this batch, in place of the model's own.
            step: the optimizer's step; None: the hook's own count of calls.

        Returns:
            A scalar to be added to the loss.
        """
        step = self.step if step is None else step
        self.step = step + 1
        if not self.due(step):
            return x.new_zeros(())
        model = self.model if context is None else self.model.with_context(context)
        penalties = [_penalty(regularizer, model, x, z) for regularizer in self.regularizers]
        self._last = {
            name: penalty.detach() for name, penalty in zip(self._names(), penalties, strict=True)
        }
        return torch.stack(penalties).sum() if penalties else x.new_zeros(())

    @property
    def last(self) -> dict[str, float]:
        """Each regularizer's penalty at the last due step, coefficient included, for the log; {} before the first."""
        return {name: penalty.item() for name, penalty in self._last.items()}

    def state_dict(self) -> dict[str, Any]:
        """The step counter, the noise generators' states and the regularizers' own: all that resuming a run takes."""
        return {
            "step": self.step,
            "generators": [_generator_state(regularizer) for regularizer in self.regularizers],
            "regularizers": [_own_state(regularizer) for regularizer in self.regularizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: if ``state`` belongs to a hook with other regularizers, or to something else.
        """
        if missing := {"step", "generators", "regularizers"} - set(state):
            raise ValueError(
                f"expected what a RegularizerHook's state_dict() returned; it lacks {sorted(missing)}"
            )
        mine, theirs = _kinds(self.state_dict()), _kinds(state)
        if mine != theirs:
            raise ValueError(
                f"expected the state of {len(mine)} regularizers; got {len(theirs)}, or others in noise and state: "
                "build the hook with the same regularizers"
            )
        self.step = int(state["step"])
        states = zip(self.regularizers, state["generators"], state["regularizers"], strict=True)
        for regularizer, generator, own in states:
            if generator is not None:
                regularizer.generator.set_state(generator.cpu())  # type: ignore[attr-defined]
            if own is not None:
                regularizer.load_state_dict(own)  # type: ignore[attr-defined]

    def _names(self) -> list[str]:
        names = [
            getattr(regularizer, "__name__", type(regularizer).__name__)
            for regularizer in self.regularizers
        ]
        return [name if names.count(name) == 1 else f"{name}[{k}]" for k, name in enumerate(names)]


def _penalty(regularizer: Regularizer, model: Invertible, x: Tensor, z: Tensor | None) -> Tensor:
    penalty = regularizer(model, x, z)
    if not isinstance(penalty, Tensor) or penalty.numel() != 1:
        raise TypeError(
            f"expected a scalar tensor from the regularizer {regularizer!r}; got {penalty!r}"
        )
    return penalty.reshape(())


def _generator_state(regularizer: Regularizer) -> Tensor | None:
    generator = getattr(regularizer, "generator", None)
    return None if generator is None else generator.get_state()


def _own_state(regularizer: Regularizer) -> dict[str, Any] | None:
    return regularizer.state_dict() if hasattr(regularizer, "state_dict") else None


def _kinds(state: dict[str, Any]) -> list[tuple[bool, bool]]:
    """For each regularizer whether it draws noise, and whether it has a state of its own."""
    pairs = zip(state["generators"], state["regularizers"], strict=True)
    return [(generator is not None, own is not None) for generator, own in pairs]

"""RegularizerHook: what regularizers add to the loss of a training loop, and when."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.core.invertible import Context, Invertible
from inn_guard.core.mismatch import why_rejected
from inn_guard.training.regularizers.checks import is_number
from inn_guard.training.schedule import Schedule, checked_step, schedule

__all__ = ["Regularizer", "RegularizerHook"]

STATE_KEYS = {"step", "skipped_steps", "generators", "regularizers"}


@runtime_checkable
class Regularizer(Protocol):
    """Anything that turns a map and a batch into a scalar. Its noise comes from ``generator``."""

    def __call__(self, model: Invertible, x: Tensor, z: Tensor | None = None) -> Tensor:
        """The penalty, already multiplied by its coefficient."""
        ...


class RegularizerHook:
    """What the regularizers that are due add to the loss; exactly 0 on the steps in between.

        loss = task_loss + hook(x, z=z)
        hook.step(loss, optimizer, clip=10.0)

    On a step that is not due the 0 has no graph and costs nothing. NaN and Inf in a penalty are
    passed on, not hidden: ``step`` leaves such steps out.

    The hook counts its own calls. With gradient accumulation, where one optimizer step takes
    several calls, pass the number of the optimizer step: ``hook(x, z=z, step=step)``. Then every
    part of a due step is penalised.

    Args:
        model: an Invertible, or a model that ``wrap`` accepts.
        regularizers: one regularizer or a list, added up in this order.
        every: period in steps (due at 0, k, 2k, ...), or any function step -> bool.

    Attributes:
        next_step: number of the next call's step.
        skipped_steps: how many optimizer steps ``step`` has left out.

    Raises:
        TypeError: if ``regularizers`` is neither a regularizer nor a list of them.
    """

    def __init__(
        self,
        model: nn.Module,
        regularizers: Regularizer | Sequence[Regularizer],
        *,
        every: int | Schedule = 10,
    ) -> None:
        self.model: Invertible = wrap(model)
        if callable(regularizers):
            regularizers = [regularizers]
        if not isinstance(regularizers, (list, tuple)):
            raise TypeError(
                "expected a regularizer or a list of regularizers, such as "
                f"FiniteDifferences(1e-4); got {regularizers!r:.60}"
            )
        for regularizer in regularizers:
            if not callable(regularizer) or isinstance(regularizer, type):
                raise TypeError(
                    "expected a regularizer or a list of regularizers, such as "
                    f"FiniteDifferences(1e-4); got {regularizer!r}"
                )
        self.regularizers = tuple(regularizers)
        self.due: Schedule = schedule(every)
        self.next_step = 0
        self.skipped_steps = 0
        self._every = every
        self._last: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        regularizers = ", ".join(repr(regularizer) for regularizer in self.regularizers)
        return (
            f"RegularizerHook({self.model.name}, [{regularizers}], every={self._every}, "
            f"next_step={self.next_step}, skipped_steps={self.skipped_steps})"
        )

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
            step: the optimizer's step. Default: the hook's own count of calls.

        Returns:
            A scalar to be added to the loss.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"expected x as a tensor (B, *data); got {type(x).__name__}")
        if z is not None and not (isinstance(z, Tensor) and z.dim() > 1):
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(f"expected z as a tensor (B, *latent); got {got}")
        step = checked_step(self.next_step if step is None else step)
        self.next_step = step + 1
        if not self.due(step) or not self.regularizers:
            return x.new_zeros(())
        model = self.model
        if context is not None:
            model = model.with_context(context)
        try:
            penalties = [_penalty(regularizer, model, x, z) for regularizer in self.regularizers]
        except (RuntimeError, ValueError) as error:
            why = why_rejected(model, x, model.context)
            if why:
                raise ValueError(f"{why}; {error}") from error
            raise
        # tensors, not numbers: ``last`` converts them, so that a step does not wait for the device
        detached = [penalty.detach() for penalty in penalties]
        self._last = dict(zip(self._names(), detached, strict=True))
        return torch.stack(penalties).sum()

    def step(
        self, loss: Tensor, optimizer: torch.optim.Optimizer, *, clip: float | None = None
    ) -> bool:
        """Differentiate the loss, clip, and step, unless the loss or its gradient is not finite.

        One sample at which the inverse overflows can make a penalty NaN, and a single NaN gradient
        permanently corrupts Adam's state. Such a step is left out and counted in
        ``skipped_steps``. The gradients are cleared in both cases. Gradients of earlier
        ``backward`` calls (gradient accumulation) are part of the step.

        Args:
            loss: a scalar with a graph.
            optimizer: its parameters get the gradients.
            clip: largest Euclidean norm of the gradient of all parameters; a longer one is scaled
                to it. Default: no clipping.

        Returns:
            Whether the step was made.

        Raises:
            ValueError: if ``clip`` is not positive.
        """
        if clip is not None and not (is_number(clip) and 0 < clip <= sys.float_info.max):
            raise ValueError(f"expected a largest gradient norm clip > 0; got {clip!r:.60}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"expected an optimizer of torch.optim; got {optimizer!r:.60}")
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r:.60}"
            raise TypeError(f"expected loss as one number with a graph; got {got}")
        loss.backward()
        parameters: list[Tensor] = []
        for group in optimizer.param_groups:
            parameters += group["params"]
        # an infinite limit clips nothing, but the norm tells whether all gradients are finite
        if clip is None:
            clip = math.inf
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        usable = bool(norm.isfinite() & loss.detach().isfinite())
        if usable:
            optimizer.step()
        else:
            self.skipped_steps += 1
        optimizer.zero_grad()
        return usable

    @property
    def last(self) -> dict[str, float]:
        """Each regularizer's penalty at the last due step, for the log; {} before the first one."""
        return {name: penalty.item() for name, penalty in self._last.items()}

    def state_dict(self) -> dict[str, Any]:
        """The counters, the noise generators' states and the regularizers' own, to resume a run."""
        return {
            "step": self.next_step,
            "skipped_steps": self.skipped_steps,
            "generators": [_generator_state(regularizer) for regularizer in self.regularizers],
            "regularizers": [_own_state(regularizer) for regularizer in self.regularizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the counters, the generators' states and the regularizers' own of ``state``.

        Raises:
            ValueError: if ``state`` is not that of a hook with the same regularizers.
        """
        missing = STATE_KEYS - set(state)
        if missing:
            raise ValueError(
                "expected what a RegularizerHook's state_dict() returned; "
                f"it lacks {sorted(missing)}"
            )
        mine, theirs = _kinds(self.state_dict()), _kinds(state)
        if mine != theirs:
            raise ValueError(
                f"expected the state of {len(mine)} regularizers; got that of {len(theirs)}, or of "
                "others: build the hook with the same regularizers"
            )
        self.next_step = int(state["step"])
        self.skipped_steps = int(state["skipped_steps"])
        states = zip(self.regularizers, state["generators"], state["regularizers"], strict=True)
        for regularizer, generator, own in states:
            if generator is not None:
                regularizer.generator.set_state(generator.cpu())  # type: ignore[attr-defined]
            if own is not None:
                regularizer.load_state_dict(own)  # type: ignore[attr-defined]

    def _names(self) -> list[str]:
        """Class or function names, numbered where several regularizers share one."""
        plain = [getattr(r, "__name__", type(r).__name__) for r in self.regularizers]
        names = []
        for k, name in enumerate(plain):
            if plain.count(name) > 1:
                name = f"{name}[{k}]"
            names.append(name)
        return names


def _penalty(regularizer: Regularizer, model: Invertible, x: Tensor, z: Tensor | None) -> Tensor:
    """What a regularizer adds to the loss, as a 0-dimensional tensor."""
    penalty = regularizer(model, x, z)
    if not isinstance(penalty, Tensor) or penalty.numel() != 1:
        raise TypeError(
            f"expected a scalar tensor from the regularizer {regularizer!r}; got {penalty!r}"
        )
    return penalty.reshape(())


def _generator_state(regularizer: Regularizer) -> Tensor | None:
    generator = getattr(regularizer, "generator", None)
    if generator is None:
        return None
    return generator.get_state()


def _own_state(regularizer: Regularizer) -> dict[str, Any] | None:
    if not hasattr(regularizer, "state_dict"):
        return None
    return regularizer.state_dict()


def _kinds(state: dict[str, Any]) -> list[tuple[bool, bool]]:
    """For each regularizer whether it draws noise, and whether it has a state of its own."""
    pairs = zip(state["generators"], state["regularizers"], strict=True)
    return [(generator is not None, own is not None) for generator, own in pairs]

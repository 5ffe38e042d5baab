"""StabilityCallback: audits on a schedule inside a Lightning run, logged like any other metric.

If ``import lightning`` fails with "operator torchvision::nms does not exist", the installed
torchvision was built for another torch. MemCNN requires it without needing it:
pip uninstall torchvision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from inn_guard.audits.quick_check import quick_round_trip
from inn_guard.audits.run import Check
from inn_guard.core.invertible import Context
from inn_guard.training.actions import Action
from inn_guard.training.audit_hook import AuditHook
from inn_guard.training.records import Record, scalars
from inn_guard.training.schedule import Schedule

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:
    if error.name != "lightning":
        raise
    raise ModuleNotFoundError(
        "StabilityCallback needs lightning: pip install lightning", name="lightning"
    ) from error

__all__ = ["StabilityCallback", "first_entry"]


def first_entry(batch: Any) -> tuple[Tensor, Context]:
    """The pair (x, None) of a batch that is x, or a tuple or list that begins with x."""
    if isinstance(batch, (tuple, list)):
        return batch[0], None
    return batch, None


class StabilityCallback(pl.Callback):
    """An ``AuditHook`` that is called after every optimizer step of a Lightning run.

        trainer = pl.Trainer(callbacks=[StabilityCallback(lambda module: module.flow, every=100)])

    The numbers are those of a plain loop that calls the hook after ``optimizer.step()``; training
    is not affected. Logged with the module's logger are ``inn_guard/failed`` (0 or 1) and
    ``inn_guard/check/quantity`` for each number of each check. A callback cannot add a penalty to
    the loss: call a ``RegularizerHook`` in ``training_step``.

    Args:
        model: from the LightningModule to the model that is audited, an Invertible or one that
            ``wrap`` accepts.
        batch: from a training batch to (x, context).
        checks: names in AUDITS, or checks themselves.
        every: period in optimizer steps, or any function step -> bool.
        samples: how many samples of the batch are audited, the first ones; None: all.
        actions: called with every ``Record``; see ``inn_guard.training.actions``.

    Attributes:
        records: every audit of the run so far.
    """

    def __init__(
        self,
        model: Callable[[Any], nn.Module],
        *,
        batch: Callable[[Any], tuple[Tensor, Context]] = first_entry,
        checks: Sequence[str | Check] = (quick_round_trip,),
        every: int | Schedule = 100,
        samples: int | None = 8,
        actions: Sequence[Action] = (),
    ) -> None:
        super().__init__()
        self._model, self._batch = model, batch
        self._settings: dict[str, Any] = {
            "checks": checks,
            "every": every,
            "samples": samples,
            "actions": actions,
        }
        self._hook: AuditHook | None = None
        self._saved: dict[str, Any] | None = None
        self._steps = 0
        self.records: list[Record] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the model, and continue from a loaded checkpoint."""
        self._hook = AuditHook(self._model(pl_module), record=self.records.append, **self._settings)
        self._steps = int(trainer.global_step)
        if self._saved is not None:
            self._hook.load_state_dict(self._saved)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Audit, if the optimizer has made a step and that step is due."""
        # with gradient accumulation most batches make no step
        if self._hook is None or trainer.global_step == self._steps:
            return
        self._steps = int(trainer.global_step)
        x, context = self._batch(batch)
        if self._hook(x, context, step=self._steps - 1) is not None:
            numbers = scalars(self.records[-1], "inn_guard")
            pl_module.log_dict(numbers, on_step=True, on_epoch=False, batch_size=len(x))

    def state_dict(self) -> dict[str, Any]:
        """The hook's state, {} before the run has started."""
        if self._hook is None:
            return {}
        return self._hook.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the run starts and the model is known."""
        self._saved = state_dict or None

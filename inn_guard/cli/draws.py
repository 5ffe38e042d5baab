"""An audit without data: the model is measured on its own draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inn_guard.adapters import wrap
from inn_guard.audits.advice import STANDARDISE
from inn_guard.audits.level import Level
from inn_guard.audits.priors import base_of
from inn_guard.audits.registry import AUDITS, checks_of_level
from inn_guard.cli.usage import WrongUsage, error_location, notice
from inn_guard.core.context import Context
from inn_guard.core.missing import NotApplicable
from inn_guard.execution.state import preserve_state

__all__ = ["USES_OF_DRAWS", "advice_on_draws", "checks_of_draws", "draw"]

#: what can be asked of a model without data
USES_OF_DRAWS = ["sampling", "reconstruction"]
MOST_DRAWS = 2**20


def draw(
    model: Any,
    *,
    context: Context,
    prior: Any,
    samples: int,
    seed: int,
    like: Tensor,
) -> Tensor:
    """Draws x = F^-1(z), (samples, *data), with z from ``prior`` or else from the model's own base.

    Args:
        model: anything that ``wrap`` accepts.
        context: what the model is conditioned on, one row for each draw.
        prior: a distribution of z, or a function n -> z; None for the model's own.
        samples: how many draws.
        seed: of the draws.
        like: a tensor with the dtype and device of the model.

    Raises:
        WrongUsage: if there is no distribution to draw from, or the model cannot be inverted.
    """
    if samples > MOST_DRAWS:
        raise WrongUsage(f"expected --samples of at most {MOST_DRAWS:,} without DATA")
    try:
        wrapped = wrap(model, context=context)
        if prior is None and wrapped.base() is None:
            raise WrongUsage(
                "expected DATA, because the model declares no base distribution: pass a file of "
                "samples, or --prior module:distribution to audit draws from it"
            )
        base = base_of(wrapped, like, prior=prior)
        with preserve_state(wrapped), torch.no_grad():
            wrapped.eval()
            x = wrapped.inverse(base.draw(samples, seed))
    except WrongUsage:
        raise
    except NotApplicable as error:
        raise WrongUsage(f"an audit without DATA needs draws of the model: {error}") from error
    except Exception as error:  # whatever a model raises
        raise WrongUsage(f"drawing from the model raised {error_location(error)}") from error
    notice(f"no data: the model is audited on {samples} draws from its {base.description}")
    return x


def checks_of_draws(level: Level, uses: list[str]) -> list[str]:
    """The checks of a level that decide one of these uses; at least one for each use."""
    names = [check.name for check in checks_of_level(level) if set(check.uses) & set(uses)]
    for use in uses:
        deciding = [check.name for check in AUDITS.values() if use in check.uses]
        if not set(deciding) & set(names):
            names += deciding[:1]
    return names


def advice_on_draws(advice: tuple[str, ...]) -> tuple[str, ...]:
    """Advice without the one to standardise the data: there are none."""
    about_data = STANDARDISE.partition("{")[0]
    return tuple(text for text in advice if not text.startswith(about_data))

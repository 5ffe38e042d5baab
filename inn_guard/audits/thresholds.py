"""The thresholds that audits share, each with its reason, and the scale they are measured in."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "FLOOR",
    "RESOLUTION",
    "ROUNDING_FACTOR",
    "TYPICAL",
    "USABLE",
    "data_scale",
    "format_log10",
    "latent_size",
    "max_usable_error",
    "typical",
]

#: Largest error that still leaves an inverse usable, in units of the data's scale: one per cent.
USABLE = 1e-2

#: ... but never below this many rounding units of the dtype: a bfloat16 tensor holds no better than 0.4 per cent.
RESOLUTION = 8.0

#: How far above the first-order estimate, eps times the condition of the inverse's computation, rounding may reach.
ROUNDING_FACTOR = 10.0

#: Largest error of a float64 copy that is accepted as the floor of an inexact inverse (bisection, fixed point,
#: integrator, constants stored in float32), in units of the data's scale. Above it the inverse is called wrong.
FLOOR = 1e-4

#: Mean square of the encoded latents, in units of the prior's, within which the prior is where this model's data lie.
TYPICAL = (0.5, 2.0)


def latent_size(encoded: Tensor, prior: Tensor) -> float:
    """Mean square of the finite encoded latents (B, *) over that of draws from the prior; nan if none is finite."""
    finite = encoded.flatten(1).isfinite().all(1)
    return (encoded[finite].double().square().mean() / prior.double().square().mean()).item()


def typical(encoded: Tensor, prior: Tensor) -> bool:
    """Whether the encoded latents (B, *) lie where draws from the prior do, so that drawing from it means anything.

    Their mean square must be within TYPICAL of the prior's, and their mean within half of its deviation. A net that
    was never trained towards its prior, a classifier or a fresh flow, has no latents there to return to: what happens
    there is reported, a verdict does not count it.

    >>> x = torch.linspace(-2, 2, 41).reshape(-1, 1)
    >>> typical(x, x), typical(0.1 * x, x), typical(x.abs(), x)
    (True, False, False)
    """
    finite = encoded[encoded.flatten(1).isfinite().all(1)].double()
    centred = bool((finite.mean() - prior.double().mean()).abs() <= prior.double().std() / 2)
    return centred and TYPICAL[0] <= latent_size(encoded, prior) <= TYPICAL[1]


def max_usable_error(dtype: torch.dtype) -> float:
    """Largest usable error in units of the data's scale, for tensors of ``dtype``.

    >>> max_usable_error(torch.float32), max_usable_error(torch.bfloat16)
    (0.01, 0.0625)
    """
    return max(USABLE, RESOLUTION * torch.finfo(dtype).eps)


def data_scale(x: Float[Tensor, "batch *data"]) -> Float[Tensor, "batch"]:
    """The unit that errors of each sample are measured in: its root mean square, at least the batch's median one.

    A sample that is nearly zero is thereby held to the size of its neighbours, and one huge sample is not held
    against the others. Non-finite samples and a batch of zeros have scale 1.

    >>> data_scale(torch.tensor([[3.0, 3.0], [1.0, 1.0], [0.0, 0.0]])).tolist()
    [3.0, 1.0, 1.0]
    """
    flat = x.detach().flatten(1).double()
    peak = flat.abs().amax(1).clamp(min=torch.finfo(torch.float64).tiny)
    own = peak * (flat / peak.unsqueeze(1)).square().mean(1).sqrt()
    finite = own.isfinite()
    typical = (
        own[finite & (own > 0)].median() if bool((finite & (own > 0)).any()) else own.new_ones(())
    )
    return torch.where(finite, own.clamp(min=typical), torch.ones_like(own))


def format_log10(power: float) -> str:
    """10 to that power with two digits, also where it fits no float.

    >>> format_log10(-6.5), format_log10(412.0), format_log10(math.nan)
    ('3.2e-07', '1.0e+412', 'nan')
    """
    if not math.isfinite(power):
        return str(power) if math.isnan(power) or power > 0 else "0"
    whole = math.floor(power)
    digits, _, carry = f"{10 ** (power - whole):.1e}".partition("e")
    whole += int(carry)
    return f"{digits}e{'-' if whole < 0 else '+'}{abs(whole):02d}"

"""lipschitz_bounds: certified upper and witnessed lower bounds of bi-Lipschitz constants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.adapters import wrap
from inn_guard.core.invertible import Invertible
from inn_guard.execution.state import preserve_state
from inn_guard.lipschitz.certificate import Certificate
from inn_guard.lipschitz.computation import Computed, Conditions, Progress, compute
from inn_guard.lipschitz.cross_check import FAILURES
from inn_guard.lipschitz.fingerprint import fingerprint, weights_hash
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.numerics.intervals import Box

__all__ = ["LipschitzBounds", "lipschitz_bounds"]

LOOSE = 1e3  #: an upper bound this many times above the witnessed lower bound is called loose


@dataclass(frozen=True, repr=False)
class LipschitzBounds(Computed):
    """What is known about Lip(F) and Lip(F^-1), dimensionless.

    ``scope`` says where: on all of R^d, or on a box. On a box, ``inverse`` bounds sup ||J(x)^-1||
    over x in the box. That is the Lipschitz constant of F^-1 on the image of the box only where
    that image is convex; otherwise it is one along images of straight paths.

    Attributes:
        certificate: the proof of the bounds; ``certificate.save(path)``. Others: see ``Computed``.
    """

    certificate: Certificate

    @property
    def forward(self) -> float:
        """Certified upper bound of sup ||J||."""
        return self.upper.forward

    @property
    def inverse(self) -> float:
        """Certified upper bound of sup ||J^-1||."""
        return self.upper.inverse

    @property
    def lower_forward(self) -> float:
        """Witnessed lower bound of sup ||J||."""
        return self.lower.forward

    @property
    def lower_inverse(self) -> float:
        """Witnessed lower bound of sup ||J^-1||."""
        return self.lower.inverse

    @property
    def looseness(self) -> Pair:
        """Upper bound / lower bound of each direction; inf where one of them says nothing."""
        return Pair(
            _quotient(self.forward, self.lower_forward), _quotient(self.inverse, self.lower_inverse)
        )

    def __str__(self) -> str:
        forward = f"{self.lower_forward:.4g} <= Lip(F) <= {self.forward:.4g}"
        inverse = f"{self.lower_inverse:.4g} <= Lip(F^-1) <= {self.inverse:.4g}"
        lines = [
            f"{forward}  ({self.method[0]}, {self.scope}){_remark(self.looseness.forward)}",
            f"{inverse}  ({self.method[1]}, {self.scope}){_remark(self.looseness.inverse)}",
        ]
        if self.reason:
            lines.append(self.reason)
        return "\n".join(lines)

    def __repr__(self) -> str:
        forward = f"[{self.lower_forward:.4g}, {self.forward:.4g}]"
        inverse = f"[{self.lower_inverse:.4g}, {self.inverse:.4g}]"
        return f"LipschitzBounds(forward={forward}, inverse={inverse}, scope={self.scope!r})"


def _quotient(upper: float, lower: float) -> float:
    if lower <= 0:
        return math.inf
    return upper / lower


def _remark(looseness: float) -> str:
    if looseness < LOOSE:
        return ""
    if math.isinf(looseness):
        return "; proves nothing"
    return f"; loose: the upper bound is {looseness:.2g} times the largest value found"


def lipschitz_bounds(
    model: Any,
    domain: Box | Tensor,
    *,
    data: Tensor | None = None,
    seconds: float = 60.0,
    effort: SearchBudget | None = None,
    progress: Progress | None = None,
) -> LipschitzBounds:
    """Certified upper and witnessed lower bounds of a model's bi-Lipschitz constants.

    First layer by layer; then, within the time, runs of layers as one chain, or as a product of
    comparison matrices; and in up to four dimensions, on a bounded box, branch and bound. The least
    bound is kept.

    Args:
        model: an Invertible, or any model that ``wrap`` accepts.
        domain: where the bounds hold: ``Box(lo, hi)`` of the shape of one sample,
            ``Box.everywhere(shape)`` for global bounds, or samples (B, *shape), around which the
            smallest box is taken.
        data: samples (B, *shape) at which the search for witnesses begins; default: the samples of
            ``domain``, or random points of the box.
        seconds: budget of work for everything together, in seconds of one slow core. Operations
            are counted, so that the bounds are the same on every machine and under every load.
            Work that is expected to take longer is left out or replaced by looser bounds.
        effort: budget per chain; default: derived from ``seconds``.
        progress: called with a sentence and the fraction that is done.

    Returns:
        The bounds; infinite ones with the reason.

    Raises:
        TypeError: if ``domain`` is neither a Box nor a tensor.
        ValueError: if ``seconds`` is negative or not a number, if samples are not finite, or if
            the shapes of model, ``domain`` and ``data`` do not agree.

    >>> import torch
    >>> from inn_guard.layers.permutation import Permutation
    >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    >>> lipschitz_bounds(Permutation.reverse(2), x, seconds=1.0)
    LipschitzBounds(forward=[1, 1], inverse=[1, 1], scope='global')

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), Table 3, Remark 3.
    """
    usable = isinstance(seconds, (int, float)) and seconds >= 0
    if not usable or (isinstance(seconds, int) and seconds > 10**18):
        raise ValueError(f"expected a time of at least 0 seconds, got {seconds!r:.60}")
    if data is None and isinstance(domain, Tensor):
        data = domain
    box = _as_box(domain)
    if data is not None and (len(data) == 0 or data.shape[1:] != box.shape):
        wanted = ", ".join(["B >= 1", *map(str, box.shape)])
        raise ValueError(
            f"expected data of the domain's shape, ({wanted}), got {tuple(data.shape)}"
        )
    model = wrap(model)
    conditions = Conditions(box, seconds, effort)
    try:
        found = compute(model, conditions, data, progress)
    except FAILURES as error:
        why = _why_refused(model, box)
        if why is None:
            raise
        raise ValueError(
            f"expected a domain of the shape of one sample that the model accepts, got "
            f"{tuple(box.shape)}: forward of the model raises {type(why).__name__}: {why}"
        ) from error
    certificate = Certificate(
        found.factors_forward,
        found.factors_inverse,
        found.leaves,
        weights_hash(model.state_dict()),
        fingerprint(model),
        conditions,
    )
    return LipschitzBounds(**vars(found), certificate=certificate)


def _why_refused(model: Invertible, box: Box) -> Exception | None:
    """What the model raises at a point of the box; None if it accepts it."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), box.lo)
    try:
        with preserve_state(model), torch.no_grad():
            model.eval()(torch.zeros_like(box.lo).clamp(box.lo, box.hi)[None].to(weight))
    except FAILURES as error:
        return error
    return None


def _as_box(domain: Any) -> Box:
    if isinstance(domain, Box):
        if not domain.shape or not domain.lo.numel():
            raise ValueError(
                "expected a domain of the shape of one sample, such as Box(lo, hi) with corners of "
                f"shape (D,), got corners of shape {tuple(domain.shape)}"
            )
        return domain
    if not isinstance(domain, Tensor):
        raise TypeError(
            "expected a domain as inn_guard.Box(lo, hi) or as a tensor of samples (B, *shape), "
            f"got {type(domain).__name__}"
        )
    if not bool(domain.isfinite().all()):
        raise ValueError("expected finite samples as the domain, got NaN or Inf; leave those out")
    return Box.around(domain)

"""The bound rules of what adapters share: a map run the other way round."""

from __future__ import annotations

from typing import Any

from inn_guard.adapters.adapted import Flipped
from inn_guard.lipschitz.compositions import inverted
from inn_guard.lipschitz.maps import BoundedMap, bounded_map


@bounded_map.register
def _(block: Flipped, layer: Any) -> BoundedMap:
    inner = block.inner.conditioned(layer.context)
    return inverted(bounded_map(inner.block, inner))

"""The tangent of a coupling layer, from one evaluation of its network."""

from __future__ import annotations

import torch
from torch import Tensor

from inn_guard.jacobian.network import NetworkJacobian, select_rows_of
from inn_guard.jacobian.network_dense import add_product_
from inn_guard.layers.partition import Halves, Partition

__all__ = ["CouplingTangent"]


class CouplingTangent:
    """The four products at one point, by the blocks of the Jacobian.

    With the kept part x1 and the changed part x2 of x, and z2 = x2 * g(s(x1)) + t(x1):

        J v     = [v1, g v2 + A v1]                 A = dt/dx1 + x2 g'(s) ds/dx1
        J^T u   = [u1 + A^T u2, g u2]
        J^-1 u  = [u1, (u2 - A u1) / g]
        J^-T v  = [v1 - A^T (v2 / g), v2 / g]

    A v1 and A^T u2 cost one product with the network's Jacobian each. Vectors may carry leading dimensions.

    Args:
        output: z.
        network: the tangent of [t, s], or of t alone, at x1.
        partition: splits x and z.
        scale: g(s(x1)); None where it is one.
        gain: x2 g'(s(x1)); None where there is no s.
    """

    def __init__(
        self,
        output: Tensor,
        network: NetworkJacobian,
        partition: Partition,
        *,
        scale: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> None:
        self.output = output
        self._network, self._partition = network, partition
        self._scale, self._gain = scale, gain
        self._dims = output.dim()

    def select(self, rows: Tensor) -> CouplingTangent | None:
        """The tangent of these rows; None where the network's cannot be taken apart."""
        network = select_rows_of(self._network, rows)
        if network is None:
            return None
        scale, gain = (None if t is None else t[rows] for t in (self._scale, self._gain))
        return CouplingTangent(self.output[rows], network, self._partition, scale=scale, gain=gain)

    def jvp(self, v: Tensor) -> Tensor:
        """J v."""
        kept, changed = self._split(v)
        coupled = self._coupled(kept)
        moved = (
            changed + coupled
            if self._scale is None
            else torch.addcmul(coupled, changed, self._scale)
        )
        return self._join(kept, moved)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u."""
        kept, changed = self._split(u)
        coupled = self._coupled_transpose(changed)
        return self._join(kept + coupled, changed if self._scale is None else changed * self._scale)

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """J^-1 u."""
        kept, changed = self._split(u)
        changed = changed - self._coupled(kept)
        return self._join(kept, changed if self._scale is None else changed / self._scale)

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """J^-T v."""
        kept, changed = self._split(v)
        if self._scale is not None:
            changed = changed / self._scale
        return self._join(kept - self._coupled_transpose(changed), changed)

    def multiply(self, matrix: Tensor) -> Tensor:
        """J M for a matrix M (dim x, K), at a batch of one; in place."""
        if not isinstance(self._partition, Halves):
            columns = self.jvp(matrix.T.reshape(-1, *self.output.shape))
            return columns.reshape(len(columns), -1).T.contiguous()
        matrix = matrix.contiguous()
        kept, changed = self._partition.split(matrix.view(1, self.output.shape[1], -1), dims=3)
        kept, changed = kept.reshape(-1, matrix.shape[1]), changed.reshape(-1, matrix.shape[1])
        if self._scale is not None:
            changed.mul_(self._scale.reshape(-1, 1))
        add_product_(
            changed,
            self._network,
            kept,
            shape=self._split(self.output)[0].shape[1:],
            gain=self._gain,
        )
        return matrix

    def _coupled(self, kept: Tensor) -> Tensor:
        """A v1."""
        raw = self._network.jvp(kept)
        if self._gain is not None:
            shift, h = raw.chunk(2, dim=1 - self._dims)
            raw = torch.addcmul(shift, self._gain, h)
        return self._partition.restrict(raw, neutral=0.0)

    def _coupled_transpose(self, changed: Tensor) -> Tensor:
        """A^T u2."""
        raw = self._partition.restrict(changed, neutral=0.0)
        if self._gain is not None:
            raw = torch.cat([raw, self._gain * raw], dim=1 - self._dims)
        return self._network.vjp(raw)

    def _split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._partition.split(v, dims=self._dims)

    def _join(self, kept: Tensor, changed: Tensor) -> Tensor:
        return self._partition.join(kept, changed, dims=self._dims)

"""Certified Lipschitz bounds of an invertible network, in both directions.

From a model to a bound there is one way:

1. ``rules`` read what a layer is, by the exact class of its block, as a ``maps.BoundedMap``:
   linear, elementwise, a coupling, autoregressive, residual. What is not known has no bound, and
   the reason why. ``networks.graph`` reads the subnetworks in it, and ``networks.interpreters`` say
   what their operations mean: boxes of values, constants, Jacobians, chains.
2. Near the centre of a narrow box ``linearised_chain`` takes the product of the layers' derivatives
   there, and bounds how far others lie from it. It gives boxes and bounds of the first layers
   together. It is left out on unbounded boxes, above 4,096 entries, and without time.
3. ``whole_network.bound_layers`` takes a box through the layers, and bounds each on its box.
4. Runs of layers are bounded together, as a chain of linear maps and slopes (``lipsdp``), or as a
   product of enclosed Jacobians where a sample has few entries. ``whole_network.cheapest`` takes
   the factors of least product, of these and of the linearisation.
5. In up to four dimensions ``branch_and_bound`` cuts the box. Nothing else needs that folder.
6. ``witness`` looks for lower bounds, and ``cross_check`` compares what was read with the model's
   own values and derivatives.

``computation`` is this list as a program, ``certificate`` its proof in a file.

Numbers that a proof rests on are rounded outwards: ``numerics.intervals.Interval`` for tensors, and
``numerics.rounding.Upper`` for one upper bound.
"""

from inn_guard.lipschitz.bounds import LipschitzBounds, lipschitz_bounds
from inn_guard.lipschitz.certificate import Certificate
from inn_guard.numerics.intervals import Box

__all__ = ["Box", "Certificate", "LipschitzBounds", "lipschitz_bounds"]

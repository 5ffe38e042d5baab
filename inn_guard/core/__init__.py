"""What every other package builds on.

Read ``invertible`` first, the map that everything else is about, then ``layer_jacobian``, the
products with its Jacobian. ``base`` is the distribution of its latents, ``context`` its conditions.
``missing`` says that there is no answer, and why. ``readable`` decides whether a module may be
taken for what its class says. ``tensors`` and ``random`` are small helpers.
"""

"""Transformers: what couplings do to one entry, z = h(x; theta), affine maps and splines."""

"""Jacobians of chains of layers: products, singular values, determinants, rounding errors.

Read ``chain`` first: the products of all layers at the states of one forward pass. ``checks`` makes
sure that the products of each layer are right. On these build ``lanczos`` and ``singular_values``,
``elimination`` and ``log_det``, ``inverse_gains`` (where the inverse amplifies errors),
``rounding_error`` (how large they become) and ``shadowing`` (how far an exact orbit lies).
``inverse_differences`` multiplies with J^-1 without derivatives. ``network`` and ``network_dense``
differentiate sub-networks without autograd, ``dense`` multiplies whole matrices.
"""

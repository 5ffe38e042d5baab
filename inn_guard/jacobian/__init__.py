"""Jacobians of chains of layers: products, singular values, determinants, rounding errors."""

"""Measured tightness and soundness of the Lipschitz bounds."""

"""Measured tightness and rigour of the Lipschitz bounds."""

"""Bounded maps: the kinds of layers whose Lipschitz constants are known."""

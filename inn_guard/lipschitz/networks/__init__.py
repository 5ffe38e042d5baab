"""Subnetworks: read as graphs of a few operations, and interpreted as boxes, norms, chains."""

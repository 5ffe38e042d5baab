"""Searches of the cubes of dequantized samples for the worst reconstruction: what they find, and what they cost."""

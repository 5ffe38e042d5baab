"""Searches for the worst reconstruction of dequantized samples: what they find and cost."""

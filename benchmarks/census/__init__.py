"""The census: which default flows can be trusted for what."""

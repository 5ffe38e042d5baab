"""Noisy injective flows (NIF)."""

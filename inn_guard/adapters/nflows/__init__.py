"""Nflows."""

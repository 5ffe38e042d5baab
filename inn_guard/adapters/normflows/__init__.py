"""Normflows."""

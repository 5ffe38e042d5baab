"""Zuko."""

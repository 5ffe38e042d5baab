"""Injflow."""

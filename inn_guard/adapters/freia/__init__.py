"""Freia."""

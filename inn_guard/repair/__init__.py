"""Repairs of models that are already trained."""

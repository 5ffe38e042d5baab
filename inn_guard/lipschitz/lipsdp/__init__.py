"""Lipsdp."""

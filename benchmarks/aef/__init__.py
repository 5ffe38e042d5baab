"""Autoencoders within flows against architecturally identical variational autoencoders."""

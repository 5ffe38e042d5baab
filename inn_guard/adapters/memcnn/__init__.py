"""Memcnn."""

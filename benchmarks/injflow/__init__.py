"""Relaxed injective probability flow (Kumar, Poole, Murphy, 2020)."""

"""Stability in a test suite: `assert_stable`, and what the pytest plug-in does with it."""

from inn_guard.testing.assertions import assert_stable

__all__ = ["assert_stable"]

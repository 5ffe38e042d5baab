"""Exact mode: lossless coding of images, and round trips of every model of the tests."""

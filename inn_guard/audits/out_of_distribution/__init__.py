"""Out of distribution."""

"""Models that no adapter knows: their convention is found by trying it on a batch and measuring."""

"""Speed and memory: one script per claim, slow twin or peer alternating with ours in one run."""

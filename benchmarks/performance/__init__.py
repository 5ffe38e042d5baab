"""Speed and memory: one script per claim, peers and ours timed in turn in one run."""

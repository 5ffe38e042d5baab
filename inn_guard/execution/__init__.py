"""How a computation runs: state, memory, time limits and several processes."""

"""What every other package builds on: the map, its Jacobian, its context, tensor helpers."""

"""Results and how people see them."""

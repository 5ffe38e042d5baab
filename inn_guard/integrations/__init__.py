"""Training frameworks: each file needs its own optional library and is imported by the user who has it."""

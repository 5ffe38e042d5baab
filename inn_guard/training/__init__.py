"""What runs inside a training loop: regularizers, scheduled audits, actions on their findings."""

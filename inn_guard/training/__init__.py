"""Inside a training loop: regularizers, audits on a schedule, and actions on their findings."""

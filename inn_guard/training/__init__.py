"""What runs inside a training loop.

``regularizer_hook`` adds the penalties of ``regularizers`` to the loss. ``audit_hook`` audits the
model on a ``schedule``; ``records`` keeps what was found, and ``actions`` answers it. ``lightning``
does the same inside a Lightning run.
"""

from inn_guard.training import actions

__all__ = ["actions"]

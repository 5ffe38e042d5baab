"""layers"""

from inn_guard.layers import bounds  # noqa: F401 - registers the bound rules

"""Results -> tables, plots and pages for people: the only folder that imports pandas, matplotlib and jinja2."""

from importlib.util import find_spec

_MISSING = [name for name in ("pandas", "matplotlib", "jinja2") if find_spec(name) is None]
if _MISSING:
    raise ImportError(f"reports need {', '.join(_MISSING)}; type: pip install inn_guard[report]")

from inn_guard.report.history import render_history, write_history  # noqa: E402
from inn_guard.report.html import render, write_html  # noqa: E402
from inn_guard.report.saved import from_json  # noqa: E402
from inn_guard.report.tables import frame, layer_frame  # noqa: E402

__all__ = ["frame", "from_json", "layer_frame", "render", "render_history", "write_history", "write_html"]

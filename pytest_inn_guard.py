"""pytest plug-in of inn_guard.

It stands outside of the package so that pytest can load it without importing torch: a test session
that does not use it pays nothing.

    pytest --inn-guard           # audit every invertible model that a test calls as model(x)
    pytest --inn-guard-strict    # and fail the test if the model is not fit for its uses

    def test_my_flow(inn_guard):
        inn_guard(flow, x)       # fails with the report as the message

    @pytest.mark.inn_guard(uses=["density"], limits={"density": 0.01})
"""

from __future__ import annotations

from typing import Any

import pytest

__all__: list[str] = []

PROPERTY = "inn_guard"  #: of a test, in JUnit XML too: the verdict on each of its models
LINES = pytest.StashKey[list[tuple[str, str]]]()
MARKER = (
    "inn_guard(uses=None, limits=None, level='quick', checks=None, seed=0, skip=False): what the "
    "audits of this test count, and up to which figure"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options ``--inn-guard`` and ``--inn-guard-strict``."""
    group = parser.getgroup("inn_guard", "numerical invertibility of flows (inn_guard)")
    group.addoption(
        "--inn-guard",
        action="store_true",
        help="audit every invertible model that a test calls as model(x), with that batch, and "
        "list the verdicts",
    )
    group.addoption(
        "--inn-guard-strict",
        action="store_true",
        help="the same, and a test fails if its model is not fit for its uses",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and what collects verdicts from this process and from xdist's."""
    config.addinivalue_line("markers", MARKER)
    config.stash[LINES] = []
    config.pluginmanager.register(_Collector(config.stash[LINES]), "inn_guard_collector")


class _Collector:
    """Keeps (verdict, test) of every report that a test process sends."""

    def __init__(self, lines: list[tuple[str, str]]) -> None:
        self.lines = lines

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the verdicts from the properties of a finished test."""
        if report.when != "teardown":
            return
        for name, value in report.user_properties:
            if name == PROPERTY:
                self.lines.append((str(value), report.nodeid))


@pytest.fixture
def inn_guard(request: pytest.FixtureRequest) -> Any:
    """`inn_guard.assert_stable` with the defaults of the marker ``inn_guard``."""
    from inn_guard.testing.session import Guard

    properties = request.node.user_properties
    return Guard(lambda line: properties.append((PROPERTY, line)), _arguments(request.node))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Record the models that the test calls, and audit them after it has passed."""
    config = item.config
    strict = config.getoption("--inn-guard-strict")
    if not (strict or config.getoption("--inn-guard")):
        return (yield)
    arguments = _arguments(item)
    left_out = arguments.pop("skip", False)
    # such a test says itself what is audited, and an audit's own calls are none of the test's
    if left_out or "inn_guard" in getattr(item, "fixturenames", ()):
        return (yield)
    from inn_guard.testing.session import ModelCalls, verdict_line

    calls = ModelCalls()
    with calls.recording():
        result = yield
    unfit = []
    for report in calls.audited(arguments):
        item.user_properties.append((PROPERTY, verdict_line(report)))
        if not report.verdict.passed:
            unfit.append(str(report))
    if strict and unfit:
        pytest.fail("\n\n".join(unfit), pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """List the verdicts, the failing ones first."""
    lines = config.stash[LINES]
    if not lines:
        return
    terminalreporter.section("inn_guard")
    unfit = 0
    for line, test in sorted(lines, key=lambda pair: _is_fit(pair[0])):
        unfit += not _is_fit(line)
        terminalreporter.write_line(f"{test}: {line}")
    terminalreporter.write_line(f"{len(lines)} models audited, {unfit} not fit for their uses")


def _is_fit(line: str) -> bool:
    return line.startswith(("stable:", "marginal:"))


def _arguments(item: pytest.Item) -> dict[str, Any]:
    """Of the marker that is nearest to the test, and those of its class and module behind it."""
    from inn_guard.testing.session import arguments_of_marker

    given: dict[str, Any] = {}
    for marker in item.iter_markers("inn_guard"):
        if marker.args:
            raise TypeError(
                f"expected keyword arguments of pytest.mark.inn_guard, got {marker.args!r}: "
                'pass uses=["density"]'
            )
        given = {**marker.kwargs, **given}
    return arguments_of_marker(given)

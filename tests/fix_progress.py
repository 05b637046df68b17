"""Modules as they finish, and how many are left: one line each, in a terminal as in a log."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest


class Progress:
    """A plugin of the process that reports; with pytest-xdist that is not one of those that run tests."""

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self.reporter = reporter
        self.left: Counter[str] = Counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: Counter[str] = Counter()

    def expect(self, node_ids: list[str]) -> None:
        self.left = Counter(node_id.partition("::")[0] for node_id in node_ids)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.expect([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.expect(ids)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        if report.passed and self.reporter.verbosity <= 0:
            return "passed" if report.when == "call" else "", "", ""  # no dot
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        module = report.nodeid.partition("::")[0]
        self.seconds[module] += report.duration
        self.failed[module] += report.failed
        if report.when == "teardown":
            self.left[module] -= 1
            if not self.left[module]:
                del self.left[module]
                failed = f", {self.failed[module]} failed" if self.failed[module] else ""
                self.reporter.ensure_newline()
                self.reporter.write_line(f"{module}: {self.seconds[module]:.0f} s{failed} | {len(self.left)} to go")

"""A pytest plugin: every test that ended is a line of JSON in the file that an environment variable names."""

from __future__ import annotations

import json
import os

FILE = "PYTEST_ROWS_FILE"


def pytest_runtest_logreport(report) -> None:
    """In the process that the reports of all workers come to. A test passes by its call and fails by any of its phases."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.passed and report.when != "call"):
        return
    _write(report.nodeid, report.outcome, report)


def pytest_collectreport(report) -> None:
    """A file that can't be imported."""
    if "PYTEST_XDIST_WORKER" not in os.environ and report.failed:
        _write(report.nodeid, "failed", report)


def _write(test: str, outcome: str, report) -> None:
    error = ""
    if outcome == "failed":
        lines = [line for line in str(report.longrepr).strip().splitlines() if line.startswith("E ")]
        error = (lines or str(report.longrepr).strip().splitlines()[-1:] or [""])[0].removeprefix("E").strip()[:200]
    with open(os.environ[FILE], "a") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "error": error}) + "\n")

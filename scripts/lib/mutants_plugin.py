"""A plugin of pytest that writes how long each test takes and whether it passes; see mutants_tests.py."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

_seconds: dict[str, float] = defaultdict(float)
_failed: set[str] = set()
_called: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a phase of a test; write the line after the last one."""
    test = report.nodeid
    _seconds[test] += report.duration
    if report.failed:
        _failed.add(test)
    if report.when == "call" and report.passed:
        _called.add(test)
    if report.when == "teardown":
        passed = test in _called and test not in _failed
        with Path(os.environ["UNIONFS_MUTANTS_REPORT"]).open("a") as file:
            file.write(json.dumps([round(_seconds[test], 3), passed, test]) + "\n")

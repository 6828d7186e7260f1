"""A plugin of pytest that names a failing test as soon as it fails, and writes JSON lines of failures and, at the end, counts.

    PYTHONPATH=profiling python -m pytest tests/kernels -p failing_tests --failures failures.jsonl

Also under pytest-xdist. A run that is interrupted (SIGINT) writes its counts, too, and that it was.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures", type=Path, help="append JSON lines of failing tests and of the counts to this file")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers report to the one process that is none
        config.pluginmanager.register(Failures(config), "failures")


class Failures:
    """Counts and failures of one run."""

    def __init__(self, config: pytest.Config):
        self.file: Path | None = config.getoption("--failures")
        self.start = time.perf_counter()
        self.counts = {"tests": 0, "passed": 0, "failed": 0, "skipped": 0}

    def write(self, row: dict[str, Any]) -> None:
        if self.file:
            with self.file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")

    def failed(self, name: str, report: Any) -> None:
        self.counts["failed"] += 1
        crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", None) or str(report.longrepr)
        message = " ".join(crash.split())[:300]
        print(f"\nFAILED {name}: {message}", flush=True)
        self.write({"test": name, "message": message})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:  # in set-up or tear-down, too
            self.failed(report.nodeid, report)
        elif report.skipped:
            self.counts["skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1
        self.counts["tests"] += report.when == "setup"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed(report.nodeid, report)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        ended = {"seconds": time.perf_counter() - self.start, "interrupted": int(exitstatus) == pytest.ExitCode.INTERRUPTED}
        self.write(self.counts | ended)
        print("\n" + ", ".join(f"{count} {name}" for name, count in self.counts.items()), flush=True)

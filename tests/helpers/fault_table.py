"""`pytest --fault-table FILE`: what became of every row of the fault matrix, as a Markdown table.

A row without a test fails the run: a matrix with a hole in it proves nothing. Works under xdist too, where tests run
in other processes and only their reports come back.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from matrix import ROWS

KEY = "fault_row"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", metavar="FILE", help="write what became of each row of the fault matrix")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--fault-table")
    if path and not hasattr(config, "workerinput"):  # under xdist the process that hands out the tests writes
        config.pluginmanager.register(FaultTable(Path(path)))


def pytest_itemcollected(item: pytest.Item) -> None:
    for mark in item.iter_markers("row"):
        item.user_properties += [(KEY, row) for row in mark.args]


@dataclass
class Row:
    """What is known of one row."""

    tests: dict[str, str] = field(default_factory=dict)
    """Outcome by test."""
    seconds: float = 0.0

    @property
    def outcome(self) -> str:
        for outcome in ("failed", "passed", "skipped"):
            if outcome in self.tests.values():
                return outcome
        return "missing"

    def add(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        if report.when == "call" or report.outcome != "passed":  # a set-up that passed says nothing yet
            worse = self.tests.get(report.nodeid) == "failed"
            self.tests[report.nodeid] = "failed" if worse else report.outcome


class FaultTable:
    """Gathers reports, writes the table."""

    def __init__(self, path: Path) -> None:
        self._path, self._commit = path, _commit()
        self._rows: defaultdict[int, Row] = defaultdict(Row)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for row in {value for key, value in report.user_properties if key == KEY}:
            self._rows[int(row)].add(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(self._text(session.config), encoding="utf-8")
        if self._holes() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"fault matrix: {self._path}")
        for row in self._holes():
            terminalreporter.write_line(f"row {row} has no test: {ROWS[row]}", red=True)

    def _holes(self) -> list[int]:
        return [row for row in ROWS if not self._rows[row].tests]

    def _text(self, config: pytest.Config) -> str:
        outcomes = [self._rows[row].outcome for row in ROWS]
        counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in sorted(set(outcomes), key=outcomes.index))
        lines = [
            "# Fault matrix: every row as tests, and what became of them",
            "",
            f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, commit {self._commit}, {_hardware()}.",
            "",
            f"`pytest {' '.join(config.invocation_params.args)}`: {counts}.",
            "",
            "Seconds are those of a row's tests with the fixtures they were the first to need; a test of two rows",
            "counts in both.",
            "",
            "| row | case | tests | outcome | seconds |",
            "|---:|---|---|---|---:|",
        ]
        for number, case in ROWS.items():
            row = self._rows[number]
            tests = _by_file(row.tests)
            lines.append(f"| {number} | {case} | {tests} | {row.outcome} | {row.seconds:.1f} |")
        return "\n".join(lines) + "\n"


def _by_file(tests: dict[str, str]) -> str:
    """`tests/unit/x.py` (3), how many of each file; what did not pass is counted."""
    files: defaultdict[str, list[str]] = defaultdict(list)
    for nodeid, outcome in tests.items():
        files[nodeid.partition("::")[0]].append(outcome)
    said = []
    for file, outcomes in sorted(files.items()):
        others = [f", {outcomes.count(kind)} {kind}" for kind in ("failed", "skipped") if kind in outcomes]
        said.append(f"`{file}` ({len(outcomes)}{''.join(others)})")
    return "; ".join(said)


def _commit() -> str:
    """What is tested; changes that are not committed are said."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:
            return ""

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{changed}"


def _hardware() -> str:
    model = platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        names = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({model}), {gib:.0f} GiB, no GPU used, Python {platform.python_version()}"

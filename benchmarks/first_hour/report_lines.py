"""A pytest plugin: one JSON line for each test as soon as it is over, and none of those that a former run has passed.

REPORT_LINES=FILE python -m pytest -p benchmarks.first_hour.report_lines ...
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIABLE = "REPORT_LINES"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last line of each test; a line that was cut off is left out."""
    if not path.is_file():
        return {}
    return {line["test"]: line for line in _lines(path)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    done = {name for name, line in read(Path(os.environ[VARIABLE])).items() if line["outcome"] == "passed"}
    kept = [item for item in items if item.nodeid not in done]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = kept


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    why = ""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        why = str(report.longrepr[2])
    elif report.outcome == "failed":
        why = str(report.longrepr)[-2000:]
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "why": why}
    with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")

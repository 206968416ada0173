"""`pytest -p cpu_seconds --cpu-seconds FOLDER`: what each test costs in CPU seconds, its processes included.

Wall-clock times say how busy the machine was; these say what a test costs on any machine. Linux only. Each process
that runs tests appends to a file of its own, one JSON line a test, so that xdist's workers do not meet;
`python tests/helpers/cpu_seconds.py FOLDER` prints files and tests, the most expensive first.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

SHOWN = 40


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-seconds", metavar="FOLDER", help="write what each test costs in CPU seconds")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    folder = item.config.getoption("--cpu-seconds")
    if folder is None:
        return (yield)
    used, began = cpu_seconds(os.getpid()), time.monotonic()
    result = yield
    line = {
        "test": item.nodeid,
        "cpu_s": round(cpu_seconds(os.getpid()) - used, 2),
        "wall_s": round(time.monotonic() - began, 2),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    with Path(folder, f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return result


def cpu_seconds(root: int) -> float:
    """What a process and all that live or were waited for below it have used."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(path.name))
        ticks[int(path.name)] = sum(map(int, fields[11:15]))  # user and system, its own and of children waited for
    total, left = 0, [root]
    while left:
        pid = left.pop()
        total += ticks.get(pid, 0)
        left += children.get(pid, [])
    return total / os.sysconf("SC_CLK_TCK")


def main(folder: Path) -> None:
    lines = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    cpu, wall = (sum(line[key] for line in lines) for key in ("cpu_s", "wall_s"))
    print(f"{len(lines)} tests, {cpu:.0f} s of CPU, {wall:.0f} s by the clock")
    files = Counter[str]()
    for line in lines:
        files[line["test"].split("::")[0]] += line["cpu_s"]
    for name, seconds in files.most_common(SHOWN):
        print(f"{seconds:8.1f} {name}")
    for line in sorted(lines, key=lambda line: -line["cpu_s"])[:SHOWN]:
        print(f"{line['cpu_s']:8.1f} {line['wall_s']:8.1f} {line['test']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

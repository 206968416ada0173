"""What a rank makes of its peers' records, also of those that were there before it came."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distft.core import host
from distft.core.errors import PeerEnded
from distft.core.phase import PHASE
from distft.health.heartbeat import Heartbeat, HeartbeatFile
from distft.health.watchdog import Watchdog


@pytest.fixture
def seen(tmp_path: Path) -> Callable[..., BaseException | None]:
    """What rank 0 makes of a record that rank 1 has left before rank 0 began to look."""

    def of(**said) -> BaseException | None:
        board = HeartbeatFile(tmp_path / "ranks", 1)
        board.open()
        board.write(Heartbeat(rank=1, phase="rows", **({"process": host.this_start(PHASE.runs)} | said)))
        board.close()
        watch = Watchdog(
            tmp_path, rank=0, world=2, neighbours=[1], timeout_s=60, launched=False, end=lambda code, reason: True
        )
        with watch:
            return watch._peer()

    return of


@pytest.mark.row(5)
def test_a_peer_that_ended_before_we_came_ends_us_too(seen: Callable[..., BaseException | None]) -> None:
    found = seen(ended=75, reason="stopped by SIGTERM before training began (rows)")
    assert isinstance(found, PeerEnded)
    assert found.exit_code == 75
    assert "ended the run: stopped by SIGTERM" in str(found)


def test_what_an_earlier_start_left_says_nothing_of_this_one(seen: Callable[..., BaseException | None]) -> None:
    assert seen(ended=75, process=host.identity() | {"start": "an earlier one"}) is None
    assert seen(ended=0) is None
    assert seen(process=host.identity() | {"start": "an earlier one", "process_start": 1}) is None, "killed, long ago"
    assert seen() is None


def test_a_process_outlives_its_watched_run(tmp_path: Path) -> None:
    """The timer that ends a stuck process was set once more by the last heartbeat: a notebook died of it later."""
    code = (
        "import time\n"
        "from distft.health.watchdog import Watchdog\n"
        f"run = Watchdog(__import__('pathlib').Path({str(tmp_path)!r}), rank=0, world=1, neighbours=[], timeout_s=1,\n"
        "               launched=False, end=lambda code, reason: True)\n"
        "with run:\n"
        "    pass\n"
        "time.sleep(1.5)\n"
        "print('alive')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-2000:]

"""Whose turn it is, who waits, how often waiting asks, and that a wish to stop is heard meanwhile."""

import itertools
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from distft.core import file_lock
from distft.core.errors import Preempted
from distft.core.file_lock import locked_once, wait_hook
from distft.core.phase import PHASE
from distft.core.stop import STOP


def test_the_first_works_and_the_others_see_it_done(tmp_path: Path) -> None:
    made, worked, saw = tmp_path / "made", [], []

    def go() -> None:
        with locked_once(tmp_path / "lock", done=made.exists) as ours:
            if ours:
                worked.append(1)
                time.sleep(0.3)
                made.touch()
            saw.append(made.exists())

    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert worked == [1]
    assert saw == [True] * 8


def test_waiting_asks_less_and_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of somebody else's work, by a clock that only moves while we sleep."""
    now, looks, words = [0.0], [], []
    monkeypatch.setattr(file_lock.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(file_lock.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def done() -> bool:
        looks.append(now[0])
        return now[0] >= 3600

    with FileLock(tmp_path / "lock"), locked_once(tmp_path / "lock", lambda: words.append(now[0]), done=done) as ours:
        assert not ours
    assert len(looks) < 3600 / (file_lock.LAST_S / 2) + 40
    gaps = [later - before for before, later in itertools.pairwise(looks)]
    assert max(gaps) <= file_lock.LAST_S + 1e-6
    assert all(gap <= max(file_lock.FIRST_S, file_lock.SHARE * at) + 1e-6 for at, gap in zip(looks, gaps, strict=False))
    assert len({round(gap, 6) for gap in gaps[-50:]}) == 50, "each at a moment of its own"
    pauses = [later - before for before, later in itertools.pairwise(words)]
    assert max(pauses) <= file_lock.WORD_S + 1e-6


def test_a_waiter_that_is_asked_to_stop_stops(tmp_path: Path) -> None:
    PHASE.begin()
    STOP.ask("SIGTERM")
    try:
        with FileLock(tmp_path / "lock"), pytest.raises(Preempted) as raised, locked_once(tmp_path / "lock", wait_hook):
            raise AssertionError("it is not our turn")
    finally:
        STOP.clear()
        PHASE.begin()
    assert raised.value.exit_code == 75


def test_a_workers_error_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad"), locked_once(tmp_path / "lock"):
        raise ValueError("bad")
    with locked_once(tmp_path / "lock") as ours:
        assert ours

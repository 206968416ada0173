"""One run per folder, and no dead run in anybody's way."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distft.checkpoint.lock import RunLock
from distft.core.errors import BusyError, FileSystemError
from distft.core.host import identity, start_of

QUICK = {"beat_s": 0.05, "stale_s": 0.4}


def write(folder: Path, **owner: object) -> Path:
    path = folder / "lock.json"
    path.write_text(json.dumps(identity() | {"job": "job 7", "started": "noon", "token": "x"} | owner))
    return path


def test_take_and_give_back(tmp_path: Path) -> None:
    with RunLock(tmp_path, job="42"):
        owner = json.loads((tmp_path / "lock.json").read_text())
        assert owner["pid"] == os.getpid()
        assert owner["job"] == "42"
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path):
        pass


@pytest.mark.row(30)
def test_a_live_run_is_named(tmp_path: Path) -> None:
    with RunLock(tmp_path, job="42"):
        with pytest.raises(BusyError) as caught:
            RunLock(tmp_path).acquire()
        for part in (identity()["host"], f"process {os.getpid()}", "job 42", "output_dir"):
            assert part in str(caught.value)
        assert (tmp_path / "lock.json").exists()


@pytest.mark.row(30)
def test_a_dead_process_is_reclaimed_at_once(tmp_path: Path) -> None:
    code = f"import os, sys; sys.path[:0] = {sys.path!r}\nfrom distft.checkpoint.lock import RunLock\n"
    code += f"from pathlib import Path\nRunLock(Path({str(tmp_path)!r})).acquire(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert (tmp_path / "lock.json").exists()
    began = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - began < 5
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock.guard", "lock.json"]


@pytest.mark.row(30)
def test_a_reused_process_number_does_not_fool(tmp_path: Path) -> None:
    start = start_of(os.getpid())
    assert start
    write(tmp_path, process_start=start - 1)
    with RunLock(tmp_path):
        pass


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    for _ in range(200):
        if start_of(child.pid) is None:
            break
        time.sleep(0.05)
    assert start_of(child.pid) is None  # ended, not waited for
    child.wait()


@pytest.mark.row(30, 43)
@pytest.mark.parametrize("where", [{"host": "elsewhere"}, {"boot_id": "other"}, {"pid_namespace": "pid:[1]"}])
def test_another_machine_is_judged_by_its_heartbeat(tmp_path: Path, where: dict[str, str]) -> None:
    path = write(tmp_path, pid=999_999_999, **where)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(BusyError, match="process 999999999, job job 7, since noon"):
            RunLock(tmp_path, **QUICK).acquire()
    finally:
        stop.set()
        thread.join()
    began = time.monotonic()
    with RunLock(tmp_path, **QUICK):
        assert time.monotonic() - began >= 0.4


JOB = {"cluster": "c", "job": "7", "restart": 1}


def as_slurm_starts_it(monkeypatch: pytest.MonkeyPatch, *, restart: int, job: str = "7") -> None:
    for name, value in {"JOB_ID": job, "RESTART_COUNT": str(restart), "CLUSTER_NAME": "c"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


@pytest.mark.row(30)
def test_an_earlier_start_of_the_same_job_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node was lost minutes ago: no beat for longer than one can be late."""
    as_slurm_starts_it(monkeypatch, restart=2)
    path = write(tmp_path, host="elsewhere", slurm=JOB)
    os.utime(path, (time.time() - 120, time.time() - 120))
    began = time.monotonic()
    with RunLock(tmp_path):  # at its usual pace: 60 s for anybody else's
        assert time.monotonic() - began < 2
        assert json.loads(path.read_text())["slurm"] == JOB | {"restart": 2}
    write(tmp_path, host="elsewhere", slurm=JOB)
    began = time.monotonic()
    with RunLock(tmp_path, beat_s=0.2):  # killed this moment: its next beats are waited for, and no more
        assert 0.4 < time.monotonic() - began < 5


@pytest.mark.row(30)
@pytest.mark.parametrize(
    "holder", [{"job": "8"}, {"cluster": "other"}, {"restart": 2}, {"restart": 3}, {"restart": None}], ids=str
)
def test_anybody_elses_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: dict) -> None:
    as_slurm_starts_it(monkeypatch, restart=2)
    path = write(tmp_path, host="elsewhere", slurm=JOB | holder)
    os.utime(path, (1, 1))
    began = time.monotonic()
    with RunLock(tmp_path, **QUICK):
        assert time.monotonic() - began >= 0.4


@pytest.mark.row(30)
def test_an_earlier_start_that_still_beats_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that Slurm cannot reach may still reach the disk."""
    as_slurm_starts_it(monkeypatch, restart=2)
    path = write(tmp_path, host="elsewhere", slurm=JOB)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(BusyError):
            RunLock(tmp_path, beat_s=0.2).acquire()
    finally:
        stop.set()
        thread.join()


@pytest.mark.row(43)
def test_clocks_are_not_compared(tmp_path: Path) -> None:
    path = write(tmp_path, host="elsewhere")
    os.utime(path, (4e9, 4e9))  # a century ahead, and still silent
    with RunLock(tmp_path, **QUICK):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff", '{"pid": "x"}', "[" * 5000])
def test_garbage_is_judged_by_its_heartbeat_too(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock.json").write_text(text)
    with RunLock(tmp_path, **QUICK):
        pass


def test_the_heartbeat_beats_and_notices_a_theft(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, **QUICK)
    lock.acquire()
    before = lock.path.stat().st_mtime_ns
    time.sleep(0.2)
    assert lock.path.stat().st_mtime_ns > before
    write(tmp_path, token="thief")
    time.sleep(0.2)
    assert lock.lost
    lock.release()
    assert lock.path.exists()  # it is the thief's


@pytest.mark.row(30)
@pytest.mark.parametrize("attempt", range(10))
def test_one_of_many_wins_a_stale_lock(tmp_path: Path, attempt: int) -> None:
    write(tmp_path, process_start=1)
    won: list[RunLock] = []
    lost: list[BusyError] = []

    def try_it() -> None:
        lock = RunLock(tmp_path)
        try:
            lock.acquire()
            won.append(lock)
        except BusyError as error:
            lost.append(error)

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    won[0].release()


@pytest.mark.row(31)
def test_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(FileSystemError, match="cannot be written"):
        RunLock(tmp_path / "absent").acquire()

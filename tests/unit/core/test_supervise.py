"""A command's processes under supervision: signals reach the ranks, codes come back, and nothing outlives it.

The launcher here does what torchrun does: a session for each rank, 1 for every failure, and no care for its ranks when
it is killed.
"""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from distft.core import launched, supervise

ROOT = Path(__file__).resolve().parents[3]
LAUNCHER = """
import os, subprocess, sys, time
time.sleep(float(os.environ["IMPORTS_S"]))
ranks = [
    subprocess.Popen([sys.executable, "rank.py"], start_new_session=True, env=os.environ | {"RANK": str(rank)})
    for rank in range(2)
]
open("started", "w").close()
codes = [rank.wait() for rank in ranks]
open("codes", "w").write(repr(codes))
sys.exit(1 if any(codes) else 0)
"""
RANK = """
import os, signal, sys, time
os.environ["TORCHELASTIC_RUN_ID"] = "x"
rank = os.environ["RANK"]
time.sleep(float(os.environ["STARTS_S"]))  # its signals are held until it can take them
from distft.core.hard_exit import hard_exit
from distft.core.stop import STOP
STOP.install()
open(f"ready{rank}", "w").write(str(os.getpid()))
if os.environ["DEAF"] == rank:
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
until = time.monotonic() + float(os.environ["RUNS_S"])
while time.monotonic() < until and (not STOP.requested() or os.environ["DEAF"] == rank):
    time.sleep(0.02)
if STOP.requested():
    time.sleep(0.3)
    open(f"saved{rank}", "w").write(f"{STOP.reason} {STOP._count}")
    hard_exit(75)
hard_exit(int(os.environ["CODE"]) if rank == "1" else 0)
"""


@dataclass
class Started:
    folder: Path
    process: subprocess.Popen[bytes]
    mark: str

    def wait_for(self, *names: str) -> None:
        until(lambda: all((self.folder / name).exists() for name in names))

    def ended(self, within_s: float = 10.0) -> int:
        """Exit code, once no process is left."""
        code = self.process.wait(within_s)
        until(lambda: not self.alive(), within_s)
        return code

    def alive(self) -> list[int]:
        wanted = f"TEST_MARK={self.mark}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0") and not launched.is_dead(folder):
                    found.append(int(folder.name))
        return found

    def saved(self) -> list[str]:
        return [(self.folder / f"saved{rank}").read_text() for rank in range(2)]


def until(happened: Callable[[], object], within_s: float = 10.0) -> None:
    end = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(RUNS_S=60)`: `python -m distft.launch` of the launcher above."""
    (tmp_path / "fakelauncher.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK)
    running: list[Started] = []

    def begin(*, before: list[str] | None = None, **settings: object) -> Started:
        mark = uuid.uuid4().hex
        own = {"IMPORTS_S": 0, "STARTS_S": 0, "RUNS_S": 60, "DEAF": "", "CODE": 0} | settings
        env = os.environ | {"PYTHONPATH": str(ROOT), "TEST_MARK": mark} | {key: str(own[key]) for key in own}
        command = [sys.executable, "-m", "distft.launch", sys.executable, "-m", "fakelauncher"]
        running.append(Started(tmp_path, subprocess.Popen([*(before or []), *command], cwd=tmp_path, env=env), mark))
        return running[-1]

    yield begin
    for one in running:
        for pid in one.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        one.process.wait()


READY = ("ready0", "ready1")


@pytest.mark.parametrize("code", [0, 3, 75])
def test_the_code_of_a_rank_is_the_commands(start: Start, code: int) -> None:
    assert start(RUNS_S=0.1, CODE=code).ended() == code


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_wish_to_stop_reaches_every_rank_once(start: Start, name: str) -> None:
    one = start()
    one.wait_for(*READY)
    one.process.send_signal(getattr(signal, name))
    assert one.ended() == 75
    assert one.saved() == [f"{name} 1"] * 2
    assert (one.folder / "codes").read_text() == "[75, 75]", "the launcher was left alone"


def test_a_wish_is_kept_for_a_rank_that_is_still_starting(start: Start) -> None:
    one = start(STARTS_S=1.0)
    one.wait_for("started")
    one.process.send_signal(signal.SIGTERM)
    assert one.ended() == 75
    assert one.saved() == ["SIGTERM 1"] * 2


def test_before_there_is_a_rank_the_launcher_is_ended(start: Start) -> None:
    one = start(IMPORTS_S=60)
    until(lambda: len(one.alive()) == 3)  # itself, its keeper, the launcher
    one.process.send_signal(signal.SIGTERM)
    assert one.ended(5) == 75
    assert not (one.folder / "started").exists()


def test_the_third_wish_is_granted_at_once(start: Start) -> None:
    one = start(DEAF="0")
    one.wait_for(*READY)
    for _ in range(3):
        one.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert one.ended(5) == 128 + signal.SIGTERM


def test_timeout_asks_once(start: Start) -> None:
    """It signals the process and its group, so the process twice at once; more would end a rank that saves."""
    one = start(before=["timeout", "2"])
    one.wait_for(*READY)
    assert one.ended() == 124, "timeout's own code"
    assert one.saved() == ["SIGTERM 1"] * 2


def test_killed_it_leaves_ranks_that_save_and_end(start: Start) -> None:
    one = start()
    one.wait_for(*READY)
    one.process.kill()
    assert one.ended() == -signal.SIGKILL
    assert len(one.saved()) == 2


def test_killed_while_the_launcher_starts_or_ranks_do(start: Start) -> None:
    first = start(IMPORTS_S=60)
    until(lambda: len(first.alive()) == 3)
    first.process.kill()
    assert first.ended() == -signal.SIGKILL
    second = start(STARTS_S=1.0)
    second.wait_for("started")
    second.process.kill()
    assert second.ended() == -signal.SIGKILL
    assert len(second.saved()) == 2, "they were asked as soon as they could be"


@pytest.mark.slow
def test_killed_it_leaves_no_rank_that_cannot_end(start: Start) -> None:
    one = start(DEAF="1")
    one.wait_for(*READY)
    os.kill(int((one.folder / "ready0").read_text()), signal.SIGSTOP)
    one.process.kill()
    assert one.ended(30) == -signal.SIGKILL
    assert not (one.folder / "saved1").exists()


def test_ranks_of_a_killed_launcher_are_waited_for(start: Start) -> None:
    one = start()
    one.wait_for(*READY)
    (launcher,) = [pid for pid in one.alive() if b"fakelauncher" in command_line(pid) and pid != one.process.pid]
    os.kill(launcher, signal.SIGKILL)
    assert one.ended() == 75
    assert one.saved() == ["the launcher's end 0"] * 2


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_closed_terminal_stops_nothing_under_nohup(start: Start) -> None:
    one = start(before=["nohup"], RUNS_S=1.5)
    one.wait_for(*READY)
    one.process.send_signal(signal.SIGHUP)
    assert one.ended() == 0
    assert not (one.folder / "saved0").exists()


def test_suspended_and_continued(start: Start) -> None:
    one = start(RUNS_S=60)
    one.wait_for(*READY)
    until(lambda: all((one.folder / name).read_text() for name in READY))
    ranks = [int((one.folder / name).read_text()) for name in READY]
    one.process.send_signal(signal.SIGTSTP)
    until(lambda: [state(pid) for pid in (*ranks, one.process.pid)] == ["T", "T", "T"])
    one.process.send_signal(signal.SIGCONT)
    until(lambda: "T" not in [state(pid) for pid in (*ranks, one.process.pid)])
    one.process.send_signal(signal.SIGTERM)
    assert one.ended() == 75


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_other_signals_do_to_ranks_what_they_do(start: Start) -> None:
    one = start()
    one.wait_for(*READY)
    one.process.send_signal(signal.SIGUSR2)
    assert one.ended() == 1, "no rank could tell its code"
    assert (one.folder / "codes").read_text() == f"[{-signal.SIGUSR2}, {-signal.SIGUSR2}]"


def test_no_file_is_left(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    assert start(RUNS_S=0.1).ended() == 0
    one = start()
    one.wait_for(*READY)
    one.process.kill()
    one.ended()
    assert not list((tmp_path / "own").iterdir())


def test_without_room_for_a_file_the_commands_own_code_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> tuple[int, str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    ended = supervise.run([sys.executable, "-c", "raise SystemExit(4)"], env=os.environ, launcher=False)
    assert (ended.code, ended.signals) == (4, [])
    assert Path(os.devnull).exists()


def test_what_a_rank_has_left_behind_ends_with_the_command() -> None:
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid)"
    with tempfile.TemporaryFile("w+") as output:
        supervise.run([sys.executable, "-c", code], env=os.environ, launcher=False, output=output)
        output.seek(0)
        pid = int(output.read())
    until(lambda: not Path(f"/proc/{pid}").exists() or launched.is_dead(Path(f"/proc/{pid}")))

"""Signals to `distft train`, whatever it is doing: as if it were its ranks, and nothing of it is left.

SIGTERM: the run saves, the caller gets 75. SIGKILL: within 30 s no process is left. Continued, it ends as the oracle.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from forks import Forks
from harness import Bench, End, Job, Launch, until

from distft.core.errors import PREEMPTED_AND_SAVED

Oracle = Callable[..., End]
SYNC = "checkpoint.asynchronous=false"
SETTINGS = (SYNC, "eval.every_steps=2")
GONE_S = 30.0


@dataclass(frozen=True)
class Moment:
    """Something that `distft train` can be doing, and the step that is saved when it is asked to stop then."""

    at: str
    """A point of the run, which is made to last; or what comes before the ranks exist."""
    step: int | None = None
    saved: int | None = None

    @property
    def fault(self) -> str:
        step = "" if self.step is None else f",step={self.step}"
        return f"slow:point={self.at}{step},seconds=6"

    def is_now(self, job: Job, launch: Launch, began: float) -> bool:
        """Whether it is doing that; of the ranks both are."""
        if self.at == "command":
            return time.monotonic() - began > 1.0
        if self.at == "launcher":
            return any(b"accelerate" in command_line(pid) for pid in launch.alive())
        if self.at == "import":
            return len([pid for pid in launch.alive() if is_rank(pid)]) == 2
        records = job.records().values()
        if [record.ended for record in records] != [None, None]:
            return False
        return all(record.phase == self.at and self.step in (None, record.step) for record in records)


MOMENTS = [
    Moment("command"),
    Moment("launcher"),
    Moment("import"),
    Moment("rows"),
    Moment("join"),
    Moment("model"),
    Moment("weights"),
    Moment("forward", 1, saved=1),
    Moment("eval", 2, saved=2),
    Moment("backward", 3, saved=3),
    Moment("save", 4, saved=4),
    Moment("export", saved=6),
]


def command_line(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def is_rank(pid: int) -> bool:
    return b"distft.train\0" in command_line(pid) and b"accelerate" not in command_line(pid)


def train(job: Job, *more: str, fault: str = "") -> Launch:
    """As people type it."""
    return Launch(
        [sys.executable, "-m", "distft.cli", "train", *job.arguments, "--nproc", "2", *more], DISTFT_FAULT=fault
    )


def sent(job: Job, moment: Moment, number: int) -> tuple[int, float, str]:
    """`number` to `distft train` at that moment: (its exit code, seconds until nothing was left, what it printed)."""
    began = time.monotonic()
    with train(job, fault=moment.fault) as launch:
        until(lambda: moment.is_now(job, launch, began), 120, launch.stderr)
        os.kill(launch.process.pid, number)
        then = time.monotonic()
        launch.process.wait(120)
        until(lambda: not launch.alive(), 40, launch.stderr)
        return launch.process.returncode, time.monotonic() - then, launch.stderr()


def asked_to_stop(job: Job, moment: Moment) -> None:
    code, _, said = sent(job, moment, signal.SIGTERM)
    assert code == PREEMPTED_AND_SAVED, (moment, said)
    if moment.saved is not None:
        assert (job.exit()["code"], job.exit()["step"]) == (75, moment.saved), moment
        assert job.checkpoints()[-1] == moment.saved, moment
    assert not (job.folder / "lock.json").exists()


def killed(job: Job, moment: Moment) -> None:
    code, took_s, said = sent(job, moment, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert took_s < GONE_S, (moment, took_s, said)


def ends_as(expected: End, job: Job, forks: Forks) -> None:
    """The same arguments, once more and left alone."""
    assert forks.run(job) == [0, 0], forks.stderr()
    assert job.result() == expected
    assert job.exit()["code"] == 0


@pytest.mark.slow
@pytest.mark.row(3, 5)
def test_sigterm_at_every_moment(bench: Bench, forks: Forks, oracle: Oracle) -> None:
    job = Job(bench, "term-train", settings=SETTINGS)
    for moment in MOMENTS:
        asked_to_stop(job, moment)
    ends_as(oracle("zero3"), job, forks)


@pytest.mark.slow
@pytest.mark.row(3)
def test_sigkill_at_every_moment(bench: Bench, forks: Forks, oracle: Oracle) -> None:
    job = Job(bench, "kill-train", settings=SETTINGS)
    for moment in MOMENTS:
        killed(job, moment)
    ends_as(oracle("zero3"), job, forks)


@pytest.mark.slow
@pytest.mark.row(3, 5)
def test_in_the_midst_of_a_step(bench: Bench, forks: Forks, oracle: Oracle) -> None:
    """The short form of the two above."""
    job = Job(bench, "midst-train", settings=SETTINGS)
    asked_to_stop(job, Moment("launcher"))
    asked_to_stop(job, Moment("backward", 3, saved=3))
    killed(job, Moment("backward", 5))
    ends_as(oracle("zero3"), job, forks)


@pytest.mark.row(5)
def test_one_process_is_what_the_command_becomes(bench: Bench) -> None:
    job = Job(bench, "one-train", "solo")
    command = [sys.executable, "-m", "distft.cli", "train", *job.arguments, "--nproc", "1"]
    with Launch(command, DISTFT_FAULT="slow:point=rows,seconds=60") as launch:
        until(lambda: any(record.phase == "rows" for record in job.records().values()), said=launch.stderr)
        (alone,) = launch.alive()
        assert alone == launch.process.pid
        os.kill(alone, signal.SIGKILL)
    with Launch(command, DISTFT_FAULT="term:point=import") as launch:
        assert launch.end().code == PREEMPTED_AND_SAVED


OTHERS = {
    "eval": ["eval", "RECIPE", "--nproc", "2", "--model", "base", "--set", 'name="signals-eval"'],
    "reproduce": ["reproduce", "RUN", "--nproc", "2"],
    "bench": ["bench", "RECIPE", "--engines", "zero3", "--nproc", "2", "--steps", "500", "--micro", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("verb", OTHERS)
def test_other_commands_that_start_processes(
    bench: Bench, forks: Forks, oracle: Oracle, verb: str, number: int
) -> None:
    oracle("zero3")
    words = {"RECIPE": str(bench.recipe), "RUN": str(bench.folder / "runs/oracle-0")}
    command = [words.get(word, word) for word in OTHERS[verb]]
    with Launch([sys.executable, "-m", "distft.cli", *command], DISTFT_FAULT="slow:point=eval,seconds=60") as launch:
        until(lambda: len([pid for pid in launch.alive() if is_rank_of_any(pid)]) == 2, 120, launch.stderr)
        time.sleep(3)
        os.kill(launch.process.pid, number)
        then = time.monotonic()
        launch.process.wait(90)
        until(lambda: not launch.alive(), 40, launch.stderr)
        assert time.monotonic() - then < GONE_S or number == signal.SIGTERM, launch.stderr()
        assert launch.process.returncode == (PREEMPTED_AND_SAVED if number == signal.SIGTERM else -number), (
            launch.stderr()
        )


def is_rank_of_any(pid: int) -> bool:
    line = command_line(pid)
    modules = (b"distft.train\0", b"distft.eval\0", b"distft.bench.case\0")
    return any(module in line for module in modules) and not any(word in line for word in (b"accelerate", b"torch"))
